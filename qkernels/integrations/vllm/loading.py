"""The packed parts that one process of a tensor-parallel group holds, from a checkpoint's tensors.

vLLM fuses layers (q, k and v; gate and up) and cuts them among processes. Here a fused layer is a
list of parts, each a separate packed weight, because neighbours may differ in format, in scales of
a whole tensor or in double quantization, and nothing is requantized. A `Source` is one weight of
the checkpoint and this process's part of it. It keeps tensors as they arrive. When it has all of
them, `qkernels.pack` checks them, and the part is cut and moved to the device; the rest is dropped.
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

#: dtype -> the format of an unquantized weight, which is a part like any other beside packed ones
_DENSE = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Piece:
    """Rows of a source that a process holds.

    Part `part` of `parts` equal parts of the `size` rows from `first` on.
    """

    first: int
    size: int
    part: int = 0
    parts: int = 1

    @property
    def rows(self) -> tuple[int, int]:
        """(begin, end) of the rows."""
        size = self.size // self.parts
        return self.first + self.part * size, self.first + (self.part + 1) * size


@dataclass
class Source:
    """One weight of the checkpoint, and this process's part of it.

    name: the module's name.
    scheme: None for an unquantized weight.
    shape: (N, K) of the whole weight.
    pieces: the rows that this process holds, in order.
    columns: (index, count) of the part of its input features.
    expected: names of its tensors, if they are known before loading.
    dtype: of an unquantized weight; the dtype that vLLM computes in.
    """

    name: str
    scheme: Scheme | None
    shape: tuple[int, int]
    pieces: Sequence[Piece]
    columns: tuple[int, int] = (0, 1)
    expected: frozenset[str] | None = None
    dtype: torch.dtype = torch.bfloat16
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: list[PackedWeight] | None = None

    # ------------------------------------------------------------------ before loading
    def check(self, tensors: Mapping[str, Tensor] | None) -> None:
        """ValueError naming the module if the weight cannot be served or cut as requested.

        tensors: the mapped tensors of the files, None if they are not known. Only their dtypes and
        shapes are read, and values that state parameters.
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
        """ValueError if the format cannot be cut at these rows and columns."""
        check_shard(format, self.shape, params, COLUMNS, self.columns[1])
        for piece in self.pieces:
            if self._whole(piece):
                check_shard(format, self.shape, params, ROWS, piece.parts)
            else:
                check_cut(format, self.shape, params, ROWS, *piece.rows)

    def _whole(self, piece: Piece) -> bool:
        """Whether the piece divides all rows of the weight."""
        return (piece.first, piece.size) == (0, self.shape[0])

    def _scheme(self) -> Scheme:
        """The scheme, or the 16-bit format of an unquantized weight."""
        if self.scheme is not None:
            return self.scheme
        if self.dtype not in _DENSE:
            raise ValueError(
                "expected float16 or bfloat16 for a plain weight fused with packed ones, got "
                f"{self.dtype}"
            )
        return Scheme(_DENSE[self.dtype], {})

    def _cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An unquantized weight in the dtype that vLLM computes in; packed tensors unchanged."""
        if self.scheme is not None:
            return dict(tensors)
        return {
            name: t.to(self.dtype) if t.is_floating_point() else t for name, t in tensors.items()
        }

    def names(self) -> set[str]:
        """Names that the source's tensors may have."""
        if self.expected is not None:
            return set(self.expected)
        if self.scheme is None:
            return {"weight"}
        fmt = formats.get(self.scheme.format)
        return set(fmt.specs(self.shape, fmt.resolve(self.shape, self.scheme.params)))

    # ------------------------------------------------------------------ while loading
    def add(self, leaf: str, tensor: Tensor, device: torch.device) -> None:
        """Take a tensor of the checkpoint, and finish if it is the last one.

        Raises ValueError if the tensor was already loaded.
        """
        if self.parts is not None or leaf in self.tensors:
            raise ValueError(f"{self.name}: {leaf}: expected to be loaded once, got it again")
        self.tensors[leaf] = tensor
        if self.expected is not None and self.expected <= set(self.tensors):
            self.finish(device)

    def finish(self, device: torch.device) -> list[PackedWeight]:
        """The parts, on `device`; drops the checkpoint's tensors.

        Raises ValueError if the tensors are no valid weight.
        """
        if self.parts is None:
            try:
                self.parts = self._parts(device)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
            self.tensors = {}
        return self.parts

    def _parts(self, device: torch.device) -> list[PackedWeight]:
        """Pack the whole weight and cut this process's parts from it."""
        scheme = self._scheme()
        whole = pack(scheme.format, self._cast(self.tensors), self.shape, **scheme.params)
        parts = []
        for piece in self.pieces:
            part = narrow(whole, ROWS, *piece.rows)
            part = shard(part, COLUMNS, *self.columns)
            if part.shape != whole.shape:  # a view would keep the whole weight in memory
                tensors = {name: _without_rest(tensor) for name, tensor in part.storage.items()}
                part = PackedWeight(part.format, part.shape, tensors, part.params, part.layout)
            parts.append(part.to(device))
        return parts


def _without_rest(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a view of a larger storage."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def source_of(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], pieces: Sequence[Piece], **more: Any
) -> Source:
    """The source for the checkpoint's module `name`, checked.

    Raises ValueError naming the module if it cannot be served like this.
    """
    tensors = checkpoint.tensors(name)
    expected = None if tensors is None else frozenset(tensors)
    source = Source(name, checkpoint.scheme(name), shape, pieces, expected=expected, **more)
    try:
        source.check(tensors)
    except ValueError as error:
        raise ValueError(f"{checkpoint.where}: {error}") from None
    return source


# ---------------------------------------------------------------------- rows of a layer
def layer_pieces(
    partitions: Sequence[int], output_size: int, rank: int, replicas: int = 1
) -> list[tuple[int, Piece]]:
    """(rows in the checkpoint, this process's piece of them) for each of a layer's fused outputs.

    partitions: output features of this process.
    output_size: their sum over all processes.
    replicas: processes that share a part of each output except the first (when there are fewer key
    and value heads than processes).
    """
    count = max(1, output_size // sum(partitions))
    pieces = []
    for i, size in enumerate(partitions):
        shared = replicas if i else 1
        parts = count // shared
        pieces.append((size * parts, Piece(0, size * parts, (rank // shared) % parts, parts)))
    return pieces


def fused_pieces(pieces: Sequence[tuple[int, Piece]]) -> tuple[int, list[Piece]]:
    """(rows, pieces) of a weight that holds all of a layer's outputs one below the other."""
    first, shifted = 0, []
    for rows, piece in pieces:
        shifted.append(replace(piece, first=first))
        first += rows
    return first, shifted


def shard_index(shard: Any, count: int) -> int:
    """Index of the source for vLLM's shard id. ValueError for an unknown id."""
    if count == 1:
        return 0
    index = {"q": 0, "k": 1, "v": 2}.get(shard) if isinstance(shard, str) else shard
    if type(index) is not int or not 0 <= index < count:
        raise ValueError(
            f"expected a tensor for one of {count} fused weights, got one for {shard!r}"
        )
    return index
