"""GGUF's block types: `data`, uint8 (N, bytes per row), exactly the bytes of the file.

A row is a run of blocks of 32 or 256 weights. A block is a run of fields: planes of codes, and
scales.

    q4_k, 144 bytes of 256 weights:  |d f16|dmin f16|scales: 12 bytes|qs: 128 bytes of nibbles|

A type declares its fields, how each plane cuts its bytes into codes, and what its scales mean;
reading, writing, checks and the kernels' layout follow from that. A plane of `bits` wide codes lies
in runs:

    `run` bytes hold 8/bits runs of `run` weights, one above the other:
    run=16, bits=4:  byte j = weight j in the low nibble, weight j+16 in the high one

    weight = scale[k // group] * value(code) - minus[k // group]

where value is the code less its middle (`centered`), a table's entry, or the code itself. Float32
results equal those of ggml and of the `gguf` package bit for bit.
Source: ggml's block structures (ggml-common.h) and the `gguf` package's quants.py, for the meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from ..base import Format, TensorSpec
from ..types import Params, Shape

Fields = dict[str, Tensor]

#: blocks quantized at a time: bounds the memory of the search
_CHUNK = 1 << 15
#: beyond what float16 scales reach in any type
_FARTHEST = 3e8


class Field(NamedTuple):
    """Part of a block: `items` numbers of `dtype`. Floats must be finite."""

    name: str
    dtype: torch.dtype
    items: int

    @property
    def nbytes(self) -> int:
        return self.items * self.dtype.itemsize


class Plane(NamedTuple):
    """`bits` bits of every code, from bit `shift` on, in the uint8 field of this name."""

    field: str
    bits: int
    run: int
    shift: int = 0


class GgufFormat(Format):
    """One block type. What differs between types is declared in `types.py`."""

    algorithms = ("imatrix",)
    quantize_only: ClassVar[Mapping[str, Any]] = {"importance": None}
    #: weights in a block
    block: ClassVar[int]
    fields: ClassVar[tuple[Field, ...]]
    planes: ClassVar[tuple[Plane, ...]]
    #: weights that share a scale
    group: ClassVar[int]
    #: name in triton_kernels/scalers.py
    scaler: ClassVar[str]
    #: whether a code's middle, 2^(bits-1), is taken off it
    centered: ClassVar[bool] = False
    #: codes are signed bytes; held as unsigned ones with the top bit flipped
    signed: ClassVar[bool] = False
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

    # ------------------------------------------------------------------ what a type has to say
    def scales(self, fields: Fields) -> tuple[Tensor, Tensor | None]:
        """Fields (B, items) -> (scale, minus or None), float32 (B, block / group)."""
        raise NotImplementedError

    def encode(self, x: Tensor, importance: Tensor | None, sigma2: Tensor) -> Fields:
        """Blocks (B, block) float32 -> the scales' fields, and "codes" uint8 (B, block).

        importance: (B, block) weights of the input features, or None. sigma2: (B, 1), the mean of
        the squares of each block's row of the matrix.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ checks
    def check_params(self, shape: Shape, params: Params) -> None:
        if shape[1] % self.block:
            raise ValueError(
                f"{self.name}: shape: expected input features a multiple of {self.block}, got {shape[1]}"
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
        at = 0
        for field in self.fields:
            if field.dtype.is_floating_point:
                part = _as(data[:, at : at + field.nbytes], field.dtype)
                self.check_finite(f"data: {field.name}", part)
            at += field.nbytes

    # ------------------------------------------------------------------ bytes
    def split(self, data: Tensor) -> Fields:
        """Bytes (..., multiple of block_bytes) -> each field (B, items), contiguous."""
        parts = data.reshape(-1, self.block_bytes).split([f.nbytes for f in self.fields], dim=1)
        return {f.name: _as(p, f.dtype) for f, p in zip(self.fields, parts, strict=True)}

    def join(self, fields: Fields) -> Tensor:
        """The inverse of `split`: (B, block_bytes)."""

        def octets(field: Tensor) -> Tensor:
            # By way of one dimension: a dimension of size 1 may have any stride and be called
            # contiguous.
            return field.contiguous().flatten().view(torch.uint8).view(field.shape[0], -1)

        return torch.cat([octets(fields[f.name]) for f in self.fields], dim=1)

    def codes(self, fields: Fields) -> Tensor:
        """uint8 (B, block)."""
        found: Tensor | None = None
        for plane in self.planes:
            raw = fields[plane.field].view(torch.uint8)
            part = raw
            if plane.bits < 8:
                runs = raw.view(raw.shape[0], -1, 1, plane.run)
                shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=raw.device)
                part = ((runs >> shifts[:, None]) & ((1 << plane.bits) - 1)).view(raw.shape[0], -1)
            part = part << plane.shift
            found = part if found is None else found | part
        assert found is not None
        return found ^ 128 if self.signed else found

    def code_fields(self, codes: Tensor) -> Fields:
        """The inverse of `codes`: every plane's field."""
        codes = codes ^ 128 if self.signed else codes
        fields = {}
        for plane in self.planes:
            part = (codes >> plane.shift) & ((1 << plane.bits) - 1)
            if plane.bits < 8:
                runs = part.view(codes.shape[0], -1, 8 // plane.bits, plane.run)
                packed = torch.zeros_like(runs[:, :, 0])
                for i in range(8 // plane.bits):
                    packed |= runs[:, :, i] << (i * plane.bits)
                part = packed.reshape(codes.shape[0], -1)
            dtype = next(f.dtype for f in self.fields if f.name == plane.field)
            fields[plane.field] = part.contiguous().view(dtype)
        return fields

    # ------------------------------------------------------------------ arithmetic
    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for before scaling, float32."""
        if self.table is not None:
            return torch.tensor(self.table, dtype=torch.float32, device=codes.device)[codes.int()]
        values = codes.float()
        return values - (1 << (self.bits - 1)) if self.centered else values

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        fields = self.split(tensors["data"])
        scale, minus = self.scales(fields)
        grouped = self.values(self.codes(fields)).view(scale.shape[0], -1, self.group)
        grouped = grouped.mul_(scale[..., None])
        if minus is not None:
            grouped = grouped.sub_(minus[..., None])
        return grouped.view(shape)

    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        n, k = weight.shape
        if bool((weight.abs() > _FARTHEST).any()):  # squares would overflow before a scale does
            worst = weight.abs().max().item()
            raise ValueError(
                f"{self.name}: weight: expected magnitudes up to {_FARTHEST:g}, got {worst:g}"
            )
        importance = self._importance(params.get("importance"), weight)
        sigma2 = weight.square().mean(1, keepdim=True)
        per_row = k // self.block
        rows = max(1, _CHUNK // per_row)
        out = []
        for begin in range(0, n, rows):
            part = weight[begin : begin + rows]
            count = part.shape[0]
            weights = (
                None if importance is None else importance.expand(count, k).reshape(-1, self.block)
            )
            spread = sigma2[begin : begin + rows].expand(count, per_row).reshape(-1, 1)
            fields = self.encode(part.reshape(-1, self.block), weights, spread)
            fields |= self.code_fields(fields.pop("codes"))
            out.append(self.join(fields).view(count, -1))
        return {"data": torch.cat(out)}

    def _importance(self, given: Any, weight: Tensor) -> Tensor | None:
        """ValueError unless `given` is None or one finite weight >= 0 for each input feature."""
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
        # All zeros (an input never seen) would leave nothing to minimize.
        return given if bool((given > 0).any()) else None

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return WEIGHT_ONLY

    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        decoder = "lut16" if self.table is not None else "signed" if self.centered else "unsigned"
        return WeightOnlyTraits(self.bits, decoder, self.scaler, self.group)

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        n, k = shape
        fields = self.split(tensors["data"])
        scaler = {self._scaler_name(f): fields[f.name].view(n, -1).T for f in self._scale_fields()}
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
        """What kernels call a field of scales."""
        return "absmax" if self.scaler == "scale" else field.name

    def _scale_fields(self) -> list[Field]:
        held = {plane.field for plane in self.planes}
        return [field for field in self.fields if field.name not in held]


def _as(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Some columns of bytes (B, bytes) as numbers (B, items), contiguous.

    Cloned: a cut of a single block counts as contiguous, with a stride and an offset that no number
    fits.
    """
    return part.clone(memory_format=torch.contiguous_format).view(dtype)
