"""One product to compute, as kernels are chosen by it, and the variables that change the choice."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from ..weights.experts import PackedExperts
    from ..weights.packed import PackedWeight


class Problem(NamedTuple):
    """One product to compute, hashable.

    params: sorted items of the format's parameters. batch_invariant: whether a row's result must be
    bitwise the same whatever M it is computed with. experts: 0 for one matrix; else how many of
    them there are, m rows each going through one (ops/moe.py).
    """

    format: str
    params: tuple[tuple[str, Any], ...]
    shape: tuple[int, int]
    m: int
    dtype: torch.dtype
    device: str
    capability: tuple[int, int] | None
    batch_invariant: bool = False
    experts: int = 0


#: what os.environ wraps: a look-up in it costs a twentieth of one in os.environ, and every call
#: makes two
_VARIABLES: Any = getattr(os.environ, "_data", os.environ)


_ENCODED: dict[str, Any] = {
    name: getattr(os.environ, "encodekey", str)(name)
    for name in ("QKERNELS_BACKEND", "QKERNELS_BATCH_INVARIANT")
}


def environment(name: str, default: str) -> str:
    return os.environ[name] if _ENCODED[name] in _VARIABLES else default


def resolve_batch_invariant(wanted: bool | None) -> bool:
    """`wanted`, or what QKERNELS_BATCH_INVARIANT says if it is None."""
    if wanted is not None:
        return bool(wanted)
    text = environment("QKERNELS_BATCH_INVARIANT", "0")
    if text not in ("0", "1"):
        raise ValueError(f"QKERNELS_BATCH_INVARIANT: expected 0 or 1, got {text!r}")
    return text == "1"


def problem_of(
    p: PackedWeight | PackedExperts,
    m: int,
    dtype: torch.dtype,
    device: torch.device,
    batch_invariant: bool | None = None,
) -> Problem:
    params = tuple(sorted(p.params.items()))
    invariant = resolve_batch_invariant(batch_invariant)
    return Problem(
        p.format, params, p.shape, m, dtype, device.type, _capability(device), invariant, p.count
    )


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
