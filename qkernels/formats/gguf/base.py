"""Base class of GGUF's block types. Their one tensor, `data`, has exactly the bytes of the file.

`data` is uint8 (N, bytes per row). A row is a sequence of blocks of 32 or 256 weights. A block is a
sequence of fields: planes of codes, and scales.

    q4_k, 144 bytes of 256 weights:  |d f16|dmin f16|scales: 12 bytes|qs: 128 bytes of nibbles|

A type declares its fields, how each plane divides its bytes into codes, and what its scales mean.
Reading, writing, checks and the kernels' layout follow from that. A plane of `bits` wide codes is a
sequence of chunks:

    a chunk of `width` bytes holds 8/bits * `width` weights, `width` of them in the same bits:
    width=16, bits=4:  byte j = weight j in the low nibble, weight j+16 in the high one

    weight = scale[k // group] * value(code) - min[k // group]

value(code) is code - 2^(bits-1) with `signed` codes, a table entry with a `table`, and the code
itself otherwise. Float32 results equal those of ggml and of the `gguf` package bit for bit.

Source: ggml's block structures (ggml-common.h) and the `gguf` package's quants.py, for the meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...layouts.codecs import SCALES
from ...layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from ..base import Format, TensorSpec
from ..types import Params, Shape

Fields = dict[str, Tensor]

#: blocks quantized at a time, to bound the memory of the search
_BLOCKS_AT_ONCE = 1 << 15
#: largest magnitude of a weight, beyond the range of float16 scales
_MAX_MAGNITUDE = 3e8


class Field(NamedTuple):
    """One field of a block: `items` numbers of `dtype`. Floats must be finite."""

    name: str
    dtype: torch.dtype
    items: int

    @property
    def nbytes(self) -> int:
        return self.items * self.dtype.itemsize


class Plane(NamedTuple):
    """`bits` bits of every code, from bit `shift` on, in the uint8 field `field`.

    `width`: bytes of a chunk, see above.
    """

    field: str
    bits: int
    width: int
    shift: int = 0


class GgufFormat(Format):
    """One block type. Subclasses in types.py declare everything that differs between types."""

    algorithms = ("imatrix",)
    quantize_only: ClassVar[Mapping[str, Any]] = {"importance": None}
    #: weights in a block
    block: ClassVar[int]
    fields: ClassVar[tuple[Field, ...]]
    planes: ClassVar[tuple[Plane, ...]]
    #: weights that share a scale
    group: ClassVar[int]
    #: scaler of the kernels (layouts/codecs.py)
    scaler: ClassVar[str]
    #: whether 2^(bits-1) is subtracted from a code
    signed: ClassVar[bool] = False
    #: whether the file has codes as int8; in memory they are uint8, with the top bit flipped
    int8_codes: ClassVar[bool] = False
    #: the value of each code, for types with a table
    table: ClassVar[tuple[float, ...] | None] = None

    def __init_subclass__(cls) -> None:
        if "fields" in cls.__dict__:
            cls.block_bytes = sum(field.nbytes for field in cls.fields)
            cls.bits = sum(plane.bits for plane in cls.planes)
            cls.k_multiple = cls.block

    block_bytes: ClassVar[int]
    bits: ClassVar[int]

    @property
    def ggml_type(self) -> str:
        """The type's name in ggml and in the `gguf` package."""
        return self.name.upper()

    # ------------------------------------------------------------------ what a type implements
    def scales(self, fields: Fields) -> tuple[Tensor, Tensor | None]:
        """Fields (B, items) -> (scale, min or None), float32 (B, block / group)."""
        raise NotImplementedError

    def encode(self, x: Tensor, importance: Tensor | None, sigma2: Tensor) -> Fields:
        """Quantize blocks of weights.

        Args:
            x: the blocks, float32 (B, block).
            importance: weights of the input features, (B, block), or None.
            sigma2: mean square of the matrix row that each block belongs to, (B, 1).

        Returns:
            The fields of the scales, and "codes" uint8 (B, block).
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ checks
    def check_params(self, shape: Shape, params: Params) -> None:
        if shape[1] % self.block:
            raise ValueError(
                f"{self.name}: shape: expected input features a multiple of {self.block}, "
                f"got {shape[1]}"
            )

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights."""
        return k // self.block * self.block_bytes

    def cuts(self, shape: Shape, params: Params) -> Shape:
        return 1, self.block

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        return {"data": TensorSpec((torch.uint8,), (shape[0], self.row_bytes(shape[1])))}

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        data = tensors["data"].reshape(-1, self.block_bytes)
        offset = 0
        for field in self.fields:
            if field.dtype.is_floating_point:
                part = _view_as(data[:, offset : offset + field.nbytes], field.dtype)
                self.check_finite(f"data: {field.name}", part)
            offset += field.nbytes

    # ------------------------------------------------------------------ bytes
    def split(self, data: Tensor) -> Fields:
        """Bytes (..., multiple of block_bytes) -> every field (B, items), contiguous."""
        parts = data.reshape(-1, self.block_bytes).split([f.nbytes for f in self.fields], dim=1)
        return {f.name: _view_as(p, f.dtype) for f, p in zip(self.fields, parts, strict=True)}

    def join(self, fields: Fields) -> Tensor:
        """The inverse of `split`: uint8 (B, block_bytes)."""

        def bytes_of(field: Tensor) -> Tensor:
            # Flattened first, because a dimension of size 1 counts as contiguous with any stride.
            return field.contiguous().flatten().view(torch.uint8).view(field.shape[0], -1)

        return torch.cat([bytes_of(fields[f.name]) for f in self.fields], dim=1)

    def codes(self, fields: Fields) -> Tensor:
        """The codes in the fields of all planes, uint8 (B, block)."""
        codes: Tensor | None = None
        for plane in self.planes:
            raw = fields[plane.field].view(torch.uint8)
            part = raw
            if plane.bits < 8:
                chunks = raw.view(raw.shape[0], -1, 1, plane.width)
                shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=raw.device)
                mask = (1 << plane.bits) - 1
                part = ((chunks >> shifts[:, None]) & mask).view(raw.shape[0], -1)
            part = part << plane.shift
            codes = part if codes is None else codes | part
        assert codes is not None
        return codes ^ 128 if self.int8_codes else codes

    def code_fields(self, codes: Tensor) -> Fields:
        """The inverse of `codes`: the field of every plane."""
        codes = codes ^ 128 if self.int8_codes else codes
        fields = {}
        for plane in self.planes:
            part = (codes >> plane.shift) & ((1 << plane.bits) - 1)
            if plane.bits < 8:
                chunks = part.view(codes.shape[0], -1, 8 // plane.bits, plane.width)
                packed = torch.zeros_like(chunks[:, :, 0])
                for i in range(8 // plane.bits):
                    packed |= chunks[:, :, i] << (i * plane.bits)
                part = packed.reshape(codes.shape[0], -1)
            dtype = next(f.dtype for f in self.fields if f.name == plane.field)
            fields[plane.field] = part.contiguous().view(dtype)
        return fields

    # ------------------------------------------------------------------ arithmetic
    def values(self, codes: Tensor) -> Tensor:
        """The value of each code before scaling, float32."""
        if self.table is not None:
            return torch.tensor(self.table, dtype=torch.float32, device=codes.device)[codes.int()]
        values = codes.float()
        return values - (1 << (self.bits - 1)) if self.signed else values

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        fields = self.split(tensors["data"])
        scale, minimum = self.scales(fields)
        grouped = self.values(self.codes(fields)).view(scale.shape[0], -1, self.group)
        grouped = grouped.mul_(scale[..., None])
        if minimum is not None:
            grouped = grouped.sub_(minimum[..., None])
        return grouped.view(shape)

    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        n, k = weight.shape
        # Squares in the search would overflow before `search.half` notices too large a scale.
        if bool((weight.abs() > _MAX_MAGNITUDE).any()):
            worst = weight.abs().max().item()
            raise ValueError(
                f"{self.name}: weight: expected magnitudes up to {_MAX_MAGNITUDE:g}, got {worst:g}"
            )
        importance = self._importance(params.get("importance"), weight)
        sigma2 = weight.square().mean(1, keepdim=True)
        per_row = k // self.block
        rows = max(1, _BLOCKS_AT_ONCE // per_row)
        out = []
        for begin in range(0, n, rows):
            part = weight[begin : begin + rows]
            count = part.shape[0]
            weights = (
                None if importance is None else importance.expand(count, k).reshape(-1, self.block)
            )
            block_sigma2 = sigma2[begin : begin + rows].expand(count, per_row).reshape(-1, 1)
            fields = self.encode(part.reshape(-1, self.block), weights, block_sigma2)
            fields |= self.code_fields(fields.pop("codes"))
            out.append(self.join(fields).view(count, -1))
        return {"data": torch.cat(out)}

    def _importance(self, given: Any, weight: Tensor) -> Tensor | None:
        """`given` as float32 on the weight's device; None if it is None or all zeros.

        Raises ValueError unless it has one finite number >= 0 for each input feature.
        """
        if given is None:
            return None
        where, k = f"{self.name}: importance", weight.shape[1]
        if (
            not isinstance(given, Tensor)
            or tuple(given.shape) != (k,)
            or not given.is_floating_point()
        ):
            got = (
                f"{given.dtype} {tuple(given.shape)}"
                if isinstance(given, Tensor)
                else type(given).__name__
            )
            raise ValueError(f"{where}: expected a floating tensor of shape ({k},), got {got}")
        given = given.to(weight.device, torch.float32)
        self.check_finite("importance", given, nonnegative=True)
        # All zeros (a layer that was never called) would leave nothing to minimize.
        return given if bool((given > 0).any()) else None

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return WEIGHT_ONLY

    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        decoder = "lut16" if self.table is not None else "signed" if self.signed else "unsigned"
        return WeightOnlyTraits(self.bits, decoder, self.scaler, self.group)

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        n, k = shape
        fields = self.split(tensors["data"])
        scaler = {
            self._scaler_name(f): _for_kernels(fields[f.name]).view(n, -1).T
            for f in self._scale_fields()
        }
        table = None
        if self.table is not None:
            table = torch.tensor(self.table, dtype=torch.float32, device=tensors["data"].device)
        return WeightOnlyParts(self.codes(fields).view(n, k), scaler, table=table)

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        blocks = shape[0] * (shape[1] // self.block)
        fields = self.code_fields(parts.codes.reshape(blocks, self.block))
        for field in self._scale_fields():
            stored = parts.scaler_tensors[self._scaler_name(field)]
            fields[field.name] = stored.T.reshape(blocks, field.items)
        return {"data": self.join(fields).view(shape[0], -1)}

    def _scaler_name(self, field: Field) -> str:
        """The kernels' name of a field of scales. A scaler with one tensor has its own name."""
        names = SCALES[self.scaler].tensors
        return names[0] if len(names) == 1 else field.name

    def _scale_fields(self) -> list[Field]:
        """The fields that are no planes of codes."""
        planes = {plane.field for plane in self.planes}
        return [field for field in self.fields if field.name not in planes]


def _for_kernels(field: Tensor) -> Tensor:
    """Scales as kernels take them: powers of two as bytes."""
    return field.view(torch.uint8) if field.dtype == torch.float8_e8m0fnu else field


def _view_as(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Some columns of bytes (B, bytes) as numbers (B, items), contiguous.

    They are cloned, because a slice of a single block counts as contiguous although its stride and
    offset may not fit the dtype.
    """
    return part.clone(memory_format=torch.contiguous_format).view(dtype)
