"""The interface of a storage format: its parameters, its tensors, and the pure-torch reference.

A format is one class in one file of this folder. It declares the tensors it stores (`specs`).
Validation, error messages and file readers follow from that declaration, so a format never checks
shapes by hand. N = output features, K = input features, and every weight is (N, K).
"""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..tensors import check_strided
from .types import Params, Shape

if TYPE_CHECKING:
    from ..layouts.eight_bit import EightBitParts, EightBitTraits
    from ..layouts.weight_only import WeightOnlyParts, WeightOnlyTraits
    from .grid import Grid


#: Elements converted to float32 at a time while a tensor is checked, so that loading needs no copy
#: of the tensor. The CPU takes few, because glibc's heap may grow by one chunk for every tensor:
#: with chunks of 4 MB a file of 200 MB left 170 MB behind; with chunks of 128 kB a file of 100 MB
#: in 170 tensors still left 0 to 45 MB.
_CHECKED_AT_ONCE, _CHECKED_AT_ONCE_CPU = 1 << 20, 1 << 12

#: `quant_method` of our own config, which can hold any format: checkpoints/hf/quantization.py
OWN_METHOD = "qkernels"

#: The most numbers a valid tensor has: per weight (SpQR's smallest groups have four statistics
#: each), and in a table or a quant state.
_MAX_PER_WEIGHT, _MAX_TABLE = 8, 1 << 16

_FLOAT32_MAX = torch.finfo(torch.float32).max

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TensorSpec:
    """Dtypes and shape of one stored tensor. With `shape` None the format checks the shape."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...] | None
    required: bool = True

    def check(self, where: str, tensor: Any) -> None:
        """Raise ValueError, which starts with `where`, unless `tensor` has this dtype and shape."""
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: expected a torch.Tensor, got {type(tensor).__name__}")
        check_strided(where, tensor)
        expected = " or ".join(_dtype_name(d) for d in self.dtypes)
        if tensor.dtype not in self.dtypes:
            raise ValueError(f"{where}: expected dtype {expected}, got {_dtype_name(tensor.dtype)}")
        if self.shape is not None and tuple(tensor.shape) != self.shape:
            raise ValueError(f"{where}: expected shape {self.shape}, got {tuple(tensor.shape)}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Format(ABC):
    """One storage format. Instances are stateless; `qkernels.formats.get(name)` returns them."""

    name: ClassVar[str]
    #: parameter name -> default, for every parameter of the format
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: parameters that only `qkernels.quantize` takes (a calibrated input scale, say), because the
    #: result is stored in tensors
    quantize_only: ClassVar[Mapping[str, Any]] = {}
    #: names in qkernels.quantizers.algorithms that `quantize_model` can use with calibration data;
    #: the first is the default
    algorithms: ClassVar[tuple[str, ...]] = ()
    #: largest magnitude of a quantized activation, for formats with static activation scales
    activation_top: ClassVar[float] = 127.0
    #: K must be a multiple of this
    k_multiple: ClassVar[int] = 1
    #: one line for `qkernels info`
    summary: ClassVar[str] = ""

    # ------------------------------------------------------------------ parameters
    def resolve(self, shape: Shape, params: Mapping[str, Any]) -> Params:
        """All parameters: `params` with defaults filled in. ValueError naming a bad parameter."""
        unknown = sorted(set(params) - set(self.defaults))
        if unknown:
            allowed = ", ".join(self.defaults) or "none"
            raise ValueError(
                f"{self.name}: unknown parameter {unknown[0]!r}; expected one of: {allowed}"
            )
        self.check_shape(shape)
        resolved = {**self.defaults, **params}
        resolved = self.check_types(resolved)
        self.check_params(shape, resolved)
        return resolved

    def check_shape(self, shape: Shape) -> None:
        """Raise ValueError unless `shape` is (N, K) with sizes that kernels can count."""
        if len(shape) != 2 or not all(type(s) is int and 0 < s < 2**31 for s in shape):
            raise ValueError(
                f"{self.name}: shape: expected (N, K) with N, K >= 1, of 31 bits, "
                f"got {reprlib.repr(shape)}"
            )

    def check_sizes(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        """Raise ValueError for a tensor too large for a weight of this shape with any parameters.

        Callers use this before the parameters, and so the exact shapes, are known.
        """
        limit = _MAX_PER_WEIGHT * shape[0] * shape[1] + _MAX_TABLE
        for name, tensor in tensors.items():
            if tensor.numel() > limit:
                raise ValueError(
                    f"{self.name}: {name}: expected at most {limit} numbers for a weight of shape "
                    f"{shape}, got a tensor of shape {tuple(tensor.shape)}"
                )

    def check_types(self, params: Mapping[str, Any]) -> Params:
        """`params`, with an int converted to float where the default is a float.

        Parameters that the format does not have, or whose default is None, are not checked.

        Raises:
            ValueError: naming a parameter of another type than its default, or too large a number.
        """
        defaults = {**self.defaults, **self.quantize_only}
        return {key: self._checked(key, defaults.get(key), value) for key, value in params.items()}

    def _checked(self, key: str, default: Any, value: Any) -> Any:
        """`value`, as a float if the default is one.

        Raises ValueError unless `value` has the default's type and kernels can take it: an int of
        32 bits or a number of float32's range.
        """
        if isinstance(default, bool):
            ok, want = isinstance(value, bool), "a bool"
        elif isinstance(default, int):
            ok, want = isinstance(value, int) and not isinstance(value, bool), "an int"
            if ok and not -(2**31) <= value < 2**31:
                ok, want = False, "an int of 32 bits"
        elif isinstance(default, float):
            ok = (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and abs(value) <= _FLOAT32_MAX
            )
            value, want = float(value) if ok else value, "a finite number of float32"
        elif isinstance(default, str):
            ok, want = isinstance(value, str), "a string"
        else:
            return value
        if not ok:
            raise ValueError(f"{self.name}: {key}: expected {want}, got {reprlib.repr(value)}")
        return value

    def complete(self, shapes: Mapping[str, Shape], params: Mapping[str, Any]) -> Params:
        """`params` for quantizing weights of these shapes, by name, into this format.

        Where a default does not suit all weights, the result holds a value that does, and a warning
        says so. Nothing is checked here: `resolve` does that.
        """
        return dict(params)

    def check_params(self, shape: Shape, params: Params) -> None:
        """Check the values and that they fit the shape; the types are right already."""

    def expect(self, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
        """Raise ValueError naming parameter `key` unless `value` is one of `allowed`."""
        if value not in allowed:
            raise ValueError(f"{self.name}: {key}: expected one of {allowed}, got {value!r}")

    def format_from_names(self, names: Collection[str]) -> str:
        """Name of the format that a weight's tensor `names` imply; this format's if they do not."""
        return self.name

    def params_from_tensors(
        self, tensors: Mapping[str, Tensor], params: Mapping[str, Any]
    ) -> Params:
        """`params` plus the parameters that the tensors state (a bitsandbytes quant state, say).

        `qkernels.pack` calls this before `resolve`. Raises ValueError if a parameter is given and
        the tensors state another value.
        """
        return dict(params)

    # ------------------------------------------------------------------ tensors
    @abstractmethod
    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        """Name -> TensorSpec of every stored tensor, with the checkpoint's own names."""

    def validate(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        """Raise ValueError, naming the tensor, unless `tensors` are a valid packed weight."""
        specs = self.specs(shape, params)
        for name, spec in specs.items():
            if name in tensors:
                spec.check(f"{self.name}: {name}", tensors[name])
            elif spec.required:
                raise ValueError(
                    f"{self.name}: {name}: expected a tensor of shape {spec.shape}, got none; "
                    f"tensors given: {sorted(tensors)}"
                )
        extra = sorted(set(tensors) - set(specs))
        if extra:
            raise ValueError(
                f"{self.name}: {extra[0]}: unexpected tensor; expected {sorted(specs)}"
            )
        devices = {str(t.device) for t in tensors.values()}
        if len(devices) > 1:
            raise ValueError(f"{self.name}: tensors: expected one device, got {sorted(devices)}")
        if not any(t.is_meta for t in tensors.values()):
            self.check_values(tensors, shape, params)

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        """Check values (NaN scales, index ranges); dtypes and shapes have been checked before."""

    def check_finite(self, name: str, tensor: Tensor, *, nonnegative: bool = False) -> None:
        """Raise ValueError naming the tensor unless its values are finite, and >= 0 if asked."""
        count, value = 0, 0.0
        flat = tensor.reshape(-1)
        chunk = _CHECKED_AT_ONCE_CPU if flat.is_cpu else _CHECKED_AT_ONCE
        for part in flat.split(chunk) if len(flat) else ():
            values = part.float()
            low, high = (float(end) for end in values.aminmax())  # NaN if there is one
            if not math.isfinite(high - low) or (nonnegative and low < 0):
                bad = ~torch.isfinite(values)
                if nonnegative:
                    bad |= values < 0
                value = values[bad][0].item() if count == 0 else value
                count += int(bad.sum())
        if count:
            want = "finite values >= 0" if nonnegative else "finite values"
            raise ValueError(f"{self.name}: {name}: expected {want}, got {value} ({count} bad)")

    # ------------------------------------------------------------------ arithmetic
    @abstractmethod
    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        """Round-to-nearest: (N, K) float32 weight -> stored tensors."""

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        """Stored tensors -> (N, K) float32. Tests compare every kernel with this reference."""

    def from_grid(self, grid: Grid, params: Params) -> dict[str, Tensor]:
        """A weight on an integer grid (quantizers/gptq.py) -> stored tensors. Integer formats only.

        Raises ValueError if the format with these parameters cannot hold the grid.
        """
        raise NotImplementedError(f"{self.name} is no integer grid")

    def to_grid(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Grid | None:
        """The integer grid of the stored tensors, exactly; None if the format has no such grid."""
        return None

    def matmul(
        self,
        x: Tensor,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        params: Params,
        batch_invariant: bool = False,
    ) -> Tensor:
        """Reference product of x (M, K) with the (N, K) weight -> (M, N), before bias.

        Computes in float64 if x is float64, in float32 otherwise, and returns that dtype. Formats
        that quantize activations override this with their own arithmetic; with `batch_invariant` a
        row's result must not depend on the other rows there.
        """
        dtype = accumulate_dtype(x.dtype)
        return x.to(dtype) @ self.dequantize(tensors, shape, params).to(dtype).T

    # ------------------------------------------------------------------ tensor parallelism
    def cuts(self, shape: Shape, params: Params) -> Shape:
        """(rows, columns) at whose multiples the weight can be cut.

        Such a cut divides no group, block or packed word. (N, K) itself means the weight cannot be
        cut.
        """
        return 1, 1

    def cut(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        params: Params,
        dim: int,
        begin: int,
        end: int,
    ) -> tuple[dict[str, Tensor], Params]:
        """Tensors and parameters of rows (dim 0) or columns (dim 1) begin..end-1.

        `begin` and `end` are multiples of `cuts`. A tensor whose shape depends on the number of
        rows or columns is cut along that dimension; every other tensor is shared by all parts.
        Formats with another layout override this.
        """

        def specs_of(count: int) -> dict[str, TensorSpec]:
            return self.specs((count, shape[1]) if dim == 0 else (shape[0], count), params)

        whole, part = specs_of(shape[dim]), specs_of(end - begin)
        before = specs_of(begin) if begin else None
        cut_tensors = {}
        for name, tensor in tensors.items():
            if whole[name].shape != part[name].shape:
                full, sizes = whole[name].shape, part[name].shape
                assert full is not None
                assert sizes is not None
                axis = next(i for i in range(len(full)) if full[i] != sizes[i])
                start = 0
                if before is not None and (skipped := before[name].shape) is not None:
                    start = skipped[axis]
                tensor = tensor.narrow(axis, start, sizes[axis]).contiguous()
            cut_tensors[name] = tensor
        return cut_tensors, params

    def take_rows(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params, index: Tensor
    ) -> tuple[dict[str, Tensor], Params]:
        """Tensors and parameters of the rows in `index`, int64 (R), in its order.

        A format must override this if its tensors do not have rows as their first dimension.
        Otherwise it cannot be an embedding, and this raises ValueError.
        """
        n, k = shape
        whole, other = self.specs((n, k), params), self.specs((n + 1, k), params)
        taken = {}
        for name, tensor in tensors.items():
            full, more = whole[name].shape, other[name].shape
            if full != more:
                if (
                    full is None
                    or more is None
                    or (full[0], more[0], full[1:]) != (n, n + 1, more[1:])
                ):
                    raise ValueError(
                        f"{self.name}: {name}: expected a tensor that keeps rows apart, "
                        f"got shape {full}"
                    )
                tensor = tensor[index]
            taken[name] = tensor
        return taken, params

    # ------------------------------------------------------------------ kernel families
    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        """Code width, decoder, scaler and group size. Only in the weight-only family."""
        raise NotImplementedError(f"{self.name} is not in the weight-only kernel family")

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        """The parts that `qkernels.layouts` packs for weight-only kernels. Only in that family."""
        raise NotImplementedError(f"{self.name} is not in the weight-only kernel family")

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        """The inverse of `weight_only`, bit for bit."""
        raise NotImplementedError(f"{self.name} is not in the weight-only kernel family")

    def eight_bit_traits(self, shape: Shape, params: Params) -> EightBitTraits:
        """Kinds of codes and of scales. Only in the 8-bit family."""
        raise NotImplementedError(f"{self.name} is not in the 8-bit kernel family")

    def eight_bit(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> EightBitParts:
        """The parts that `qkernels.layouts` packs for 8-bit kernels. Only in that family."""
        raise NotImplementedError(f"{self.name} is not in the 8-bit kernel family")

    def from_eight_bit(
        self, parts: EightBitParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        """The inverse of `eight_bit`, bit for bit."""
        raise NotImplementedError(f"{self.name} is not in the 8-bit kernel family")

    def kernel_layout(self, params: Mapping[str, Any]) -> str | None:
        """The layout in `qkernels.layouts` that fused kernels take; None if no kernel fits."""
        return None

    def obstacle(self, shape: Shape, params: Params) -> str | None:
        """The reason why fused kernels cannot take a weight of this shape, or None."""
        return None

    #: whether the product is a plain dense matmul of a 16-bit weight
    dense: ClassVar[bool] = False

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any] | None:
        """`quantization_config` as the ecosystem writes it; None for unquantized weights.

        `skipped` are the linear modules left unquantized; each format knows the config key for
        them. Formats that the ecosystem never stores in a directory (GGUF's types) use our own
        config.
        """
        return {"quant_method": OWN_METHOD, "format": self.name, "params": dict(params)}

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        """Parameters if this `quantization_config` describes this format, else None."""
        return None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which references accumulate: float64 for float64 input, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_weight(where: str, weight: Any) -> None:
    """Raise ValueError unless `weight` is a finite, floating, non-empty (N, K) tensor."""
    if not isinstance(weight, Tensor):
        raise ValueError(f"{where}: expected a torch.Tensor, got {type(weight).__name__}")
    check_strided(where, weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"{where}: expected a non-empty (N, K) matrix, got shape {tuple(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise ValueError(f"{where}: expected a floating dtype, got {_dtype_name(weight.dtype)}")
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{where}: expected finite values, got {count} NaN or infinite")
