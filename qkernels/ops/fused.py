"""RMSNorm, or SiLU(gate) * up, fused with the quantization of activations for the next products.

Three files:

    ops/fused.py     the operators, on tensors and packed weights: this file
    nn/fused.py      the layers made of them; `qkernels.fused` is that module
    models/fuse.py   `qkernels.fuse_norms`: finds the norms and gates of a model, and puts those
                     layers in their place

8-bit formats quantize activations to codes before each product. `rms_norm_matmul` makes the codes
directly from the norm's input, once for all weights that take the same codes (q, k and v of an
attention block). `silu_mul_matmul` makes them from the two halves of a gated feed-forward layer. So
x is read once, and the result of the norm or the gate is never written. The values are those of the
norm followed by `qkernels.matmul`, rounded where a model's modules round.

There are two cases without fusion: nothing has to be quantized (weight-only formats, the
reference), or autograd or torch.compile must see every step. Then the norm runs by itself in plain
torch, and the products follow. `explain` says which case it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import formats, layouts
from ..backends import registry
from ..backends.plan import Plan, Plans, Symbolic
from ..backends.problem import Problem, problem_of, resolve_batch_invariant
from ..weights.packed import PackedWeight
from . import matmul as ops
from . import operator_plans


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., K) / rms(x) * weight (K) in x's dtype.

    Computed in float32, and rounded both before and after the multiplication by the weight.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    inner = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return inner * weight.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded after each of the two steps."""
    return nn.functional.silu(gate) * up


def rms_norm_matmul(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> list[Tensor]:
    """`matmul(rms_norm(x, norm_weight, eps), p, bias)` for each weight p.

    Activations are quantized once for all weights with the same activation parameters (static
    scale, threshold). Differentiable, but then nothing is fused.

    Args:
        x: (..., K).
        norm_weight: (K), cast to x's dtype.
        eps: the norm's.
        weights: packed weights with one K.
        biases: (N) or None for each weight; None for no biases.
        backend, batch_invariant: as in `qkernels.matmul`.

    Returns:
        (..., N) for each weight.

    Raises:
        ValueError: naming the argument, what was expected and what came; or why `backend` cannot.
    """
    if not weights:
        raise ValueError("weights: expected at least one, got none")
    biases = [None] * len(weights) if biases is None else list(biases)
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected {len(weights)}, one for each weight, got {len(biases)}")
    for i, (p, bias) in enumerate(zip(weights, biases, strict=True)):
        if p.shape[1] != weights[0].shape[1]:
            raise ValueError(
                f"weights[{i}]: expected {weights[0].shape[1]} features as in weights[0], "
                f"got {p.shape[1]}"
            )
        ops.check_operands(x, p.shape, p.device, bias)
    k = weights[0].shape[1]
    if tuple(norm_weight.shape) != (k,) or not norm_weight.is_floating_point():
        raise ValueError(
            f"norm_weight: expected floats of shape ({k},), "
            f"got {norm_weight.dtype} {tuple(norm_weight.shape)}"
        )
    if norm_weight.device != x.device:
        raise ValueError(f"norm_weight: expected device {x.device}, x's, got {norm_weight.device}")
    prologue = _Prologue(x, norm=norm_weight, eps=eps)
    return _products(prologue, weights, biases, backend, resolve_batch_invariant(batch_invariant))


def silu_mul_matmul(
    gate: Tensor,
    up: Tensor,
    p: PackedWeight,
    bias: Tensor | None = None,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> Tensor:
    """`matmul(silu(gate) * up, p, bias)`.

    gate and up are (..., K) of one dtype; the rest is as in `qkernels.matmul`. Raises ValueError
    naming the argument, what was expected and what came; or why `backend` cannot.
    """
    ops.check_operands(gate, p.shape, p.device, bias)
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(
            f"up: expected {gate.dtype} of shape {tuple(gate.shape)} on {gate.device} like gate, "
            f"got {up.dtype} {tuple(up.shape)} on {up.device}"
        )
    invariant = resolve_batch_invariant(batch_invariant)
    return _products(_Prologue(gate, up=up), [p], [bias], backend, invariant)[0]


def explain(
    weights: Sequence[PackedWeight],
    m: int = 1,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> str:
    """How `rms_norm_matmul` and `silu_mul_matmul` compute these products: a line a weight.

    m: rows of x. device: defaults to the weights'. Raises ValueError if `backend` has no kernel for
    one of the weights.
    """
    lines = []
    codes: dict[Any, int] = {}
    for i, p in enumerate(weights):
        target = p.device if device is None else torch.device(device)
        problem = problem_of(p, m, dtype, target, batch_invariant)
        kernel = registry.select(problem, backend)
        name = f"weights[{i}], {p.format} {p.shape}"
        if (why := _why_separate(problem, kernel)) is not None:
            lines.append(f"{name}: not fused, a plain norm and then {kernel.name}: {why}")
            continue
        first = codes.setdefault((kernel.name, _activation_key(p)), i)
        source = (
            "norm and quantization in one kernel"
            if first == i
            else f"takes the codes of weights[{first}]"
        )
        lines.append(
            f"{name}: {source}, then {kernel.name}; not fused under autograd or torch.compile"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------- how
class _Prologue(NamedTuple):
    """The step before the products, in x's dtype: silu(x) * up with an `up`, else RMSNorm(x)."""

    x: Tensor
    up: Tensor | None = None
    norm: Tensor | None = None
    eps: float = 0.0

    def computed(self) -> Tensor:
        """Its result, by plain torch."""
        if self.up is not None:
            return silu_mul(self.x, self.up)
        assert self.norm is not None
        return rms_norm(self.x, self.norm, self.eps)

    def needs_operator(self, biases: Sequence[Tensor | None]) -> bool:
        """Whether autograd, torch.compile or another part of torch must see every step."""
        trains = torch.is_grad_enabled()
        return ops.needs_operator(self.x, None) or any(
            t is not None and (t.is_neg() or (trains and t.requires_grad))
            for t in (self.up, self.norm, *biases)
        )


def _why_separate(problem: Problem, kernel: registry.Kernel) -> str | None:
    """Why nothing can be fused with the activations of `kernel`; None if it can."""
    if kernel.quantized is not None:
        return None
    fmt, params = formats.get(problem.format), dict(problem.params)
    if obstacle := fmt.obstacle(problem.shape, params):
        return obstacle
    if fmt.kernel_layout(params) != layouts.EIGHT_BIT:
        return (
            f"{problem.format} with these parameters is weight-only, "
            "so no activations are quantized"
        )
    return f"{kernel.name} does not take codes that another kernel made"


def _activation_key(p: PackedWeight) -> Any:
    """The parameters of the activations that `p` takes: weights with equal ones can share codes.

    Read from the device once for each weight, and again after its tensors were changed in place.
    """
    key = "fused.activations"
    versions = [_version(t) for t in p.storage.values()]
    read_at, parameters = p.plans.get(key, (None, None))
    if read_at != versions:
        traits = formats.get(p.format).eight_bit_traits(p.shape, p.params)
        # The kernel layout's names of the tensors, also for a weight in the checkpoint layout.
        tensors = p.storage
        if p.layout != layouts.EIGHT_BIT:
            tensors = layouts.pack(
                formats.get(p.format), p.shape, p.params, p.tensors, layouts.EIGHT_BIT
            )
        static = tuple(
            float(tensors[name].float()) if name in tensors else None
            for name in ("input_scale", "input_zero_point")
        )
        parameters = (traits.kind == "int8", traits.activation, traits.threshold, *static)
        p.plans[key] = versions, parameters
    return parameters


def _version(tensor: Tensor) -> int | None:
    """torch's count of changes in place; None where torch does not count, in inference mode."""
    return None if tensor.is_inference() else tensor._version


def _products(
    prologue: _Prologue,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    backend: str,
    invariant: bool,
) -> list[Tensor]:
    """The product with each weight. The operands are checked already."""
    x, k = prologue.x, weights[0].shape[1]
    m = x.numel() // k
    groups: dict[Any, list[int]] = {}
    problems, kernels = [], []
    for i, p in enumerate(weights):
        problems.append(problem_of(p, m, x.dtype, x.device, invariant))
        kernels.append(registry.select(problems[i], backend))
    if m and not prologue.needs_operator(biases):
        for i, p in enumerate(weights):
            if _why_separate(problems[i], kernels[i]) is None:
                ops.prepack_to(p, kernels[i])
                groups.setdefault((kernels[i].name, _activation_key(p)), []).append(i)
    ys: list[Tensor | None] = [None] * len(weights)
    for members in groups.values():
        parts = [(weights[i], biases[i], problems[i]) for i in members]
        products = _fused_products(prologue, kernels[members[0]], parts, m, k)
        for i, y in zip(members, products, strict=True):
            ys[i] = y.reshape(*x.shape[:-1], weights[i].shape[0])
    if any(y is None for y in ys):
        plain_x = prologue.computed()
        for i, p in enumerate(weights):
            if ys[i] is None:
                ys[i] = ops.matmul(plain_x, p, biases[i], backend, invariant)
    return [y for y in ys if y is not None]


def _fused_products(
    prologue: _Prologue,
    kernel: registry.Kernel,
    parts: list[tuple[PackedWeight, Tensor | None, Problem]],
    m: int,
    k: int,
) -> list[Tensor]:
    """y (M, N) for each weight of `parts`, which all take the same codes.

    The launches are planned at the first call with operands of some shapes. The plan is kept in the
    first weight's `plans`.
    """
    halves = kernel.quantized
    assert halves is not None
    x = prologue.x.reshape(m, k).contiguous()
    up = None if prologue.up is None else prologue.up.reshape(m, k).contiguous()
    norm = None if prologue.norm is None else prologue.norm.to(x.dtype).contiguous()
    biases = [
        None if bias is None else (bias.to(x.dtype) if halves.cast_bias else bias).contiguous()
        for _, bias, _ in parts
    ]
    ys = [torch.empty(m, p.shape[0], dtype=x.dtype, device=x.device) for p, _, _ in parts]
    operands = (x, up, norm, *biases, *ys)
    plans = _plans_of(prologue, kernel, parts, m, biases)
    if plans.start(*operands) is not None:
        return ys
    for p, _, problem in parts:
        halves.tune(x, p, problem)
    plans.add(halves.compiled, lambda plan: _declare(plan, halves, parts, prologue.eps), operands)
    return ys


def _declare(
    plan: Plan,
    halves: registry.Quantized,
    parts: list[tuple[PackedWeight, Tensor | None, Problem]],
    eps: float,
) -> None:
    """The launches of `_fused_products`: the codes once, for a slice of the rows at a time."""
    all_x, all_up, norm, *rest = plan.operands
    biases, all_ys = rest[: len(parts)], rest[len(parts) :]
    first, _, problem = parts[0]

    def columns() -> Symbolic | None:
        return halves.columns(plan, all_x, first, problem, up=all_up, norm=norm, eps=eps)

    def rows(
        x: Symbolic, up: Symbolic | None, *ys: Symbolic, shared: Symbolic | None = None
    ) -> None:
        codes = halves.quantize(plan, x, first, problem, up=up, norm=norm, eps=eps, columns=shared)
        for (p, _, one), bias, y in zip(parts, biases, ys, strict=True):
            with plan.reused():
                halves.multiply(plan, codes, p, bias, one, y)

    plan.by_rows(rows, all_x, all_up, *all_ys, before_slices=columns)


def _plans_of(
    prologue: _Prologue,
    kernel: registry.Kernel,
    parts: list[tuple[PackedWeight, Tensor | None, Problem]],
    m: int,
    biases: list[Tensor | None],
) -> Plans:
    """The plans of these weights for operands of these shapes and dtypes.

    They have addresses of the weights' tensors, and keep none of them alive.
    """
    # All of them, because a module's buffers can be replaced one by one.
    tensors = [t for p, _, _ in parts for t in p.storage.values()]
    shared = parts[0][0].plans
    kinds = tuple(None if bias is None else bias.dtype for bias in biases)
    invariant = parts[0][2].batch_invariant
    key = (
        "fused", kernel.name, m, prologue.x.dtype, prologue.up is None, prologue.eps, kinds,
        invariant, tuple(map(id, tensors)),
    )  # fmt: skip
    kept = shared.get(key)
    # A later tensor may have the id of one that is gone.
    if kept is None or any(ref() is not t for ref, t in zip(kept[1], tensors, strict=True)):
        kept = (Plans(), [weakref.ref(t) for t in tensors])
        operator_plans.add(shared, key, kept)
    plans: Plans = kept[0]
    return plans
