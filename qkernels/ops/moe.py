"""grouped_matmul and fused_moe: the operators of mixtures of experts (experts.py) and their
reference.

A *slot* is a pair (token, choice). A grouped kernel of the registry (backends/registry.py) has

    run(x, experts, ids, weights, bias, problem)       x (T, K), or (T, top_k, K) with a row a slot; ids (T, top_k)
                                                       -> y (T, top_k, N) in x's dtype
    fused(x, gate_up, down, weights, ids, activation, problems)        -> y (T, N of down) in x's dtype
    layer(activation, problems)                        a `fused` for one layer, which finds out once what its
                                                       calls have in common: (x, gate_up, down,
                                                       weights, ids) -> y
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from ..backends.problem import Problem, problem_of, resolve_batch_invariant
from ..backends.reference import reference
from ..formats.base import accumulate_dtype
from ..weights.experts import PackedExperts, parsed
from .matmul import X_DTYPES, bound, keep_bound, kept

_LIB = torch.library.Library("qkernels", "FRAGMENT")
_LIB.define(
    "grouped_matmul(Tensor x, Tensor[] storage, Tensor ids, Tensor? weights, Tensor? bias, str spec, "
    "str backend, bool batch_invariant) -> Tensor"
)
_LIB.define(
    "fused_moe(Tensor x, Tensor[] gate_up, Tensor[] down, Tensor weights, Tensor ids, str gate_up_spec, "
    "str down_spec, str activation, str backend, bool batch_invariant) -> Tensor"
)

#: what `fused_moe` can do to the gate
ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}


@lru_cache(maxsize=4096)
def _kernel(
    spec: str,
    slots: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    batch_invariant: bool,
) -> tuple[registry.Kernel, Problem]:
    problem = problem_of(
        PackedExperts._restored(spec, (), 0), slots, dtype, device, batch_invariant
    )
    kernel = registry.select(problem, backend)
    if backend == "auto" and device.type == "cuda" and kernel.backend == "reference":
        why = "; ".join(f"{n}: {w}" for n, w in registry.choose(problem, "auto")[1])
        warnings.warn(
            f"qkernels: experts of {problem.format} {problem.shape} run unfused on the GPU, which also waits "
            f"for the host (each expert dequantized at each call): {why}",
            stacklevel=2,
        )
    return kernel, problem


def _chosen(
    x: Tensor, ids: Tensor, experts: PackedExperts, spec: str, backend: str, batch_invariant: bool
) -> tuple[registry.Kernel, Problem]:
    """The kernel for these operands; `experts` are moved to its layout if they are not there yet."""
    backend = registry.resolve_backend(backend)
    kernel, problem = _kernel(spec, ids.numel(), x.dtype, x.device, backend, batch_invariant)
    if kernel.layout not in (registry.ANY_LAYOUT, experts.layout):
        # Only a traced call gets here: eager ones prepack the experts themselves, once.
        warnings.warn(
            f"qkernels: {experts!r} are repacked at every call; call .prepack() before compiling",
            stacklevel=2,
        )
        experts.prepack(kernel.layout)
    return kernel, problem


def _grouped_impl(
    x: Tensor, storage: list[Tensor], ids: Tensor, weights: Tensor | None, bias: Tensor | None, spec: str,
    backend: str, batch_invariant: bool,
) -> Tensor:  # fmt: skip
    experts = PackedExperts._restored(spec, storage, 0)
    if ids.numel() == 0:
        return x.new_empty(*ids.shape, experts.shape[0])
    kernel, problem = _chosen(x, ids, experts, spec, backend, batch_invariant)
    weights = None if weights is None else weights.contiguous()
    return kernel.run(x.contiguous(), experts, ids.contiguous(), weights, bias, problem)


def _grouped_fake(
    x: Tensor, storage: list[Tensor], ids: Tensor, weights: Tensor | None, bias: Tensor | None, spec: str,
    backend: str, batch_invariant: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(*ids.shape, parsed(spec)["shape"][0])


def _fused_impl(
    x: Tensor, gate_up: list[Tensor], down: list[Tensor], weights: Tensor, ids: Tensor, gate_up_spec: str,
    down_spec: str, activation: str, backend: str, batch_invariant: bool,
) -> Tensor:  # fmt: skip
    x, weights, ids = x.contiguous(), weights.contiguous(), ids.contiguous()
    key = (
        gate_up_spec, down_spec, activation, x.shape, x.dtype, x.device, weights.dtype, ids.shape, ids.dtype,
        registry.resolve_backend(backend), batch_invariant, *[t.data_ptr() for t in (*gate_up, *down)],
    )  # fmt: skip
    known = bound(key, [*gate_up, *down])
    if known is not None and (y := known.replay(x, weights, ids)) is not None:
        found: Tensor = y
        return found
    first = PackedExperts._restored(gate_up_spec, gate_up, 0)
    second = PackedExperts._restored(down_spec, down, 0)
    if ids.numel() == 0:
        return x.new_zeros(x.shape[0], second.shape[0])
    kernel, problem = _chosen(x, ids, first, gate_up_spec, backend, batch_invariant)
    other, down_problem = _chosen(x, ids, second, down_spec, backend, batch_invariant)
    if kernel.fused is not None and kernel.fused is other.fused:
        problems = (problem, down_problem)
        if kernel.layer is None or not (
            kept(first.storage, gate_up) and kept(second.storage, down)
        ):
            return kernel.fused(x, first, second, weights, ids, activation, problems)
        layer = known or kernel.layer(activation, problems)
        keep_bound(key, gate_up[0], layer)
        result: Tensor = layer(x, first, second, weights, ids)
        return result
    h = kernel.run(x, first, ids, None, None, problem)
    dtype = accumulate_dtype(x.dtype)
    gate, up = h.to(dtype).chunk(2, -1)
    h = (ACTIVATIONS[activation](gate) * up).to(x.dtype)
    h = other.run(h.contiguous(), second, ids, None, None, down_problem)
    total = torch.zeros(x.shape[0], second.shape[0], dtype=dtype, device=x.device)
    for choice in range(ids.shape[1]):  # in order, whatever the number of tokens
        total += h[:, choice].to(dtype) * weights[:, choice, None].to(dtype)
    return total.to(x.dtype)


def _fused_fake(
    x: Tensor, gate_up: list[Tensor], down: list[Tensor], weights: Tensor, ids: Tensor, gate_up_spec: str,
    down_spec: str, activation: str, backend: str, batch_invariant: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], parsed(down_spec)["shape"][0])


for _device in ("CPU", "CUDA"):
    _LIB.impl("grouped_matmul", _grouped_impl, _device)
    _LIB.impl("fused_moe", _fused_impl, _device)
torch.library.register_fake("qkernels::grouped_matmul", _grouped_fake, lib=_LIB)
torch.library.register_fake("qkernels::fused_moe", _fused_fake, lib=_LIB)


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
        x: (T, K), or (T, top_k, K) where each slot has a row of its own; float16, bfloat16, float32
        or float64, on
            the experts' device. T may be 0.
        experts: E weights (N, K). A fused backend moves them, once and in place, to its kernel
        layout. expert_ids: int32 or int64 (T, top_k). Those outside of 0..E-1 are experts of
        another process: zeros. weights: (T, top_k), any float dtype; multiplied before the result
        is rounded to x's dtype. bias: (E, N), any float dtype. backend, batch_invariant: as in
        `qkernels.matmul`. A row's result depends in batch-invariant mode
            neither on the other tokens nor on where they are sent.

    Returns:
        (T, top_k, N) in x's dtype. Not differentiable: experts are for inference.

    Raises:
        ValueError: naming the argument, what was expected and what came, or why `backend` cannot.
    """
    invariant = resolve_batch_invariant(batch_invariant)
    _check_experts("experts", experts)
    _check_slots(x, experts, expert_ids, "expert_ids", (2, 3))
    tokens = expert_ids.shape
    _check_floats("weights", weights, tuple(tokens), "(T, top_k)", experts.device)
    _check_floats("bias", bias, (experts.count, experts.shape[0]), "(E, N)", experts.device)
    _prepack_for(experts, x, expert_ids, backend, invariant)
    snapshot = experts.snapshot
    found: Tensor = torch.ops.qkernels.grouped_matmul(
        x,
        list(snapshot.storage.values()),
        expert_ids,
        weights,
        bias,
        snapshot.spec,
        backend,
        invariant,
    )
    return found


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
    """A layer of experts: y[t] = sum over j of topk_weights[t, j] * down(act(gate(x[t])) *
    up(x[t])), each of expert topk_ids[t, j].

    Args:
        x: (T, K). gate_up: experts (2 * I, K), rows of the gate first. down: experts (N, I).
        topk_weights: (T, top_k), any float dtype. topk_ids: int32 or int64 (T, top_k); those
        outside of 0..E-1
            add nothing, so that processes with an expert or more each add up their results.
        activation: "silu" or "gelu" (the exact one).
        backend, batch_invariant: as in `grouped_matmul`.

    Returns:
        (T, N) in x's dtype; what comes out of gate_up, the activation and down is rounded to it in
        between.

    Raises:
        ValueError: naming the argument, what was expected and what came, or why `backend` cannot.
    """
    invariant = resolve_batch_invariant(batch_invariant)
    _check_experts("gate_up", gate_up)
    _check_experts("down", down)
    if gate_up.shape[0] != 2 * down.shape[1]:
        raise ValueError(
            f"gate_up: expected {2 * down.shape[1]} rows, twice the features that down takes, got {gate_up.shape[0]}"
        )
    for what in ("count", "device"):
        want, got = getattr(gate_up, what), getattr(down, what)
        if want != got:
            raise ValueError(f"down: expected {what} {want}, that of gate_up, got {got}")
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
    found: Tensor = torch.ops.qkernels.fused_moe(
        x, list(first.storage.values()), list(second.storage.values()), topk_weights, topk_ids, first.spec,
        second.spec, activation, backend, invariant,
    )  # fmt: skip
    return found


def _prepack_for(
    experts: PackedExperts, x: Tensor, ids: Tensor, backend: str, batch_invariant: bool
) -> None:
    """Move `experts` to the layout that the kernel takes, unless a graph is being traced."""
    if torch.compiler.is_compiling():
        return
    backend = registry.resolve_backend(backend)
    kernel, _ = _kernel(experts.spec, ids.numel(), x.dtype, x.device, backend, batch_invariant)
    if kernel.layout not in (registry.ANY_LAYOUT, experts.layout):
        experts.prepack(kernel.layout)


# ---------------------------------------------------------------------- operand checks
def _check_experts(where: str, experts: Any) -> None:
    if not isinstance(experts, PackedExperts):
        raise ValueError(f"{where}: expected PackedExperts, got {type(experts).__name__}")


def _check_slots(
    x: Any, experts: PackedExperts, ids: Any, where: str, dims: tuple[int, ...]
) -> None:
    """ValueError unless x and the expert ids fit each other and the experts."""
    k, device = experts.shape[1], experts.device
    if not isinstance(x, Tensor) or x.dtype not in X_DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected a float16, bfloat16, float32 or float64 tensor, got {got}")
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 2:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"{where}: expected an int32 or int64 tensor of shape (T, top_k), got {got}"
        )
    wanted = {2: (ids.shape[0], k), 3: (*ids.shape, k)}
    if x.dim() not in dims or tuple(x.shape) != wanted[x.dim()]:
        shapes = " or ".join(str(tuple(wanted[d])) for d in dims)
        raise ValueError(
            f"x: expected shape {shapes} for {where} {tuple(ids.shape)} and experts {experts.shape}, "
            f"got {tuple(x.shape)}"
        )
    for name, tensor in (("x", x), (where, ids)):
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, the experts', got {tensor.device}")


def _check_floats(
    where: str, tensor: Any, shape: tuple[int, ...], meaning: str, device: torch.device
) -> None:
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
    """Expert after expert: the rows sent to it, by the format's own reference."""
    dtype = accumulate_dtype(x.dtype)
    n, k = experts.shape
    rows = x.reshape(-1, k)
    per_row = ids.numel() // rows.shape[0]
    flat = ids.reshape(-1)
    y = torch.zeros(flat.numel(), n, dtype=dtype, device=x.device)
    for e in range(experts.count):
        slots = (flat == e).nonzero()[:, 0]
        if slots.numel():
            found = reference(rows[slots // per_row], experts.expert(e), problem.batch_invariant)
            y[slots] = found if bias is None else found + bias[e].to(dtype)
    if weights is not None:
        here = ((flat >= 0) & (flat < experts.count))[:, None]
        y = torch.where(here, y * weights.reshape(-1, 1).to(dtype), 0)
    return y.to(x.dtype).view(*ids.shape, n)


registry.register(
    registry.Kernel(
        "reference.experts",
        "reference",
        registry.ANY_LAYOUT,
        lambda: None,
        lambda problem: None,
        _run_reference,
        grouped=True,
    )
)
