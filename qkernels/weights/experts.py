"""PackedExperts: E quantized weights of one shape, for mixtures of experts.

    experts = qk.quantize_experts(weight, "awq", group_size=128)  weight (E, N, K)
    y = qk.grouped_matmul(x, experts, topk_ids)                   (T, K) -> (T, top_k, N)
    y = qk.fused_moe(x, gate_up, down, topk_weights, topk_ids)    a whole layer, (T, K) -> (T, N)

An expert id outside of 0..E-1, for example -1, means "not here": an expert of another process
(expert parallelism). Its row of y is zeros, so that the processes' results add up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import counters, formats, layouts
from ..tensors import whole
from .packed import PackedWeight, Prepackable, params_text, quantize


@lru_cache(maxsize=4096)
def parsed(spec: str) -> dict[str, Any]:
    """`PackedExperts.spec` as a dict. Callers share it, so it must not be changed."""
    fields: dict[str, Any] = json.loads(spec)
    return fields


class Snapshot(NamedTuple):
    """A stack's layout, tensors, lengths and spec, which only ever change together."""

    layout: str
    storage: dict[str, Tensor]
    sizes: dict[str, list[int]]
    spec: str


class PackedExperts(Prepackable):
    """E quantized weights of one format, shape (N, K) and parameters, stacked once.

    Threads may share them.

    Attributes:
        format, shape, params, layout: of each expert, as in PackedWeight; shape is (N, K).
        count: E.
        storage: name -> the experts' tensors in `layout`, stacked to (E, ...). Tensors whose length
            differs from expert to expert are concatenated instead.
        sizes: name -> lengths of the concatenated tensors.
        spec: everything but the tensors, as JSON.
        snapshot: layout, storage, sizes and spec together, for readers that need several while
            another thread prepacks.

    Raises ValueError, naming the expert, if the experts do not agree.
    """

    __slots__ = ("_nbytes", "count", "format", "params", "shape")
    snapshot: Snapshot

    def __init__(self, experts: Sequence[PackedWeight]) -> None:
        if not experts:
            raise ValueError("experts: expected at least one PackedWeight, got none")
        for e, p in enumerate(experts):
            if not isinstance(p, PackedWeight):
                raise ValueError(f"experts[{e}]: expected a PackedWeight, got {type(p).__name__}")
            for name in ("format", "shape", "params", "device"):
                want, got = getattr(experts[0], name), getattr(p, name)
                if got != want:
                    raise ValueError(
                        f"experts[{e}]: expected {name} {want}, that of experts[0], got {got}"
                    )
        first = experts[0]
        self._nbytes = sum(p.nbytes for p in experts)
        stacked = _stack((p.tensors for p in experts), len(experts))
        self._set(
            first.format, first.shape, first.params, layouts.CHECKPOINT, len(experts), *stacked
        )

    def _set(
        self,
        format: str,
        shape: tuple[int, int],
        params: Mapping[str, Any],
        layout: str,
        count: int,
        storage: Mapping[str, Tensor],
        sizes: dict[str, list[int]],
    ) -> None:
        self.format, self.shape, self.params = format, (int(shape[0]), int(shape[1])), dict(params)
        self.count = count
        Prepackable.__init__(self, self._snapshot(layout, storage, sizes))

    def _snapshot(
        self, layout: str, storage: Mapping[str, Tensor], sizes: dict[str, list[int]]
    ) -> Snapshot:
        described = {name: getattr(self, name) for name in ("format", "shape", "params", "count")}
        described |= {"layout": layout, "sizes": sizes, "names": list(storage)}
        return Snapshot(layout, dict(storage), sizes, json.dumps(described, sort_keys=True))

    @classmethod
    def _restored(cls, spec: str, storage: Sequence[Tensor], nbytes: int) -> PackedExperts:
        """From `spec` and the values of `storage`, in order."""
        d, self = parsed(spec), cls.__new__(cls)
        self.format, self.shape, self.params = (
            d["format"],
            (d["shape"][0], d["shape"][1]),
            d["params"],
        )
        self.count, self._nbytes = d["count"], nbytes
        tensors = {
            name: whole(f"experts: {name}", tensor, aligned=d["layout"] != layouts.CHECKPOINT)
            for name, tensor in zip(d["names"], storage, strict=bool(storage))
        }
        Prepackable.__init__(self, Snapshot(d["layout"], tensors, d["sizes"], spec))
        return self

    @property
    def sizes(self) -> dict[str, list[int]]:
        return self.snapshot.sizes

    @property
    def spec(self) -> str:
        return self.snapshot.spec

    @property
    def nbytes(self) -> int:
        """Bytes of the checkpoint's tensors of all experts, everything counted."""
        return self._nbytes

    @property
    def state(self) -> dict[str, Tensor]:
        """Name "{expert}.{tensor}" -> the checkpoint's tensors, bit for bit.

        From a kernel layout they are rebuilt at every access.
        """
        return {f"{e}.{k}": t for e in range(self.count) for k, t in self.expert(e).tensors.items()}

    def expert(self, e: int) -> PackedWeight:
        """Expert e, 0..E-1, as a PackedWeight whose tensors are views of the stacked ones."""
        if not 0 <= e < self.count:
            raise ValueError(f"expert: expected 0..{self.count - 1}, got {e}")
        tensors, snapshot = {}, self.snapshot
        for name, tensor in snapshot.storage.items():
            lengths = snapshot.sizes.get(name)
            tensors[name] = tensor[e] if lengths is None else tensor.split(lengths)[e]
        return PackedWeight(self.format, self.shape, tensors, self.params, snapshot.layout)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[PackedWeight]:
        return (self.expert(e) for e in range(self.count))

    def to(self, device: torch.device | str) -> PackedExperts:
        """The same experts with their tensors on `device`; dtypes never change."""
        snapshot = self.snapshot
        moved = [tensor.to(device) for tensor in snapshot.storage.values()]
        counters.reserve(moved[0])
        return self._restored(snapshot.spec, moved, self.nbytes)

    def prepack(self, layout: str | None = None) -> PackedExperts:
        """Move the bytes to a kernel layout, in place, freeing the checkpoint's. Returns self.

        layout: defaults to the format's kernel layout.

        Raises ValueError if the format has no kernel layout, or if a tensor that kernels read is
        not of the same size in all experts, as with the groups of irregular act-order.
        """
        layout = layout or formats.get(self.format).kernel_layout(self.params)
        if layout is None:
            raise ValueError(
                f"experts: {self.format} has no kernel layout: its only backend is 'reference'"
            )
        self._move(layout)
        return self

    def _packed(self, layout: str) -> Snapshot:
        packed = (
            layouts.pack(formats.get(p.format), p.shape, p.params, p.tensors, layout) for p in self
        )
        storage, sizes = _stack(packed, self.count)
        for name in sizes:
            if not name.startswith("extra."):
                raise ValueError(
                    f"experts: {name}: expected one size in all experts for fused kernels, "
                    f"got {sizes[name]}; backend='reference' takes such experts"
                )
        return self._snapshot(layout, storage, sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        snapshot = self.snapshot
        return PackedExperts._restored, (
            snapshot.spec,
            list(snapshot.storage.values()),
            self.nbytes,
        )

    def __repr__(self) -> str:
        return (
            f"PackedExperts({self.count} x {self.format!r}, shape={self.shape}, "
            f"{params_text(self.params)}device={str(self.device)!r})"
        )


def quantize_experts(weight: Tensor, format: str, **params: Any) -> PackedExperts:
    """Quantize `weight` (E, N, K), any float dtype, expert by expert, by round-to-nearest.

    Raises ValueError as `qkernels.quantize` does, and for a weight that is not (E, N, K).
    """
    if not isinstance(weight, Tensor) or weight.dim() != 3 or weight.shape[0] == 0:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight: expected a tensor of shape (E, N, K) with E >= 1, got {got}")
    params = formats.get(format).complete(
        {"the experts": (weight.shape[1], weight.shape[2])}, params
    )
    return PackedExperts([quantize(part, format, **params) for part in weight])


def _stack(
    experts: Iterator[Mapping[str, Tensor]] | Any, count: int
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Stack the experts' tensors; concatenate those whose length differs from expert to expert.

    Returns (name -> stacked or concatenated tensor, name -> lengths of the concatenated ones).
    Takes one expert after another, so that at most one copy of all of them exists beside their
    source.
    """
    stacked: dict[str, Tensor] = {}
    ragged: dict[str, list[Tensor]] = {}
    for e, tensors in enumerate(experts):
        if e == 0:
            stacked = {
                name: torch.empty((count, *t.shape), dtype=t.dtype, device=t.device)
                for name, t in tensors.items()
            }
        if set(tensors) != set(stacked) | set(ragged):
            differ = sorted(set(tensors) ^ (set(stacked) | set(ragged)))
            raise ValueError(f"experts[{e}]: {differ[0]}: expected in all experts or in none")
        for name, tensor in tensors.items():
            like = ragged[name][0] if name in ragged else stacked[name][0]
            if tensor.dtype != like.dtype or tensor.shape[1:] != like.shape[1:]:
                raise ValueError(
                    f"experts[{e}]: {name}: expected {like.dtype} {tuple(like.shape)}, "
                    f"that of experts[0], got {tensor.dtype} {tuple(tensor.shape)}"
                )
            if name not in ragged and tensor.shape != like.shape:
                ragged[name] = [stacked[name][i] for i in range(e)]
                del stacked[name]
            if name in ragged:
                ragged[name].append(tensor)
            else:
                stacked[name][e].copy_(tensor)
    sizes = {name: [t.shape[0] for t in tensors] for name, tensors in ragged.items()}
    return stacked | {name: torch.cat(tensors) for name, tensors in ragged.items()}, sizes
