"""The experts of one layer that a process holds. No vLLM here; `ExpertParts` is their product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checkpoints.hf import names
from ...nn.experts import ExpertParts

__all__ = ["SHARDS", "ExpertParts", "expert_tensor", "local_ids"]

#: vLLM's names of an expert's weights: gate, down, up
SHARDS = ("w1", "w2", "w3")


def local_ids(ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """The router's ids (T, top_k) as those of this process's experts: -1 for experts of other
    processes.

    expert_map: (experts of all processes,), each one's place here or -1; None if all are here.
    """
    if expert_map is None:
        return ids
    known = (ids >= 0) & (ids < expert_map.numel())
    index = torch.where(known, ids, 0).long()
    return torch.where(known, expert_map[index].to(ids.dtype), -1)


def expert_tensor(name: str, leaves: Sequence[str]) -> tuple[int, str, str]:
    """(expert, vLLM's shard id, tensor's name) of "3.up_proj.qweight". ValueError for a name of
    another form.

    leaves: what the checkpoint calls gate, down and up.
    """
    expert, leaf, own = names.expert_tensor(name, leaves)
    return expert, SHARDS[list(leaves).index(leaf)], own
