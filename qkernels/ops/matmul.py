"""`qkernels.matmul`: eager calls, and the operators that autograd and torch.compile see.

Two ways lead to a kernel. Both select it once, at the first call with operands of certain shapes,
and keep the result as a plan:

    eager      qkernels.matmul(x, p, bias) calls the kernel itself. The plan is in `p.plans`.
    operator   torch.ops.qkernels.matmul(x, storage, bias, spec, backend, batch_invariant) is for
               calls that autograd, torch.compile or a FakeTensor must see. It takes the weight as
               its tensors and `spec`, a JSON string with everything that is not a tensor, so that a
               graph holds no Python objects. The plan is in ops/operator_plans.py.
"""

from __future__ import annotations

import json
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import layouts
from ..backends import registry
from ..backends.problem import Problem, problem_of, resolve_batch_invariant
from ..tensors import check_strided
from ..weights.packed import PackedWeight, Snapshot
from . import operator_plans

_LIB = torch.library.Library("qkernels", "DEF")
_LIB.define(
    "matmul(Tensor x, Tensor[] storage, Tensor? bias, str spec, str backend, "
    "bool batch_invariant) -> Tensor"
)
_LIB.define("grad_input(Tensor grad, Tensor[] storage, str spec) -> Tensor")

X_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---------------------------------------------------------------------- eager calls
def matmul(
    x: Tensor,
    p: PackedWeight,
    bias: Tensor | None = None,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> Tensor:
    """y = x @ W^T + bias for a packed weight W of shape (N, K).

    Args:
        x: (..., K), float16, bfloat16, float32 or float64, on the weight's device; M may be 0.
        p: the packed weight. A fused backend moves it, once and in place, to its kernel layout.
        bias: (N), any float dtype; added before the result is rounded to x's dtype.
        backend: "auto", "reference", "triton" or "cuda"; "auto" follows QKERNELS_BACKEND if set.
        batch_invariant: whether each row of x has bitwise the same result whatever M it comes with.
            None follows QKERNELS_BATCH_INVARIANT (0 or 1, default 0). Results never vary from one
            execution to the next.

    Returns:
        (..., N) in x's dtype. Differentiable in x and bias.

        An infinity or NaN in a row of x stays in that row of y. It gives the same infinities there
        as the dequantized weight in x's dtype, and NaN for 0 * inf and inf - inf. Exceptions:

        - y may be NaN instead of an infinity where the kernel multiplies a part of the weight by
          itself: the minima of GGUF's q4_1, q5_1, q2_k, q4_k and q5_k and of SpQR, SpQR's sparse
          weights, and zero points with up to 8 rows. The CUDA kernel for up to 16 rows, which
          takes any number with `batch_invariant`, also does so with a constant that it adds to
          integer codes.
        - No number of the row stays finite in QuIP and QuIP#, which mix all of x, and where rows of
          x are quantized to 8 bits by their own maximum.
        - A static input scale saturates instead, and has no code for NaN.
        - In LLM.int8() without `batch_invariant` an infinity is an outlier, and its column is
          multiplied in 16 bits for all rows.

    Raises:
        ValueError: naming the argument, what was expected and what came; or why `backend` cannot.
    """
    if needs_operator(x, bias):
        check_operands(x, p.shape, p.device, bias)
        invariant = resolve_batch_invariant(batch_invariant)
        prepack_for(p, x, backend, invariant)
        snapshot = p.snapshot
        storage = list(snapshot.storage.values())
        return call_operator(x, storage, bias, spec_of(p, snapshot), backend, p.shape, invariant)
    backend = registry.resolve_backend(backend)
    invariant = resolve_batch_invariant(batch_invariant)
    try:
        operand = None if bias is None else (bias.shape, bias.dtype, bias.device, bias.layout)
        key = (x.shape, x.dtype, x.device, x.layout, operand, backend, invariant)
    except RuntimeError:  # a nested tensor has no shape
        check_operands(x, p.shape, p.device, bias)
        raise
    plan = p.plans.get(key) or _new_plan(key, x, p, bias, backend, invariant)
    flat = x if x.dim() == 2 else x.reshape(-1, p.shape[1])
    y = plan.run(flat.contiguous(), p, bias, plan.problem)
    return y if x.dim() == 2 else y.reshape(plan.y_shape)


class _Plan(NamedTuple):
    """What an eager call needs to know of its operands' shapes, dtypes and devices.

    Attributes:
        run: the kernel's `bind` for this weight and problem, or its `run`.
        problem: the product.
        y_shape: shape of the result.
    """

    run: registry.Run
    problem: Problem
    y_shape: tuple[int, ...]


def _new_plan(
    key: Any, x: Tensor, p: PackedWeight, bias: Tensor | None, backend: str, batch_invariant: bool
) -> _Plan:
    """Check the operands, select the kernel, prepack the weight, and keep the plan in `p.plans`."""
    check_operands(x, p.shape, p.device, bias)
    m = x.numel() // p.shape[1]
    problem = problem_of(p, m, x.dtype, x.device, batch_invariant)
    kernel = registry.select(problem, backend)
    _warn_if_unfused(kernel, problem, backend)
    prepack_to(p, kernel)
    run = (kernel.bind(p, problem) or kernel.run) if m else _empty
    plan = _Plan(run, problem, (*x.shape[:-1], p.shape[0]))
    operator_plans.add(p.plans, key, plan)
    return plan


def _empty(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    """y of an x without rows."""
    return x.new_empty(0, p.shape[0])


def needs_operator(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the call must be an operator, because a part of torch must see it.

    That is a compiler, a mode, a tensor subclass, autograd or vmap; and torch itself must see
    tensors whose numbers are not in memory as they are read: on the meta device, or negated. All
    other calls go to the kernel directly, which costs the host a fifth of an operator's call.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or not (bias is None or isinstance(bias, Tensor))
        or (
            torch.is_grad_enabled()
            and (x.requires_grad or (bias is not None and bias.requires_grad))
        )
        or x.is_meta
        or x.is_neg()
        or (bias is not None and bias.is_neg())
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def prepack_for(p: PackedWeight, x: Tensor, backend: str, batch_invariant: bool) -> None:
    """Move `p` to the layout that the kernel for `x` takes, unless a graph is being traced."""
    if torch.compiler.is_compiling():
        return
    problem = problem_of(p, x.numel() // p.shape[1], x.dtype, x.device, batch_invariant)
    prepack_to(p, registry.select(problem, backend))


def prepack_to(p: PackedWeight, kernel: registry.Kernel) -> None:
    """Move `p` to the layout that `kernel` takes."""
    if kernel.layout not in (registry.ANY_LAYOUT, p.layout, layouts.CHECKPOINT):
        p.prepack_(kernel.layout)


def _warn_if_unfused(kernel: registry.Kernel, problem: Problem, backend: str) -> None:
    """Warn where backend="auto" finds no fused kernel on a GPU. `backend` is resolved already."""
    if backend == "auto" and problem.device == "cuda" and kernel.name == "reference.dequantize":
        why = "; ".join(f"{n}: {w}" for n, w in registry.choose(problem, "auto")[1])
        warnings.warn(
            f"qkernels: {problem.format} {problem.shape} runs unfused on the GPU "
            f"(whole weight dequantized at each call): {why}",
            stacklevel=2,
        )


# ---------------------------------------------------------------------- operators
def spec_of(p: PackedWeight, snapshot: Snapshot | None = None) -> str:
    """Everything but the tensors of `p`, or of an earlier `snapshot` of it, as JSON.

    It lists the tensors' names in the order of `storage`.
    """
    layout, storage = snapshot or p.snapshot
    return json.dumps(
        {
            "format": p.format,
            "shape": p.shape,
            "params": p.params,
            "layout": layout,
            "names": list(storage),
        },
        sort_keys=True,
    )


@lru_cache(maxsize=4096)
def _parse(spec: str) -> tuple[str, tuple[int, int], tuple[str, ...], dict[str, Any], str]:
    """Format, shape, names, parameters and layout of `spec_of`."""
    d = json.loads(spec)
    return d["format"], tuple(d["shape"]), tuple(d["names"]), d["params"], d["layout"]


def _weight(storage: list[Tensor], spec: str) -> PackedWeight:
    format, shape, names, params, layout = _parse(spec)
    return PackedWeight(format, shape, dict(zip(names, storage, strict=True)), params, layout)


def call_operator(
    x: Tensor,
    storage: list[Tensor],
    bias: Tensor | None,
    spec: str,
    backend: str,
    shape: tuple[int, int],
    batch_invariant: bool,
) -> Tensor:
    """The operator on x (..., K). The operands are checked already."""
    y = torch.ops.qkernels.matmul(
        x.reshape(-1, shape[1]), storage, bias, spec, backend, batch_invariant
    )
    return y.reshape(*x.shape[:-1], shape[0])


class _OperatorPlan(NamedTuple):
    """What an operator's call needs to know; it holds nothing that keeps the weight alive.

    Attributes:
        run: the kernel's `run`.
        problem: the product.
        bound: the kernel's `bind` for the weight; None if it has none.
    """

    run: registry.Run
    problem: Problem
    bound: registry.Bound | None


def _matmul_impl(
    x: Tensor,
    storage: list[Tensor],
    bias: Tensor | None,
    spec: str,
    backend: str,
    batch_invariant: bool,
) -> Tensor:
    backend = registry.resolve_backend(backend)
    bias_dtype = None if bias is None else bias.dtype
    key = (spec, x.shape[0], x.dtype, x.device, bias_dtype, backend, batch_invariant)
    plan: _OperatorPlan | None = operator_plans.find(storage, key)
    x = x.contiguous()
    if plan is not None and plan.bound is not None:
        y = plan.bound.run(x, bias)
        if y is not None:
            return y
    p = _weight(storage, spec)
    plan = plan or _new_operator_plan(key, x, p, storage, backend, batch_invariant)
    if x.shape[0] == 0:
        return x.new_empty(0, p.shape[0])
    return (plan.bound or plan.run)(x, p, bias, plan.problem)


def _new_operator_plan(
    key: Any, x: Tensor, p: PackedWeight, storage: list[Tensor], backend: str, batch_invariant: bool
) -> _OperatorPlan:
    """Select the kernel, and keep the plan if the weight `p` holds the tensors of `storage`."""
    problem = problem_of(p, x.shape[0], x.dtype, x.device, batch_invariant)
    kernel = registry.select(problem, backend)
    _warn_if_unfused(kernel, problem, backend)
    if kernel.layout not in (registry.ANY_LAYOUT, p.layout):
        # Only a traced call gets here: an eager call prepacks the weight itself, once.
        warnings.warn(
            f"qkernels: {p.format} {p.shape} is repacked at every call; "
            "call .prepack() before compiling",
            stacklevel=2,
        )
        p.prepack_(kernel.layout)
        return _OperatorPlan(kernel.run, problem, None)
    if not operator_plans.holds(p.storage, storage):
        return _OperatorPlan(kernel.run, problem, None)
    plan = _OperatorPlan(kernel.run, problem, kernel.bind(p, problem) if x.shape[0] else None)
    operator_plans.remember(storage, key, plan)
    return plan


def _matmul_fake(
    x: Tensor,
    storage: list[Tensor],
    bias: Tensor | None,
    spec: str,
    backend: str,
    batch_invariant: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], _parse(spec)[1][0])


def _grad_input_impl(grad: Tensor, storage: list[Tensor], spec: str) -> Tensor:
    p = _weight(storage, spec)
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return (grad.to(dtype) @ p.dequantize(dtype)).to(grad.dtype)


def _grad_input_fake(grad: Tensor, storage: list[Tensor], spec: str) -> Tensor:
    return grad.new_empty(grad.shape[0], _parse(spec)[1][1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, storage, bias, spec, _, _ = inputs
    ctx.save_for_backward(*storage)
    ctx.spec = spec
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    storage = list(ctx.saved_tensors)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qkernels.grad_input(grad.contiguous(), storage, ctx.spec)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0).to(ctx.bias_dtype)
    return grad_x, [None] * len(storage), grad_bias, None, None, None


for _device in ("CPU", "CUDA"):
    _LIB.impl("matmul", _matmul_impl, _device)
    _LIB.impl("grad_input", _grad_input_impl, _device)
torch.library.register_fake("qkernels::matmul", _matmul_fake, lib=_LIB)
torch.library.register_fake("qkernels::grad_input", _grad_input_fake, lib=_LIB)
torch.library.register_autograd(
    "qkernels::matmul", _backward, setup_context=_setup_context, lib=_LIB
)


# ---------------------------------------------------------------------- operand checks
def check_operands(
    x: Tensor, shape: tuple[int, int], device: torch.device, bias: Tensor | None
) -> None:
    """ValueError unless x (..., K) and bias (N) fit a weight of `shape` on `device`."""
    n, k = shape
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    check_strided("x", x)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x: expected shape (..., {k}) for a weight of shape ({n}, {k}), got {tuple(x.shape)}"
        )
    if x.dtype not in X_DTYPES:
        raise ValueError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"x: expected device {device}, the weight's, got {x.device}")
    if bias is None:
        return
    check_bias(bias, n)
    if bias.device != device:
        raise ValueError(f"bias: expected device {device}, the weight's, got {bias.device}")


def check_bias(bias: Any, n: int) -> None:
    """ValueError unless it is a dense floating tensor (n)."""
    if isinstance(bias, Tensor):
        check_strided("bias", bias)
    if not isinstance(bias, Tensor) or tuple(bias.shape) != (n,) or not bias.is_floating_point():
        got = (
            f"{bias.dtype} {tuple(bias.shape)}" if isinstance(bias, Tensor) else type(bias).__name__
        )
        raise ValueError(f"bias: expected a floating tensor of shape ({n},), got {got}")
