"""From a checkpoint's tensors to the packed parts that one process of a tensor-parallel group
holds.

vLLM fuses layers (q, k and v; gate and up) and cuts them among processes. A fused layer here is a
list of parts, each a packed weight of its own, because neighbours may differ in format, scales of a
whole tensor, or double quantization, and nothing is requantized. A `Source` is one weight of the
checkpoint and what this process needs of it. Tensors are kept as they come; when a source has all
of its own it is checked by `qkernels.pack`, cut, moved to the device, and the rest is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ... import formats
from ...checkpoints.hf.quantization import Scheme
from ...weights.packed import PackedWeight, pack
from ...weights.sharding import COLUMNS, ROWS, check_cut, check_shard, narrow, shard
from .checkpoint import Checkpoint

#: dtype -> the format of a plain weight, which is a part like any other beside packed ones
_DENSE = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Piece:
    """Rows of a source that a process has: part `part` of `parts` of the `size` ones from `first`
    on.
    """

    first: int
    size: int
    part: int = 0
    parts: int = 1

    @property
    def rows(self) -> tuple[int, int]:
        size = self.size // self.parts
        return self.first + self.part * size, self.first + (self.part + 1) * size


@dataclass
class Source:
    """One weight of the checkpoint.

    name: the module's. scheme: None for a plain weight. shape: (N, K) of the whole. pieces: the
    rows of it that this process has, in order. columns: (index, count) of its input features.
    wanted: names of its tensors if they are known beforehand.
    """

    name: str
    scheme: Scheme | None
    shape: tuple[int, int]
    pieces: Sequence[Piece]
    columns: tuple[int, int] = (0, 1)
    wanted: frozenset[str] | None = None
    dtype: torch.dtype = torch.bfloat16
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: list[PackedWeight] | None = None

    # ------------------------------------------------------------------ before anything is loaded
    def check(self, tensors: Mapping[str, Tensor] | None) -> None:
        """ValueError, naming the module, if the weight cannot be served or cut as it is to be.

        tensors: those of the files, mapped; their dtypes and shapes are looked at, values only
        where they state parameters. None if they are not known.
        """
        try:
            self._check(tensors)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def _check(self, tensors: Mapping[str, Tensor] | None) -> None:
        scheme = self._scheme()
        fmt, params = formats.get(scheme.format), scheme.params
        if tensors is not None:
            tensors = self._cast(tensors)
            params = fmt.params_from_tensors(tensors, params)
        params = fmt.resolve(self.shape, params)
        if tensors is not None:
            fmt.validate(
                {name: tensor.to("meta") for name, tensor in tensors.items()}, self.shape, params
            )
        self._check_cuts(scheme.format, params)

    def _check_cuts(self, format: str, params: Mapping[str, Any]) -> None:
        check_shard(format, self.shape, params, COLUMNS, self.columns[1])
        for piece in self.pieces:
            if self._whole(piece):
                check_shard(format, self.shape, params, ROWS, piece.parts)
            else:
                check_cut(format, self.shape, params, ROWS, *piece.rows)

    def _whole(self, piece: Piece) -> bool:
        return (piece.first, piece.size) == (0, self.shape[0])

    def _scheme(self) -> Scheme:
        if self.scheme is not None:
            return self.scheme
        if self.dtype not in _DENSE:
            raise ValueError(
                "expected float16 or bfloat16 for a plain weight fused with packed ones, got "
                f"{self.dtype}"
            )
        return Scheme(_DENSE[self.dtype], {})

    def _cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A plain weight in the dtype that vLLM computes in; packed tensors as they are."""
        if self.scheme is not None:
            return dict(tensors)
        return {
            name: t.to(self.dtype) if t.is_floating_point() else t for name, t in tensors.items()
        }

    def names(self) -> set[str]:
        """Names that its tensors may have."""
        if self.wanted is not None:
            return set(self.wanted)
        if self.scheme is None:
            return {"weight"}
        fmt = formats.get(self.scheme.format)
        return set(fmt.specs(self.shape, fmt.resolve(self.shape, self.scheme.params)))

    # ------------------------------------------------------------------ while loading
    def add(self, own: str, tensor: Tensor, device: torch.device) -> None:
        """Take a tensor of the checkpoint; finish if it is the last. ValueError if it is one too
        many.
        """
        if self.parts is not None or own in self.tensors:
            raise ValueError(f"{self.name}: {own}: expected to be loaded once, got it again")
        self.tensors[own] = tensor
        if self.wanted is not None and self.wanted <= set(self.tensors):
            self.finish(device)

    def finish(self, device: torch.device) -> list[PackedWeight]:
        """The parts, on `device`; the checkpoint's tensors are dropped. ValueError if they are no
        valid weight.
        """
        if self.parts is None:
            try:
                self.parts = self._parts(device)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
            self.tensors = {}
        return self.parts

    def _parts(self, device: torch.device) -> list[PackedWeight]:
        scheme = self._scheme()
        whole = pack(scheme.format, self._cast(self.tensors), self.shape, **scheme.params)
        found = []
        for piece in self.pieces:
            part = narrow(whole, ROWS, *piece.rows)
            part = shard(part, COLUMNS, *self.columns)
            if part.shape != whole.shape:  # a view would keep the whole alive
                owned = {name: _owned(tensor) for name, tensor in part.storage.items()}
                part = PackedWeight(part.format, part.shape, owned, part.params, part.layout)
            found.append(part.to(device))
        return found


def _owned(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def source_of(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], pieces: Sequence[Piece], **more: Any
) -> Source:
    """The source of the checkpoint's module `name`, checked. ValueError, naming it, if it cannot be
    served so.
    """
    tensors = checkpoint.tensors(name)
    wanted = None if tensors is None else frozenset(tensors)
    source = Source(name, checkpoint.scheme(name), shape, pieces, wanted=wanted, **more)
    try:
        source.check(tensors)
    except ValueError as error:
        raise ValueError(f"{checkpoint.where}: {error}") from None
    return source


# ---------------------------------------------------------------------- which rows a layer has
def layer_pieces(
    partitions: Sequence[int], output_size: int, rank: int, replicas: int = 1
) -> list[tuple[int, Piece]]:
    """(rows in the checkpoint, this process's piece of them) of each of a layer's fused outputs.

    partitions: output features of this process. output_size: in sum of all processes. replicas:
    processes that share a part of each output but the first (key and value heads fewer than
    processes).
    """
    count = max(1, output_size // sum(partitions))
    found = []
    for i, size in enumerate(partitions):
        shared = replicas if i else 1
        parts = count // shared
        found.append((size * parts, Piece(0, size * parts, (rank // shared) % parts, parts)))
    return found


def fused_pieces(pieces: Sequence[tuple[int, Piece]]) -> tuple[int, list[Piece]]:
    """(rows, pieces) of a weight that holds all of a layer's outputs one below the other."""
    first, found = 0, []
    for rows, piece in pieces:
        found.append(replace(piece, first=first))
        first += rows
    return first, found


def shard_index(shard: Any, count: int) -> int:
    """Number of the source that vLLM's shard id names. ValueError for one that it does not."""
    if count == 1:
        return 0
    index = {"q": 0, "k": 1, "v": 2}.get(shard) if isinstance(shard, str) else shard
    if type(index) is not int or not 0 <= index < count:
        raise ValueError(
            f"expected a tensor for one of {count} fused weights, got one for {shard!r}"
        )
    return index
