"""The one place that chooses a kernel: (format, parameters, shape, M, dtype, device, ...) ->
Kernel.

Kernels register themselves here in order of preference; `select` takes the first that is available
and does not reject the problem, and `explain` reports the same walk in words. backend="auto" first
asks which backend measured faster on such a GPU (backends/measured.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor

from . import measured
from .problem import Problem, environment

if TYPE_CHECKING:
    from ..weights.packed import PackedWeight

BACKENDS = ("auto", "reference", "triton", "cuda")
ANY_LAYOUT = "any"


#: (x (M, K) contiguous, weight, bias (N) or None, problem) -> y (M, N) in x's dtype
Run: TypeAlias = "Callable[[Tensor, PackedWeight, Tensor | None, Problem], Tensor]"


class Bound(Protocol):
    """A `run` for one weight and problem, which finds out once what every such call has in common."""

    def __call__(
        self, x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem
    ) -> Tensor: ...

    def replay(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The same from what was found out, without the weight; None if that is not all known yet."""


@dataclass(frozen=True)
class Kernel:
    """A way to compute y = x @ W^T + bias, or with `grouped` that of rows with the expert each is
    sent to.

    name: "backend.kernel", unique. backend: "reference", "triton" or "cuda". layout: the layout its
    weight must be in; ANY_LAYOUT if it takes all. unavailable: why this machine cannot run it at
    all, or None. rejects: why it does not take this problem, or None. run: (x (M, K) contiguous,
    weight, bias (N) or None, problem) -> y (M, N) in x's dtype. With `grouped`
        what qkernels/ops/moe.py says.
    configuration: words for `explain`: tile sizes and where they come from, cost of the first call.
    automatic: whether backend="auto" may choose it for this problem's device. grouped: whether it
    takes problems with experts, instead of those without. fused, layer: with `grouped`, run a whole
    layer of experts; see qkernels/ops/moe.py. bind: a `run` for one weight and problem; None where
    there is no such thing. The weight is in `layout`
        and its tensors stay.
    quantized: for kernels that multiply codes of activations: the two halves of `run`; else None.
    """

    name: str
    backend: str
    layout: str
    unavailable: Callable[[], str | None]
    rejects: Callable[[Problem], str | None]
    run: Callable[..., Tensor]
    automatic: Callable[[Problem], str | None] = lambda problem: None
    configuration: Callable[[Problem], str] = lambda problem: ""
    grouped: bool = False
    fused: Callable[..., Tensor] | None = None
    layer: Callable[..., Any] | None = None
    bind: Callable[[PackedWeight, Problem], Bound | None] = lambda p, problem: None
    quantized: Quantized | None = None


@dataclass(frozen=True)
class Quantized:
    """The halves of a kernel that quantizes activations, for what lies before it to be fused with
    them.

    quantize: (x (M, K), weight, problem, up=, norm=, eps=) -> codes, of x, silu(x) * up or RMSNorm
    of x. With
        columns=, where `columns` was asked before.
    multiply: (codes, weight, bias or None, problem, out=) -> y, into `out` (M, N) if it is given.
    scratch_bytes: (problem) -> memory a row of x takes meanwhile; 0 if rows cannot be taken by
    slices. columns: as `quantize`, of all rows before they are taken by slices -> what `quantize`
    must know of them, the
        outlier columns of LLM.int8(), or None.
    """

    quantize: Callable[..., Any]
    multiply: Callable[..., Tensor]
    scratch_bytes: Callable[[Problem], int]
    columns: Callable[..., Tensor | None] = lambda *args, **kwargs: None


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> None:
    """Add a kernel after those registered so far. Raises ValueError if its name is taken."""
    if kernel.name in _KERNELS:
        raise ValueError(f"kernel {kernel.name!r} is registered already")
    _KERNELS[kernel.name] = kernel
    choose.cache_clear()


def kernels(*, grouped: bool = False) -> list[Kernel]:
    """All registered kernels for one matrix, or for experts, most preferred first."""
    return [kernel for kernel in _KERNELS.values() if kernel.grouped == grouped]


def resolve_backend(backend: str) -> str:
    """Apply QKERNELS_BACKEND to "auto". ValueError for a name that is no backend."""
    if backend == "auto":
        backend = environment("QKERNELS_BACKEND", "auto")
        where = "QKERNELS_BACKEND"
    else:
        where = "backend"
    if backend not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def select(problem: Problem, backend: str = "auto") -> Kernel:
    """The kernel that runs `problem`. ValueError, with every reason, if `backend` has none for it."""
    kernel, rejected = choose(problem, resolve_backend(backend))
    if kernel is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in rejected) or "it has no kernels yet"
        raise ValueError(
            f"backend: expected one that runs {problem.format} {problem.shape} with M={problem.m}, "
            f"{str(problem.dtype).removeprefix('torch.')} on {problem.device}; got {backend!r}: {reasons}"
        )
    return kernel


@lru_cache(maxsize=4096)
def choose(problem: Problem, backend: str) -> tuple[Kernel | None, list[tuple[str, str]]]:
    chosen: Kernel | None = None
    rejected: list[tuple[str, str]] = []
    candidates = kernels(grouped=problem.experts > 0)
    faster = measured.faster(problem) if backend == "auto" else None
    # in order of registration otherwise
    candidates.sort(key=lambda kernel: kernel.backend != faster)
    for kernel in candidates:
        why = None
        if backend not in ("auto", kernel.backend):
            why = f"backend {backend!r} was asked for"
        why = why or kernel.unavailable() or kernel.rejects(problem)
        if why is None and backend == "auto":
            why = kernel.automatic(problem)
        if why is None and chosen is not None:
            why = f"{chosen.name} is preferred"
            if chosen.backend == faster and kernel.backend not in (faster, "reference"):
                why = measured.words(chosen.backend)
        if why is None:
            chosen = kernel
        else:
            rejected.append((kernel.name, why))
    if chosen is None:
        rejected = [(n, w) for n, w in rejected if _KERNELS[n].backend == backend]
    return chosen, rejected


# ---------------------------------------------------------------------- kernels of plain torch
