"""The one place that chooses a kernel: (format, parameters, shape, M, dtype, device, ...) -> Kernel.

Kernels register themselves here in order of preference; `select` takes the first that is available and
does not reject the problem, and `explain` reports the same walk in words. backend="auto" first asks which
backend measured faster on such a GPU (backends/measured.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from . import formats, layouts, roofline
from .backends import measured

if TYPE_CHECKING:
    from .experts import PackedExperts
    from .packed import PackedWeight

BACKENDS = ("auto", "reference", "triton", "cuda")
ANY_LAYOUT = "any"


class Problem(NamedTuple):
    """One product to compute, hashable.

    params: sorted items of the format's parameters.
    batch_invariant: whether a row's result must be bitwise the same whatever M it is computed with.
    experts: 0 for one matrix; else how many of them there are, m rows each going through one (grouped.py).
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
    """A way to compute y = x @ W^T + bias, or with `grouped` that of rows with the expert each is sent to.

    name: "backend.kernel", unique.
    backend: "reference", "triton" or "cuda".
    layout: the layout its weight must be in; ANY_LAYOUT if it takes all.
    unavailable: why this machine cannot run it at all, or None.
    rejects: why it does not take this problem, or None.
    run: (x (M, K) contiguous, weight, bias (N) or None, problem) -> y (M, N) in x's dtype. With `grouped`
        what qkernels/grouped.py says.
    configuration: words for `explain`: tile sizes and where they come from, cost of the first call.
    automatic: whether backend="auto" may choose it for this problem's device.
    grouped: whether it takes problems with experts, instead of those without.
    fused, layer: with `grouped`, run a whole layer of experts; see qkernels/grouped.py.
    bind: a `run` for one weight and problem; None where there is no such thing. The weight is in `layout`
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
    """The halves of a kernel that quantizes activations, for what lies before it to be fused with them.

    quantize: (x (M, K), weight, problem, up=, norm=, eps=) -> codes, of x, silu(x) * up or RMSNorm of x. With
        columns=, where `columns` was asked before.
    multiply: (codes, weight, bias or None, problem, out=) -> y, into `out` (M, N) if it is given.
    scratch_bytes: (problem) -> memory a row of x takes meanwhile; 0 if rows cannot be taken by slices.
    columns: as `quantize`, of all rows before they are taken by slices -> what `quantize` must know of them, the
        outlier columns of LLM.int8(), or None.
    """

    quantize: Callable[..., Any]
    multiply: Callable[..., Tensor]
    scratch_bytes: Callable[[Problem], int]
    columns: Callable[..., Tensor | None] = lambda *args, **kwargs: None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is meant to be read."""

    problem: Problem
    kernel: str
    backend: str
    reason: str
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        n, k = self.problem.shape
        device = self.problem.device
        if self.problem.capability:
            device += f" sm_{self.problem.capability[0]}{self.problem.capability[1]}"
        experts = f"{self.problem.experts} experts of " if self.problem.experts else ""
        lines = [
            f"{experts}{self.problem.format} ({n}, {k}), M={self.problem.m}, "
            f"{str(self.problem.dtype).removeprefix('torch.')} on {device}: {self.kernel}",
            f"  {self.kernel}: {self.reason}",
        ]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.rejected])


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> None:
    """Add a kernel after those registered so far. Raises ValueError if its name is taken."""
    if kernel.name in _KERNELS:
        raise ValueError(f"kernel {kernel.name!r} is registered already")
    _KERNELS[kernel.name] = kernel
    _choose.cache_clear()


def kernels(*, grouped: bool = False) -> list[Kernel]:
    """All registered kernels for one matrix, or for experts, most preferred first."""
    return [kernel for kernel in _KERNELS.values() if kernel.grouped == grouped]


#: what os.environ wraps: a look-up in it costs a twentieth of one in os.environ, and every call makes two
_VARIABLES: Any = getattr(os.environ, "_data", os.environ)
_ENCODED: dict[str, Any] = {
    name: getattr(os.environ, "encodekey", str)(name)
    for name in ("QKERNELS_BACKEND", "QKERNELS_BATCH_INVARIANT")
}


def _environment(name: str, default: str) -> str:
    return os.environ[name] if _ENCODED[name] in _VARIABLES else default


def resolve_backend(backend: str) -> str:
    """Apply QKERNELS_BACKEND to "auto". ValueError for a name that is no backend."""
    if backend == "auto":
        backend = _environment("QKERNELS_BACKEND", "auto")
        where = "QKERNELS_BACKEND"
    else:
        where = "backend"
    if backend not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def resolve_batch_invariant(wanted: bool | None) -> bool:
    """`wanted`, or what QKERNELS_BATCH_INVARIANT says if it is None."""
    if wanted is not None:
        return bool(wanted)
    text = _environment("QKERNELS_BATCH_INVARIANT", "0")
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


def select(problem: Problem, backend: str = "auto") -> Kernel:
    """The kernel that runs `problem`. ValueError, with every reason, if `backend` has none for it."""
    kernel, rejected = _choose(problem, resolve_backend(backend))
    if kernel is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in rejected) or "it has no kernels yet"
        raise ValueError(
            f"backend: expected one that runs {problem.format} {problem.shape} with M={problem.m}, "
            f"{str(problem.dtype).removeprefix('torch.')} on {problem.device}; got {backend!r}: {reasons}"
        )
    return kernel


@lru_cache(maxsize=4096)
def _choose(problem: Problem, backend: str) -> tuple[Kernel | None, list[tuple[str, str]]]:
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


def explain(
    p: PackedWeight | PackedExperts,
    m: int = 1,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> Explanation:
    """Which kernel `matmul` runs for x of shape (m, K) and `dtype`, why, and why not the others.

    For experts it is `grouped_matmul` of m pairs of a token and an expert. `device` defaults to the
    weight's. Raises ValueError if `backend` has no kernel for it.
    """
    where = p.device if device is None else torch.device(device)
    problem = problem_of(p, m, dtype, where, batch_invariant)
    kernel = select(problem, backend)
    _, rejected = _choose(problem, resolve_backend(backend))
    if kernel.backend == "reference":
        reason = (
            "plain torch operations; dequantizes the whole weight into temporary memory at each call"
            if kernel.name.startswith("reference.")
            else "torch's own dense matmul"
        )
    else:
        reason = "fused: multiplies straight from the packed bytes"
        if kernel.layout != p.layout:
            reason += f"; the first call moves the weight to the {kernel.layout!r} layout, once"
        if configuration := kernel.configuration(problem):
            reason += f"\n  configuration: {configuration}"
    # which experts' bytes are read, only the data says
    if where.type == "cuda" and not problem.experts:
        reason += at_best(problem, p.nbytes, torch.cuda.get_device_name(where))
    return Explanation(problem, kernel.name, kernel.backend, reason, rejected)


def at_best(problem: Problem, nbytes: int, gpu_name: str) -> str:
    """A line with the least time the product could take on that GPU; nothing for a GPU not known."""
    gpu = roofline.find(gpu_name)
    if gpu is None:
        return ""
    kind = roofline.operands(problem.format, problem.shape, dict(problem.params))
    found = roofline.estimate(gpu, problem.shape, problem.m, nbytes, kind=kind)
    return f"\n  at best {found.seconds * 1e6:.1f} us on an {gpu.name}, limited by {found.limit}"


# ---------------------------------------------------------------------- kernels of plain torch
def _dense_rejects(problem: Problem) -> str | None:
    fmt = formats.get(problem.format)
    if not fmt.dense:
        return "for unquantized weights only"
    stored = {"fp16": torch.float16, "bf16": torch.bfloat16}[problem.format]
    if problem.dtype != stored:
        return f"x must have the weight's dtype {stored}, not {problem.dtype}"
    if problem.batch_invariant:
        return (
            "torch's matmul sums in an order that depends on M, and batch_invariant was asked for"
        )
    return None


def _run_dense(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    return torch.nn.functional.linear(
        x, p.storage["weight"], None if bias is None else bias.to(x.dtype)
    )


#: rows the reference computes at a time when it must not depend on M; a matmul of one shape sums in
#: one order, and 64 is a multiple of every BLAS's tile
_INVARIANT_ROWS = 64


def _run_reference(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    y = reference(x, p, problem.batch_invariant)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


def reference(x: Tensor, p: PackedWeight, batch_invariant: bool) -> Tensor:
    """x (M, K) @ W^T by the format's own reference, in the dtype it accumulates in."""
    fmt, tensors = formats.get(p.format), p.tensors
    if batch_invariant:
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % _INVARIANT_ROWS))
        chunks = padded.split(_INVARIANT_ROWS)
        return torch.cat([fmt.matmul(c, tensors, p.shape, p.params, True) for c in chunks])[
            : x.shape[0]
        ]
    return fmt.matmul(x, tensors, p.shape, p.params, False)


def _register_all() -> None:
    from .backends import cuda, triton

    triton.register_kernels()
    cuda.register_kernels()
    register(
        Kernel(
            "torch.linear",
            "reference",
            layouts.CHECKPOINT,
            lambda: None,
            _dense_rejects,
            _run_dense,
        )
    )
    register(
        Kernel(
            "reference.dequantize",
            "reference",
            ANY_LAYOUT,
            lambda: None,
            lambda p: None,
            _run_reference,
        )
    )


_register_all()
