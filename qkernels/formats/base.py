"""What a storage format is: its parameters, its tensors, and the pure-torch reference.

A format is one class in one file of this folder. It declares the tensors it stores (`specs`) and
from that declaration validation, error messages and file readers follow; it never checks shapes by
hand. N = output features, K = input features, and every weight is (N, K).
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


#: elements turned to float32 at a time while a tensor is checked, so that loading needs no copy of
#: it. On the CPU so
#: few, because glibc's heap may grow by as much for every tensor: with 4 MB a file of 200 MB left
#: 170 MB behind, with
#: 128 kB one of 100 MB in 170 tensors still 0 to 45 MB.
_CHECKED_AT_ONCE, _CHECKED_AT_ONCE_CPU = 1 << 20, 1 << 12

#: `quant_method` of the config that says any format: qkernels/checkpoints/hf/quantization.py
OWN_METHOD = "qkernels"

#: numbers of one tensor: a weight's (SpQR's smallest groups have four statistics each), a table's
#: or a quant state's
_MOST_A_WEIGHT, _MOST_A_TABLE = 8, 1 << 16

_FLOAT32_MAX = torch.finfo(torch.float32).max

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TensorSpec:
    """What one stored tensor must look like. `shape` None leaves the shape to the format."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...] | None
    required: bool = True

    def check(self, where: str, tensor: Any) -> None:
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
    #: parameter name -> default; the only parameters the format knows
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: what only `qkernels.quantize` takes (a calibrated input scale, say); stored as tensors
    quantize_only: ClassVar[Mapping[str, Any]] = {}
    #: what `quantize_model` can do with calibration data, names of qkernels.quantizers.algorithms;
    #: the
    #: first is the default
    algorithms: ClassVar[tuple[str, ...]] = ()
    #: largest magnitude of a quantized activation, for formats with static activation scales
    activation_top: ClassVar[float] = 127.0
    #: K must be a multiple of this
    k_multiple: ClassVar[int] = 1
    #: one line for `qkernels info`
    summary: ClassVar[str] = ""

    # ------------------------------------------------------------------ parameters
    def resolve(self, shape: Shape, params: Mapping[str, Any]) -> Params:
        """Fill in defaults and check every parameter. Raises ValueError naming the parameter."""
        unknown = sorted(set(params) - set(self.defaults))
        if unknown:
            known = ", ".join(self.defaults) or "none"
            raise ValueError(
                f"{self.name}: unknown parameter {unknown[0]!r}; expected one of: {known}"
            )
        self.check_shape(shape)
        resolved = {**self.defaults, **params}
        resolved = self.check_types(resolved)
        self.check_params(shape, resolved)
        return resolved

    def check_shape(self, shape: Shape) -> None:
        """ValueError unless it is (N, K) of sizes that kernels can count."""
        if len(shape) != 2 or not all(type(s) is int and 0 < s < 2**31 for s in shape):
            raise ValueError(
                f"{self.name}: shape: expected (N, K) with N, K >= 1, of 31 bits, got {reprlib.repr(shape)}"
            )

    def check_sizes(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        """ValueError for a tensor that no weight of this shape has, whatever the parameters.

        For what is read before parameters, and so the exact shapes, are known.
        """
        most = _MOST_A_WEIGHT * shape[0] * shape[1] + _MOST_A_TABLE
        for name, tensor in tensors.items():
            if tensor.numel() > most:
                raise ValueError(
                    f"{self.name}: {name}: expected at most {most} numbers for a weight of shape {shape}, got a tensor "
                    f"of shape {tuple(tensor.shape)}"
                )

    def check_types(self, params: Mapping[str, Any]) -> Params:
        """`params`, with ints for floats made floats. ValueError naming one of another type, or too
        large a number.

        Parameters that the format does not know, or that have no default, are not checked.
        """
        defaults = {**self.defaults, **self.quantize_only}
        return {key: self._checked(key, defaults.get(key), value) for key, value in params.items()}

    def _checked(self, key: str, default: Any, value: Any) -> Any:
        """`value`, a float if the default is one. ValueError unless it is of the default's type,
        and kernels can take it: ints of 32 bits and float32."""
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

        Where a default does not suit all of them, a value that does is given instead, with a
        warning that says so. Nothing is checked: `resolve` does that.
        """
        return dict(params)

    def check_params(self, shape: Shape, params: Params) -> None:
        """Check values and their fit to the shape; types are already right."""

    def expect(self, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
        if value not in allowed:
            raise ValueError(f"{self.name}: {key}: expected one of {allowed}, got {value!r}")

    def stated_by(self, names: Collection[str]) -> str:
        """The format that a weight's tensor names themselves state, if they do; this one otherwise."""
        return self.name

    def params_from_tensors(
        self, tensors: Mapping[str, Tensor], params: Mapping[str, Any]
    ) -> Params:
        """`params` plus those the tensors themselves state (a bitsandbytes quant state, say).

        Called by `qkernels.pack` before `resolve`. What is stated twice must agree: ValueError.
        """
        return dict(params)

    # ------------------------------------------------------------------ tensors
    @abstractmethod
    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        """Name -> TensorSpec of every tensor stored, in the checkpoint's own names."""

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
        """Value checks (NaN scales, index ranges); runs after dtypes and shapes are known right."""

    def check_finite(self, name: str, tensor: Tensor, *, nonnegative: bool = False) -> None:
        count, value = 0, 0.0
        flat = tensor.reshape(-1)
        for part in (
            flat.split(_CHECKED_AT_ONCE_CPU if flat.is_cpu else _CHECKED_AT_ONCE)
            if len(flat)
            else ()
        ):
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
        """Stored tensors -> (N, K) float32. This is the reference all kernels are held to."""

    def from_grid(self, grid: Grid, params: Params) -> dict[str, Tensor]:
        """A weight on an integer grid (quantizers/gptq.py) -> stored tensors. Integer formats only.

        Raises ValueError if the format with these parameters cannot hold the grid.
        """
        raise NotImplementedError(f"{self.name} is no integer grid")

    def to_grid(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Grid | None:
        """The integer grid that stored tensors lie on, exactly; None if the format is no such grid."""
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
        that quantize activations too override this with their own semantics; with `batch_invariant`
        those may not let a row's result depend on the other rows.
        """
        dtype = accumulate_dtype(x.dtype)
        return x.to(dtype) @ self.dequantize(tensors, shape, params).to(dtype).T

    # ------------------------------------------------------------------ tensor parallelism
    def cuts(self, shape: Shape, params: Params) -> Shape:
        """(rows, columns) whose multiples the weight can be cut at without cutting a group, a block
        or a packed word. As many as the weight has: not at all."""
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
        """Tensors and parameters of rows (dim 0) or columns (dim 1) begin..end-1, multiples of
        `cuts`.

        A dimension that is another for a part of the weight is cut in proportion; what all parts
        need is shared. Formats whose tensors lie otherwise override this.
        """

        def sizes(count: int) -> dict[str, TensorSpec]:
            return self.specs((count, shape[1]) if dim == 0 else (shape[0], count), params)

        whole, part = sizes(shape[dim]), sizes(end - begin)
        before = sizes(begin) if begin else None
        found = {}
        for name, tensor in tensors.items():
            if whole[name].shape != part[name].shape:
                full, wanted = whole[name].shape, part[name].shape
                assert full is not None
                assert wanted is not None
                axis = next(i for i in range(len(full)) if full[i] != wanted[i])
                start = 0
                if before is not None and (skipped := before[name].shape) is not None:
                    start = skipped[axis]
                tensor = tensor.narrow(axis, start, wanted[axis]).contiguous()
            found[name] = tensor
        return found, params

    def take_rows(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params, index: Tensor
    ) -> tuple[dict[str, Tensor], Params]:
        """Tensors and parameters of the rows that `index`, int64 (R), names, in its order.

        Formats whose rows lie otherwise than along their tensors' first dimension override this, or
        cannot be an embedding: ValueError.
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
                        f"{self.name}: {name}: expected a tensor that keeps rows apart, got shape {full}"
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
        """The weight as `qkernels.layouts` packs it for those kernels. Only in the weight-only
        family.
        """
        raise NotImplementedError(f"{self.name} is not in the weight-only kernel family")

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        """The inverse of `weight_only`, bit for bit."""
        raise NotImplementedError(f"{self.name} is not in the weight-only kernel family")

    def eight_bit_traits(self, shape: Shape, params: Params) -> EightBitTraits:
        """Kinds of codes and scales. Only in the 8-bit family."""
        raise NotImplementedError(f"{self.name} is not in the 8-bit kernel family")

    def eight_bit(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> EightBitParts:
        """The weight as `qkernels.layouts` packs it for those kernels. Only in the 8-bit family."""
        raise NotImplementedError(f"{self.name} is not in the 8-bit kernel family")

    def from_eight_bit(
        self, parts: EightBitParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        """The inverse of `eight_bit`, bit for bit."""
        raise NotImplementedError(f"{self.name} is not in the 8-bit kernel family")

    def kernel_layout(self, params: Mapping[str, Any]) -> str | None:
        """The layout of `qkernels.layouts` that fused kernels take, or None if there are none."""
        return None

    def obstacle(self, shape: Shape, params: Params) -> str | None:
        """What keeps fused kernels from a weight of this shape, or None."""
        return None

    #: whether the product is a plain dense matmul of a 16-bit weight
    dense: ClassVar[bool] = False

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any] | None:
        """`quantization_config` as the ecosystem writes it; None for plain weights.

        `skipped` are the linear modules left unquantized; each format knows the key they go under.
        Formats that the ecosystem keeps in no directory (GGUF's types) go by our own config.
        """
        return {"quant_method": OWN_METHOD, "format": self.name, "params": dict(params)}

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        """Parameters if this `quantization_config` is this format's, else None."""
        return None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype references accumulate in: float64 for float64 input, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_weight(where: str, weight: Any) -> None:
    """ValueError unless `weight` is a finite, floating, non-empty (N, K) tensor."""
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
