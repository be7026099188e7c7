"""grouped_matmul and fused_moe: the operators of mixtures of experts, and their reference.

weights/experts.py has the experts. A *slot* is a pair (token, choice of an expert). `ExpertsKernel`
(backends/registry.py) says how a kernel for experts is called.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import registry
from ..backends.problem import Problem, problem_of, resolve_batch_invariant
from ..backends.reference import reference
from ..formats.base import accumulate_dtype
from ..weights.experts import PackedExperts, parsed
from . import operator_plans
from .matmul import X_DTYPES

_LIB = torch.library.Library("qkernels", "FRAGMENT")
_LIB.define(
    "grouped_matmul(Tensor x, Tensor[] storage, Tensor ids, Tensor? weights, Tensor? bias, "
    "str spec, str backend, bool batch_invariant) -> Tensor"
)
_LIB.define(
    "fused_moe(Tensor x, Tensor[] gate_up, Tensor[] down, Tensor weights, Tensor ids, "
    "str gate_up_spec, str down_spec, str activation, str backend, bool batch_invariant) -> Tensor"
)

#: the activations that `fused_moe` can apply to the gate
ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}


# ---------------------------------------------------------------------- public functions
def grouped_matmul(
    x: Tensor,
    experts: PackedExperts,
    expert_ids: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> Tensor:
    """y[t, j] = weights[t, j] * (x[t] @ W[expert_ids[t, j]]^T + bias[expert_ids[t, j]]).

    Args:
        x: (T, K), or (T, top_k, K) with a row for each slot; float16, bfloat16, float32 or float64,
            on the experts' device. T may be 0.
        experts: E weights (N, K). A fused backend moves them, once and in place, to its kernel
            layout.
        expert_ids: int32 or int64 (T, top_k). An id outside of 0..E-1 is an expert of another
            process: its row of y is zeros.
        weights: (T, top_k), any float dtype; multiplied before the result is rounded to x's dtype.
        bias: (E, N), any float dtype.
        backend, batch_invariant: as in `qkernels.matmul`. In batch-invariant mode a row's result
            depends neither on the other tokens nor on their experts.

    Returns:
        (T, top_k, N) in x's dtype. Not differentiable: experts are for inference.

    Raises:
        ValueError: naming the argument, what was expected and what came; or why `backend` cannot.
    """
    invariant = resolve_batch_invariant(batch_invariant)
    _check_experts("experts", experts)
    _check_slots(x, experts, expert_ids, "expert_ids", (2, 3))
    tokens = expert_ids.shape
    _check_floats("weights", weights, tuple(tokens), "(T, top_k)", experts.device)
    _check_floats("bias", bias, (experts.count, experts.shape[0]), "(E, N)", experts.device)
    _prepack_for(experts, x, expert_ids, backend, invariant)
    snapshot = experts.snapshot
    storage = list(snapshot.storage.values())
    y: Tensor = torch.ops.qkernels.grouped_matmul(
        x, storage, expert_ids, weights, bias, snapshot.spec, backend, invariant
    )
    return y


def fused_moe(
    x: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str = "silu",
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> Tensor:
    """A layer of experts: a weighted sum of the outputs of each token's experts.

    y[t] = sum over j of topk_weights[t, j] * down(act(gate(x[t])) * up(x[t])), with gate, up and
    down of expert topk_ids[t, j].

    Args:
        x: (T, K).
        gate_up: experts (2 * I, K), rows of the gate first.
        down: experts (N, I).
        topk_weights: (T, top_k), any float dtype.
        topk_ids: int32 or int64 (T, top_k). An id outside of 0..E-1 adds nothing, so that processes
            which hold some of the experts each can add up their results.
        activation: "silu" or "gelu" (the exact one).
        backend, batch_invariant: as in `grouped_matmul`.

    Returns:
        (T, N) in x's dtype. The outputs of gate_up, the activation and down are rounded to it, too.

    Raises:
        ValueError: naming the argument, what was expected and what came; or why `backend` cannot.
    """
    invariant = resolve_batch_invariant(batch_invariant)
    _check_experts("gate_up", gate_up)
    _check_experts("down", down)
    if gate_up.shape[0] != 2 * down.shape[1]:
        raise ValueError(
            f"gate_up: expected {2 * down.shape[1]} rows, twice the features that down takes, "
            f"got {gate_up.shape[0]}"
        )
    for name in ("count", "device"):
        want, got = getattr(gate_up, name), getattr(down, name)
        if want != got:
            raise ValueError(f"down: expected {name} {want}, that of gate_up, got {got}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    _check_slots(x, gate_up, topk_ids, "topk_ids", (2,))
    if topk_weights is None:
        raise ValueError("topk_weights: expected a tensor of shape (T, top_k), got None")
    _check_floats("topk_weights", topk_weights, tuple(topk_ids.shape), "(T, top_k)", gate_up.device)
    _prepack_for(gate_up, x, topk_ids, backend, invariant)
    _prepack_for(down, x, topk_ids, backend, invariant)
    first, second = gate_up.snapshot, down.snapshot
    y: Tensor = torch.ops.qkernels.fused_moe(
        x, list(first.storage.values()), list(second.storage.values()), topk_weights, topk_ids,
        first.spec, second.spec, activation, backend, invariant,
    )  # fmt: skip
    return y


def _prepack_for(
    experts: PackedExperts, x: Tensor, ids: Tensor, backend: str, batch_invariant: bool
) -> None:
    """Move `experts` to the layout that the kernel takes, unless a graph is being traced."""
    if torch.compiler.is_compiling():
        return
    backend = registry.resolve_backend(backend)
    key = (ids.numel(), x.dtype, x.device, backend, batch_invariant)
    if key in experts.plans:
        return
    problem = problem_of(experts, ids.numel(), x.dtype, x.device, batch_invariant)
    kernel = registry.select_experts(problem, backend)
    if kernel.layout not in (registry.ANY_LAYOUT, experts.layout):
        experts.prepack(kernel.layout)
    operator_plans.add(experts.plans, key, kernel.layout)


# ---------------------------------------------------------------------- operators
class _Selection(NamedTuple):
    """The kernel of a product of experts; bound: its `bind`, None if it has none."""

    kernel: registry.ExpertsKernel
    problem: Problem
    bound: registry.BoundExperts | None = None


class _LayerPlan(NamedTuple):
    """The kernels of a layer; bound: the first one's `bind_layer`, None if it has none."""

    gate_up: _Selection
    down: _Selection
    bound: registry.BoundLayer | None


def _selected(
    x: Tensor, ids: Tensor, experts: PackedExperts, backend: str, batch_invariant: bool
) -> _Selection:
    """The kernel for these operands; moves `experts` to its layout if they are in another one."""
    problem = problem_of(experts, ids.numel(), x.dtype, x.device, batch_invariant)
    kernel = registry.select_experts(problem, backend)
    if backend == "auto" and problem.device == "cuda" and kernel.backend == "reference":
        why = "; ".join(f"{n}: {w}" for n, w in registry.choose(problem, "auto")[1])
        warnings.warn(
            f"qkernels: experts of {problem.format} {problem.shape} run unfused on the GPU, "
            f"which also waits for the host (each expert dequantized at each call): {why}",
            stacklevel=2,
        )
    if kernel.layout not in (registry.ANY_LAYOUT, experts.layout):
        # Only a traced call gets here: an eager call prepacks the experts itself, once.
        warnings.warn(
            f"qkernels: {experts!r} are repacked at every call; call .prepack() before compiling",
            stacklevel=2,
        )
        experts.prepack(kernel.layout)
    return _Selection(kernel, problem)


def _grouped_impl(
    x: Tensor, storage: list[Tensor], ids: Tensor, weights: Tensor | None, bias: Tensor | None,
    spec: str, backend: str, batch_invariant: bool,
) -> Tensor:  # fmt: skip
    x, ids, backend = x.contiguous(), ids.contiguous(), registry.resolve_backend(backend)
    weights = None if weights is None else weights.contiguous()
    kinds = tuple(None if t is None else t.dtype for t in (ids, weights, bias))
    key = (spec, x.shape, ids.shape, x.dtype, x.device, kinds, backend, batch_invariant)
    plan: _Selection | None = operator_plans.find(storage, key)
    if plan is not None and plan.bound is not None:
        y = plan.bound.run(x, ids, weights, bias)
        if y is not None:
            return y
    experts = PackedExperts._restored(spec, storage, 0)
    if ids.numel() == 0:
        return x.new_empty(*ids.shape, experts.shape[0])
    if plan is None:
        plan = _selected(x, ids, experts, backend, batch_invariant)
        if operator_plans.holds(experts.storage, storage):
            if plan.kernel.bind is not None:
                plan = plan._replace(bound=plan.kernel.bind(plan.problem))
            operator_plans.remember(storage, key, plan)
    if plan.bound is not None:
        return plan.bound(x, experts, ids, weights, bias)
    return plan.kernel.run(x, experts, ids, weights, bias, plan.problem)


def _grouped_fake(
    x: Tensor, storage: list[Tensor], ids: Tensor, weights: Tensor | None, bias: Tensor | None,
    spec: str, backend: str, batch_invariant: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(*ids.shape, parsed(spec)["shape"][0])


def _fused_impl(
    x: Tensor, gate_up: list[Tensor], down: list[Tensor], weights: Tensor, ids: Tensor,
    gate_up_spec: str, down_spec: str, activation: str, backend: str, batch_invariant: bool,
) -> Tensor:  # fmt: skip
    x, weights, ids = x.contiguous(), weights.contiguous(), ids.contiguous()
    storage, backend = [*gate_up, *down], registry.resolve_backend(backend)
    key = (
        gate_up_spec, down_spec, activation, x.shape, x.dtype, x.device, weights.dtype, ids.shape,
        ids.dtype, backend, batch_invariant,
    )  # fmt: skip
    plan: _LayerPlan | None = operator_plans.find(storage, key)
    if plan is not None and plan.bound is not None:
        y = plan.bound.run(x, weights, ids)
        if y is not None:
            return y
    first = PackedExperts._restored(gate_up_spec, gate_up, 0)
    second = PackedExperts._restored(down_spec, down, 0)
    if ids.numel() == 0:
        return x.new_zeros(x.shape[0], second.shape[0])
    if plan is None:
        plan = _LayerPlan(
            _selected(x, ids, first, backend, batch_invariant),
            _selected(x, ids, second, backend, batch_invariant),
            None,
        )
        if operator_plans.holds(first.storage, gate_up) and operator_plans.holds(
            second.storage, down
        ):
            plan = plan._replace(bound=_bound_layer(plan, activation))
            operator_plans.remember(storage, key, plan)
    if plan.bound is not None:
        return plan.bound(x, first, second, weights, ids)
    return _run_layer(x, first, second, weights, ids, activation, plan)


def _one_kernel(plan: _LayerPlan) -> bool:
    """Whether one kernel runs the whole layer."""
    run_layer = plan.gate_up.kernel.run_layer
    return run_layer is not None and run_layer is plan.down.kernel.run_layer


def _bound_layer(plan: _LayerPlan, activation: str) -> registry.BoundLayer | None:
    """`bind_layer` of the kernel that runs the whole layer; None if there is none."""
    bind = plan.gate_up.kernel.bind_layer if _one_kernel(plan) else None
    return None if bind is None else bind(activation, (plan.gate_up.problem, plan.down.problem))


def _run_layer(
    x: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    weights: Tensor,
    ids: Tensor,
    activation: str,
    plan: _LayerPlan,
) -> Tensor:
    """A layer by one kernel, or by two products and plain torch between and after them."""
    (kernel, problem, _), (down_kernel, down_problem, _), _ = plan
    if _one_kernel(plan):
        assert kernel.run_layer is not None
        problems = (problem, down_problem)
        return kernel.run_layer(x, gate_up, down, weights, ids, activation, problems)
    h = kernel.run(x, gate_up, ids, None, None, problem)
    dtype = accumulate_dtype(x.dtype)
    gate, up = h.to(dtype).chunk(2, -1)
    h = (ACTIVATIONS[activation](gate) * up).to(x.dtype)
    h = down_kernel.run(h.contiguous(), down, ids, None, None, down_problem)
    return weighted_sum(h, weights, dtype).to(x.dtype)


def weighted_sum(y: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over a token's experts of weight * output, in `dtype`.

    y is (T, top_k, N), weights (T, top_k) and the result (T, N). The order of the sum does not
    depend on the number of tokens.
    """
    total = torch.zeros(y.shape[0], y.shape[2], dtype=dtype, device=y.device)
    for choice in range(y.shape[1]):
        total += y[:, choice].to(dtype) * weights[:, choice, None].to(dtype)
    return total


def _fused_fake(
    x: Tensor, gate_up: list[Tensor], down: list[Tensor], weights: Tensor, ids: Tensor,
    gate_up_spec: str, down_spec: str, activation: str, backend: str, batch_invariant: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], parsed(down_spec)["shape"][0])


for _device in ("CPU", "CUDA"):
    _LIB.impl("grouped_matmul", _grouped_impl, _device)
    _LIB.impl("fused_moe", _fused_impl, _device)
torch.library.register_fake("qkernels::grouped_matmul", _grouped_fake, lib=_LIB)
torch.library.register_fake("qkernels::fused_moe", _fused_fake, lib=_LIB)


# ---------------------------------------------------------------------- operand checks
def _check_experts(where: str, experts: Any) -> None:
    if not isinstance(experts, PackedExperts):
        raise ValueError(f"{where}: expected PackedExperts, got {type(experts).__name__}")


def _check_slots(
    x: Any, experts: PackedExperts, ids: Any, where: str, dims: tuple[int, ...]
) -> None:
    """ValueError unless x and the ids (called `where`) fit each other and the experts.

    dims: the numbers of dimensions that x may have, 2 or 3.
    """
    k, device = experts.shape[1], experts.device
    if not isinstance(x, Tensor) or x.dtype not in X_DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected a float16, bfloat16, float32 or float64 tensor, got {got}")
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 2:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"{where}: expected an int32 or int64 tensor of shape (T, top_k), got {got}"
        )
    shapes = {2: (ids.shape[0], k), 3: (*ids.shape, k)}
    if x.dim() not in dims or tuple(x.shape) != shapes[x.dim()]:
        allowed = " or ".join(str(tuple(shapes[d])) for d in dims)
        raise ValueError(
            f"x: expected shape {allowed} for {where} {tuple(ids.shape)} "
            f"and experts {experts.shape}, got {tuple(x.shape)}"
        )
    for name, tensor in (("x", x), (where, ids)):
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, the experts', got {tensor.device}")


def _check_floats(
    where: str, tensor: Any, shape: tuple[int, ...], meaning: str, device: torch.device
) -> None:
    """ValueError unless `tensor` is None or floating, of `shape` (in words: `meaning`)."""
    if tensor is None:
        return
    if (
        not isinstance(tensor, Tensor)
        or not tensor.is_floating_point()
        or tuple(tensor.shape) != shape
    ):
        got = (
            f"{tensor.dtype} {tuple(tensor.shape)}"
            if isinstance(tensor, Tensor)
            else type(tensor).__name__
        )
        raise ValueError(
            f"{where}: expected a floating tensor of shape {meaning} = {shape}, got {got}"
        )
    if tensor.device != device:
        raise ValueError(f"{where}: expected device {device}, the experts', got {tensor.device}")


# ---------------------------------------------------------------------- the reference
def _run_reference(
    x: Tensor,
    experts: PackedExperts,
    ids: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    problem: Problem,
) -> Tensor:
    """`ExpertsKernel.run`: expert after expert, its rows by the format's own reference."""
    dtype = accumulate_dtype(x.dtype)
    n, k = experts.shape
    rows = x.reshape(-1, k)
    per_row = ids.numel() // rows.shape[0]
    flat = ids.reshape(-1)
    y = torch.zeros(flat.numel(), n, dtype=dtype, device=x.device)
    for e in range(experts.count):
        slots = (flat == e).nonzero()[:, 0]
        if slots.numel():
            part = reference(rows[slots // per_row], experts.expert(e), problem.batch_invariant)
            y[slots] = part if bias is None else part + bias[e].to(dtype)
    if weights is not None:
        here = ((flat >= 0) & (flat < experts.count))[:, None]
        y = torch.where(here, y * weights.reshape(-1, 1).to(dtype), 0)
    return y.to(x.dtype).view(*ids.shape, n)


registry.register(
    registry.ExpertsKernel(
        "reference.experts",
        "reference",
        registry.ANY_LAYOUT,
        lambda: None,
        lambda problem: None,
        _run_reference,
    )
)
