"""One product to compute, by which a kernel is chosen, and the variables that change the choice."""

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

    Attributes:
        format: the weight's format.
        params: the format's parameters, sorted items.
        shape: (N, K) of the weight, or of each expert.
        m: rows of x; for experts the number of pairs (token, expert), each one row.
        dtype: of x.
        device: "cpu", "cuda", ...
        capability: the GPU's compute capability, (9, 0) for an H100; None without a GPU.
        batch_invariant: whether a row's result must be bitwise the same whatever M it comes with.
        experts: the number of experts; 0 for one matrix.
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


#: the dict inside os.environ: a look-up in it takes a twentieth of the time of one in os.environ,
#: and every call makes two
_VARIABLES: Any = getattr(os.environ, "_data", os.environ)


_ENCODED: dict[str, Any] = {
    name: getattr(os.environ, "encodekey", str)(name)
    for name in ("QKERNELS_BACKEND", "QKERNELS_BATCH_INVARIANT")
}


def environment(name: str, default: str) -> str:
    """The environment variable `name`, one of _ENCODED; `default` if it is not set."""
    return os.environ[name] if _ENCODED[name] in _VARIABLES else default


def resolve_batch_invariant(batch_invariant: bool | None) -> bool:
    """`batch_invariant`, or the value of QKERNELS_BATCH_INVARIANT if it is None."""
    if batch_invariant is not None:
        return bool(batch_invariant)
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
    """The product of m rows of `dtype` on `device` with the weight or the experts `p`."""
    params = tuple(sorted(p.params.items()))
    invariant = resolve_batch_invariant(batch_invariant)
    return Problem(
        p.format, params, p.shape, m, dtype, device.type, _capability(device), invariant, p.count
    )


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
