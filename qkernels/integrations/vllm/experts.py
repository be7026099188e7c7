"""The experts of one layer that a process holds, and their product. No vLLM here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...experts import PackedExperts
from ...formats.base import accumulate_dtype
from ...grouped import ACTIVATIONS, fused_moe, grouped_matmul
from ...packed import PackedWeight
from ...sharding import join_rows

#: vLLM's names of an expert's weights: gate, down, up
SHARDS = ("w1", "w2", "w3")


class ExpertParts:
    """E experts with gate (I, K), up (I, K) and down (N, I), stacked once.

    Gate and up are one weight, rows of the gate first, where one weight can hold both bit for bit (`join_rows`).
    Where it cannot (scales of whole tensors, act-order, bitsandbytes' quant states) they are two products.
    """

    def __init__(
        self, gate: Sequence[PackedWeight], up: Sequence[PackedWeight], down: Sequence[PackedWeight]
    ) -> None:
        """ValueError, naming the expert, if experts differ in format, parameters or shape."""
        joined = []
        for pair in zip(gate, up, strict=True):
            whole = join_rows(pair)
            if whole is None:
                break
            joined.append(whole)
        #: [gate above up] or [gate, up]
        stacks = [joined] if len(joined) == len(gate) else [list(gate), list(up)]
        self.first = [PackedExperts(stack) for stack in stacks]
        self.down = PackedExperts(down)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.first, self.down))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors held, in whatever layout."""
        return sum(t.nbytes for part in (*self.first, self.down) for t in part.storage.values())

    def run(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        activation: str = "silu",
        batch_invariant: bool | None = None,
    ) -> Tensor:
        """As `qkernels.fused_moe`: x (T, K), weights and ids (T, top_k) -> (T, N)."""
        more: dict[str, Any] = {"batch_invariant": batch_invariant}
        if len(self.first) == 1:
            return fused_moe(x, self.first[0], self.down, weights, ids, activation, **more)
        gate, up = (grouped_matmul(x, part, ids, **more) for part in self.first)
        dtype = accumulate_dtype(x.dtype)
        h = (ACTIVATIONS[activation](gate.to(dtype)) * up.to(dtype)).to(x.dtype)
        y = grouped_matmul(h, self.down, ids, **more)
        total = torch.zeros(y.shape[0], y.shape[2], dtype=dtype, device=x.device)
        for choice in range(ids.shape[1]):  # in order, whatever the number of tokens
            total += y[:, choice].to(dtype) * weights[:, choice, None].to(dtype)
        return total.to(x.dtype)

    def prepack(self, dtype: torch.dtype, activation: str, batch_invariant: bool | None) -> None:
        """Move the bytes to the kernels' layout, once: a product of one token does it, which is sent nowhere."""
        device, k = self.down.device, self.first[0].shape[1]
        nowhere = torch.full((1, 1), -1, dtype=torch.int32, device=device)
        weights = torch.zeros(1, 1, device=device)
        self.run(torch.zeros(1, k, dtype=dtype, device=device), weights, nowhere, activation, batch_invariant)


def local_ids(ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """The router's ids (T, top_k) as those of this process's experts: -1 for experts of other processes.

    expert_map: (experts of all processes,), each one's place here or -1; None if all are here.
    """
    if expert_map is None:
        return ids
    known = (ids >= 0) & (ids < expert_map.numel())
    index = torch.where(known, ids, 0).long()
    return torch.where(known, expert_map[index].to(ids.dtype), -1)


def expert_tensor(name: str, leaves: Sequence[str]) -> tuple[int, str, str]:
    """(expert, vLLM's shard id, tensor's name) of "3.up_proj.qweight". ValueError for a name of another form.

    leaves: what the checkpoint calls gate, down and up.
    """
    number, _, rest = name.partition(".")
    leaf, _, own = rest.partition(".")
    if not number.isdecimal() or leaf not in leaves or not own:
        raise ValueError(
            f"experts: expected tensors called EXPERT.NAME.TENSOR with NAME one of {', '.join(leaves)}, got {name!r:.80}"
        )
    return int(number), SHARDS[list(leaves).index(leaf)], own
