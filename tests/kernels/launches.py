"""Stand-ins for the Triton kernels: they record their launches and compute nothing."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
from torch import Tensor

#: every kernel that a product launches, with its module in triton_kernels/
KERNELS = (
    ("weight_only", "weight_only_gemm"),
    ("eight_bit", "eight_bit_gemm"),
    ("gather", "gather_columns"),
    ("kronecker", "kronecker_rows"),
    ("activations", "quantize_rows"),
    ("activations", "outlier_columns"),
    *(
        ("experts", name)
        for name in ("sort_slots", "experts_weight_only", "experts_eight_bit", "gate", "combine")
    ),
)


class Launches:
    """calls: (kernel, positional arguments, named arguments) of each launch."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        """Replaces the kernels by stand-ins until `patch` is undone."""
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for module, name in KERNELS:
            patch.setattr(f"qkernels.triton_kernels.{module}.{name}", _StandIn(name, self.calls))

    def products(self) -> int:
        """Launches of matrix products."""
        return sum(name.endswith("gemm") for name, _, _ in self.calls)

    def decisions(self, m: int) -> Hashable:
        """The launcher's decisions for M = m: kernels in order, and every argument that is neither
        a tensor nor m itself.

        Arguments without a name and parts of tuples count as m if they happen to equal m.
        """
        return tuple(
            (
                name,
                _decided(given, m),
                *(
                    (key, _decided(value, m if type(value) is tuple else None))
                    for key, value in sorted(named.items())
                    if key != "M"
                ),
            )
            for name, given, named in self.calls
        )


class _StandIn:
    def __init__(self, name: str, calls: list[Any]) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.calls.append((self.name, _noted(args), _noted(kwargs)))


def _noted(value: Any) -> Any:
    """`value` with each tensor replaced by its dtype, so that the record keeps no memory in use."""
    if isinstance(value, dict):
        return {key: _noted(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_noted, value))
    return str(value.dtype) if isinstance(value, Tensor) else value


def _decided(value: Any, m: int | None) -> Hashable:
    if isinstance(value, tuple):
        return tuple(_decided(v, m) for v in value)
    if type(value) is int and value == m:
        return "M"
    return value if isinstance(value, (int, float, str)) else str(getattr(value, "__name__", value))
