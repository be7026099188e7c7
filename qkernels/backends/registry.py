"""The one place that chooses a kernel: (format, parameters, shape, M, dtype, ...) -> Kernel.

Kernels register themselves here in order of preference. `select` takes the first one that is
available and accepts the problem; `explain` puts the same choice into words. backend="auto" first
asks the kernels themselves (`KernelBase.first`), and then which backend measured faster on this GPU
(backends/measured.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor

from . import measured
from .problem import Problem, environment

if TYPE_CHECKING:
    from ..weights.experts import PackedExperts
    from ..weights.packed import PackedWeight
    from .plan import Compiled, Plan

BACKENDS = ("auto", "reference", "triton", "cuda")
#: `KernelBase.layout` of a kernel that takes weights in every layout
ANY_LAYOUT = "any"


#: (x (M, K) contiguous, weight, bias (N) or None, problem) -> y (M, N) in x's dtype
Run: TypeAlias = "Callable[[Tensor, PackedWeight, Tensor | None, Problem], Tensor]"
#: (x (T, K) or (T, top_k, K), experts, ids (T, top_k), weights (T, top_k) or None, bias (E, N) or
#: None, problem) -> y (T, top_k, N) in x's dtype
RunExperts: TypeAlias = (
    "Callable[[Tensor, PackedExperts, Tensor, Tensor | None, Tensor | None, Problem], Tensor]"
)


class Bound(Protocol):
    """A `Kernel.run` for one weight and problem, which works out once what its calls share.

    All calls have a bias of one dtype, or none of them has a bias.
    """

    def __call__(
        self, x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem
    ) -> Tensor: ...

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """y (M, N) by the plan of an earlier call, without the weight; None if none fits these."""


class BoundExperts(Protocol):
    """An `ExpertsKernel.run` for given experts and problem."""

    def __call__(
        self,
        x: Tensor,
        experts: PackedExperts,
        ids: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor: ...

    def run(
        self, x: Tensor, ids: Tensor, weights: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """y (T, top_k, N) by the plan of an earlier call, without the experts; None if none fits
        these.
        """


class BoundLayer(Protocol):
    """An `ExpertsKernel.run_layer` for one layer, which works out once what its calls share."""

    def __call__(
        self, x: Tensor, gate_up: PackedExperts, down: PackedExperts, weights: Tensor, ids: Tensor
    ) -> Tensor: ...

    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor | None:
        """y (T, N) by the plan of an earlier call, without the experts; None if none fits these."""


@dataclass(frozen=True)
class KernelBase:
    """What the registry knows of every kernel: `Kernel` and `ExpertsKernel` add how it is called.

    Attributes:
        name: "backend.kernel", unique.
        backend: "reference", "triton" or "cuda".
        layout: the layout that the weight must be in, or ANY_LAYOUT.
        unavailable: () -> why this machine cannot run the kernel at all, or None.
        rejects: (problem) -> why the kernel does not take this problem, or None.
        run: the product; its operands are those of the subclass.
        automatic: (problem) -> why backend="auto" must not choose the kernel here, or None.
        configuration: (problem) -> words for `explain`: tile sizes, where they come from, and what
            the first call costs.
        first: (problem) -> why backend="auto" takes the kernel, if it can run, before kernels that
            were registered earlier or measured faster; or None.
    """

    name: str
    backend: str
    layout: str
    unavailable: Callable[[], str | None]
    rejects: Callable[[Problem], str | None]
    run: Callable[..., Tensor]
    automatic: Callable[[Problem], str | None] = lambda problem: None
    configuration: Callable[[Problem], str] = lambda problem: ""
    first: Callable[[Problem], str | None] = field(default=lambda problem: None, kw_only=True)


@dataclass(frozen=True)
class Kernel(KernelBase):
    """A kernel for one matrix: y = x @ W^T + bias.

    Attributes:
        run: (x (M, K) contiguous, weight, bias (N) or None, problem) -> y (M, N) in x's dtype.
        bind: (weight, problem) -> a faster `run` for this weight and problem, or None if the kernel
            has none. The weight is in `layout`, and its tensors stay in place.
        quantized: the two halves of `run`, if the kernel quantizes activations; else None.
    """

    run: Run
    bind: Callable[[PackedWeight, Problem], Bound | None] = lambda p, problem: None
    quantized: Quantized | None = None


@dataclass(frozen=True)
class ExpertsKernel(KernelBase):
    """A kernel for products of experts: row t of x times the matrix of expert ids[t, j].

    An id outside of 0..E-1 gives a row of zeros. Operands are contiguous.

    Attributes:
        run: (x, experts, ids (T, top_k), weights (T, top_k) or None, bias (E, N) or None, problem)
            -> y (T, top_k, N) in x's dtype. x is (T, K), or (T, top_k, K) with a row for each slot.
        bind: (problem) -> a faster `run` for given experts and operands of one shape. None if the
            kernel has none.
        run_layer: (x (T, K), gate_up, down, weights, ids, activation, (problem of gate_up, problem
            of down)) -> y (T, N of down) in x's dtype: a whole layer of experts, as
            `qkernels.fused_moe` defines it. None if the kernel has no such call.
        bind_layer: (activation, (problem of gate_up, problem of down)) -> a faster `run_layer` for
            one layer: (x, gate_up, down, weights, ids) -> y. None if the kernel has none.
    """

    run: RunExperts
    bind: Callable[[Problem], BoundExperts] | None = None
    run_layer: Callable[..., Tensor] | None = None
    bind_layer: Callable[[str, tuple[Problem, Problem]], BoundLayer] | None = None


@dataclass(frozen=True)
class Quantized:
    """The two halves of a kernel that quantizes activations, so that a norm can be fused with them.

    Both declare their launches in a plan.

    Attributes:
        quantize: (plan, x (M, K), weight, problem, up=, norm=, eps=, columns=) -> codes of x, of
            silu(x) * up or of RMSNorm(x). columns: the result of `columns` for all rows, if x is a
            slice of them.
        multiply: (plan, codes, weight, bias or None, problem, y (M, N)): the product, into y.
        columns: (plan, x, weight, problem, up=, norm=, eps=) -> the outlier columns of LLM.int8();
            None if a row's result does not depend on the other rows.
        compiled: (plan) -> the plan that runs.
        cast_bias: whether `multiply` takes the bias in x's dtype.
        tune: (x, weight, problem): tunes the product, if a call has to do it now.
    """

    quantize: Callable[..., Any]
    multiply: Callable[..., None]
    columns: Callable[..., Any]
    compiled: Callable[[Plan], Compiled]
    cast_bias: bool = False
    tune: Callable[[Tensor, PackedWeight, Problem], None] = lambda x, p, problem: None


_KERNELS: dict[str, KernelBase] = {}


def register(kernel: KernelBase) -> None:
    """Add a kernel after those registered so far. Raises ValueError if its name is taken."""
    if kernel.name in _KERNELS:
        raise ValueError(f"kernel {kernel.name!r} is registered already")
    _KERNELS[kernel.name] = kernel
    choose.cache_clear()


def kernels() -> list[Kernel]:
    """All registered kernels for one matrix, most preferred first."""
    return [kernel for kernel in _KERNELS.values() if isinstance(kernel, Kernel)]


def experts_kernels() -> list[ExpertsKernel]:
    """All registered kernels for products of experts, most preferred first."""
    return [kernel for kernel in _KERNELS.values() if isinstance(kernel, ExpertsKernel)]


def kernels_for(problem: Problem) -> list[KernelBase]:
    """The kernels that could run `problem`: those for experts, or those for one matrix."""
    return [*(experts_kernels() if problem.experts else kernels())]


def resolve_backend(backend: str) -> str:
    """`backend`, or QKERNELS_BACKEND if it is "auto". ValueError for an unknown name."""
    if backend == "auto":
        backend = environment("QKERNELS_BACKEND", "auto")
        where = "QKERNELS_BACKEND"
    else:
        where = "backend"
    if backend not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def select(problem: Problem, backend: str = "auto") -> Kernel:
    """The kernel for a product with one matrix. ValueError, with every reason, if there is none."""
    kernel = _select(problem, backend)
    assert isinstance(kernel, Kernel)
    return kernel


def select_experts(problem: Problem, backend: str = "auto") -> ExpertsKernel:
    """The kernel for a product of experts. ValueError, with every reason, if there is none."""
    kernel = _select(problem, backend)
    assert isinstance(kernel, ExpertsKernel)
    return kernel


def _select(problem: Problem, backend: str) -> KernelBase:
    kernel, rejected = choose(problem, resolve_backend(backend))
    if kernel is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in rejected) or "it has no kernels yet"
        dtype = str(problem.dtype).removeprefix("torch.")
        raise ValueError(
            f"backend: expected one that runs {problem.format} {problem.shape} with M={problem.m}, "
            f"{dtype} on {problem.device}; got {backend!r}: {reasons}"
        )
    return kernel


@lru_cache(maxsize=4096)
def choose(problem: Problem, backend: str) -> tuple[KernelBase | None, list[tuple[str, str]]]:
    """The kernel for `problem`, and (name, reason) of every kernel that was not chosen.

    If there is no kernel, the result is None, with the reasons of the kernels of `backend` alone.
    `backend` is resolved already, so the cached result depends on no environment variable. It does
    depend on the registered kernels and on what is compiled: tests that change them clear it.
    """
    chosen: KernelBase | None = None
    rejected: list[tuple[str, str]] = []
    candidates = kernels_for(problem)
    faster = measured.faster(problem) if backend == "auto" else None
    # Next come kernels of the faster backend; the sort keeps the order of registration otherwise.
    reasons = {kernel.name: backend == "auto" and kernel.first(problem) for kernel in candidates}
    candidates.sort(key=lambda kernel: (not reasons[kernel.name], kernel.backend != faster))
    for kernel in candidates:
        why = None
        if backend not in ("auto", kernel.backend):
            why = f"backend {backend!r} was asked for"
        why = why or kernel.unavailable() or kernel.rejects(problem)
        if why is None and backend == "auto":
            why = kernel.automatic(problem)
        if why is None and chosen is not None:
            why = f"{chosen.name} is preferred"
            if reasons[chosen.name] and kernel.backend != "reference":
                why += f": {reasons[chosen.name]}"
            elif chosen.backend == faster and kernel.backend not in (faster, "reference"):
                why = measured.words(chosen.backend)
        if why is None:
            chosen = kernel
        else:
            rejected.append((kernel.name, why))
    if chosen is None:
        rejected = [(name, why) for name, why in rejected if _KERNELS[name].backend == backend]
    return chosen, rejected
