"""torch.library operators: what torch.compile, FakeTensor and autograd see of qkernels.

`qkernels::matmul(x, storage, bias, spec, backend, batch_invariant)` takes the weight as its tensors
plus `spec`, a JSON string with everything that is not a tensor, so that a graph holds no Python
objects.
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import layouts
from ..backends import registry
from ..backends.problem import Problem, problem_of, resolve_batch_invariant
from ..tensors import check_strided
from ..weights.packed import PackedWeight, Snapshot

_LIB = torch.library.Library("qkernels", "DEF")
_LIB.define(
    "matmul(Tensor x, Tensor[] storage, Tensor? bias, str spec, str backend, bool batch_invariant) -> Tensor"
)
_LIB.define("grad_input(Tensor grad, Tensor[] storage, str spec) -> Tensor")

X_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def spec_of(p: PackedWeight, snapshot: Snapshot | None = None) -> str:
    """Everything but the tensors of `p`, or of an earlier `snapshot` of it, as JSON.

    It names the tensors in the order in which `storage` has them.
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
    d = json.loads(spec)
    return d["format"], tuple(d["shape"]), tuple(d["names"]), d["params"], d["layout"]


def _weight(storage: list[Tensor], spec: str) -> PackedWeight:
    format, shape, names, params, layout = _parse(spec)
    return PackedWeight(format, shape, dict(zip(names, storage, strict=True)), params, layout)


@lru_cache(maxsize=4096)
def _kernel(
    spec: str, m: int, dtype: torch.dtype, device: torch.device, backend: str, batch_invariant: bool
) -> tuple[registry.Kernel, Problem]:
    format, shape, _, params, _ = _parse(spec)
    weight = PackedWeight(format, shape, {}, params)
    problem = problem_of(weight, m, dtype, device, batch_invariant)
    kernel = registry.select(problem, backend)
    if backend == "auto" and device.type == "cuda" and kernel.name == "reference.dequantize":
        why = "; ".join(f"{n}: {w}" for n, w in registry.choose(problem, "auto")[1])
        warnings.warn(
            f"qkernels: {format} {shape} runs unfused on the GPU (whole weight dequantized at each call): {why}",
            stacklevel=2,
        )
    return kernel, problem


def _matmul_impl(
    x: Tensor,
    storage: list[Tensor],
    bias: Tensor | None,
    spec: str,
    backend: str,
    batch_invariant: bool,
) -> Tensor:
    backend = registry.resolve_backend(backend)
    # An operator is given no PackedWeight that could keep plans: what is bound is looked up by
    # where the weight's tensors lie, which keeps none of them alive.
    operand = None if bias is None else bias.dtype
    places = [t.data_ptr() for t in storage]
    key = (spec, x.shape[0], x.dtype, x.device, operand, backend, batch_invariant, *places)
    known = bound(key, storage)
    if known is not None and (y := known.replay(x.contiguous(), bias)) is not None:
        return y
    p = _weight(storage, spec)
    kernel, problem = _kernel(spec, x.shape[0], x.dtype, x.device, backend, batch_invariant)
    if kernel.layout not in (registry.ANY_LAYOUT, p.layout):
        # Only a traced call gets here: eager ones prepack the weight itself, once.
        warnings.warn(
            f"qkernels: {p.format} {p.shape} is repacked at every call; call .prepack() before compiling",
            stacklevel=2,
        )
        p.prepack_(kernel.layout)
        return (
            kernel.run(x.contiguous(), p, bias, problem)
            if x.shape[0]
            else x.new_empty(0, p.shape[0])
        )
    if x.shape[0] == 0:
        return x.new_empty(0, p.shape[0])
    known = known or (kernel.bind(p, problem) if kept(p.storage, storage) else None)
    if known is None:
        return kernel.run(x.contiguous(), p, bias, problem)
    keep_bound(key, storage[0], known)
    return known(x.contiguous(), p, bias, problem)


#: operands of an operator -> the first tensor of the weight, and its product with everything found
#: out
_BOUND: dict[Any, tuple[weakref.ref[Tensor], Any]] = {}


def bound(key: Any, storage: list[Tensor]) -> Any:
    """What `keep_bound` was given for these operands and the weight of the tensors `storage`, or
    None.
    """
    known = _BOUND.get(key)
    if known is None or known[0]() is not storage[0] or not all(t.is_contiguous() for t in storage):
        return None
    return known[1]


def kept(storage: Mapping[str, Tensor], given: Iterable[Tensor]) -> bool:
    """Whether `storage` has the tensors that an operator was given themselves, no copies that go
    with the call.
    """
    return all(tensor is one for tensor, one in zip(storage.values(), given, strict=False))


def keep_bound(key: Any, first: Tensor, what: Any) -> None:
    """Until `first` is gone."""
    forget = partial(_BOUND.pop, key, None)  # bound here, for at exit there are no globals
    _BOUND[key] = weakref.ref(first, lambda _: forget()), what


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
        batch_invariant: give each row of x bitwise the same result whatever M it comes with. None
            follows QKERNELS_BATCH_INVARIANT (0 or 1, default 0). Results never vary from run to
            run.

    Returns:
        (..., N) in x's dtype. Differentiable in x and bias.

        What is infinite or NaN in a row of x stays in that row of y, where it makes of each number
        what the dequantized weight in x's dtype would: infinities, and NaN of 0 * inf and inf -
        inf. Except: NaN may stand for an infinity where a part of the weight is multiplied by
        itself: the minima of GGUF's q4_1, q5_1, q2_k, q4_k and q5_k and of SpQR, SpQR's sparse
        weights, and with up to 8 rows zero points. QuIP and QuIP# mix all of x, so nothing in such
        a row stays finite; nor where rows of x are quantized to 8 bits by their own maximum. A
        static input scale saturates instead, and has no code for NaN. In LLM.int8(), but with
        `batch_invariant`, an infinity is an outlier, whose column is one of 16 bits for all rows.

    Raises:
        ValueError: naming the argument, what was expected and what came, or why `backend` cannot.
    """
    if _watched(x, bias):
        check_operands(x, p.shape, p.device, bias)
        invariant = resolve_batch_invariant(batch_invariant)
        prepack_for(p, x, backend, invariant)
        snapshot = p.snapshot
        storage = list(snapshot.storage.values())
        return call(x, storage, bias, spec_of(p, snapshot), backend, p.shape, invariant)
    backend = registry.resolve_backend(backend)
    invariant = resolve_batch_invariant(batch_invariant)
    try:
        operand = None if bias is None else (bias.shape, bias.dtype, bias.device, bias.layout)
        key = (x.shape, x.dtype, x.device, x.layout, operand, backend, invariant)
    except RuntimeError:  # a nested tensor has no shape
        check_operands(x, p.shape, p.device, bias)
        raise
    plan = p.plans.get(key) or _planned(key, x, p, bias, backend, invariant)
    flat = x if x.dim() == 2 else x.reshape(-1, p.shape[1])
    y = plan.run(flat.contiguous(), p, bias, plan.problem)
    return y if x.dim() == 2 else y.reshape(plan.y_shape)


class _Plan(NamedTuple):
    """What a product of operands of certain shapes, dtypes and devices needs to know: found once."""

    run: registry.Run
    problem: Problem
    y_shape: tuple[int, ...]


#: plans of one weight; a server sees many values of M
_MAX_PLANS = 1024


def _planned(
    key: Any, x: Tensor, p: PackedWeight, bias: Tensor | None, backend: str, batch_invariant: bool
) -> _Plan:
    """Check the operands, prepack the weight, choose the kernel, and remember it in `p.plans`."""
    check_operands(x, p.shape, p.device, bias)
    prepack_for(p, x, backend, batch_invariant)
    m = x.numel() // p.shape[1]
    kernel, problem = _kernel(spec_of(p), m, x.dtype, x.device, backend, batch_invariant)
    if len(p.plans) >= _MAX_PLANS:
        p.plans.clear()
    run = (kernel.bind(p, problem) or kernel.run) if m else _empty
    p.plans[key] = plan = _Plan(run, problem, (*x.shape[:-1], p.shape[0]))
    return plan


def _empty(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    return x.new_empty(0, p.shape[0])


def _watched(x: Tensor, bias: Tensor | None) -> bool:
    """Whether somebody must see an operator: a compiler, a mode, a tensor subclass, autograd or
    vmap.

    So must torch, for operands whose numbers are not simply there: on the meta device, or negated
    when they are read. If not, `matmul` calls the kernel itself, which costs the host a fifth of an
    operator's call.
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


def call(
    x: Tensor,
    storage: list[Tensor],
    bias: Tensor | None,
    spec: str,
    backend: str,
    shape: tuple[int, int],
    batch_invariant: bool,
) -> Tensor:
    """The operator on x of any leading dimensions, operands already checked."""
    y = torch.ops.qkernels.matmul(
        x.reshape(-1, shape[1]), storage, bias, spec, backend, batch_invariant
    )
    return y.reshape(*x.shape[:-1], shape[0])


def prepack_for(p: PackedWeight, x: Tensor, backend: str, batch_invariant: bool) -> None:
    """Move `p` to the layout that the kernel for `x` takes, unless a graph is being traced."""
    if torch.compiler.is_compiling():
        return
    backend = registry.resolve_backend(backend)
    m = x.numel() // p.shape[1]
    kernel = registry.select(problem_of(p, m, x.dtype, x.device, batch_invariant), backend)
    if kernel.layout not in (registry.ANY_LAYOUT, p.layout) and kernel.layout != layouts.CHECKPOINT:
        p.prepack_(kernel.layout)


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
