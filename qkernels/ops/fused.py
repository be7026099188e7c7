"""What lies between two quantized layers, fused with the quantization of activations: RMSNorm, SiLU
* up.

8-bit formats turn activations to codes before each product. `rms_norm_matmul` makes the codes
straight from the norm's input, once for all weights that take the same codes (q, k and v of an
attention block), and `silu_mul_matmul` from the two halves of a gated feed-forward layer: x is read
once, and the result of the norm or of the product of gates is never written. The values are those
of the norm followed by `qkernels.matmul`, rounded where a model's modules round.

Where nothing is to be quantized (weight-only formats, the reference) or somebody watches (autograd,
torch.compile), the norm runs by itself in plain torch and the products follow; `explain` says
which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import formats, layouts
from ..backends import registry, workspace
from ..backends.problem import Problem, problem_of, resolve_batch_invariant
from ..weights.packed import PackedWeight
from . import matmul as ops


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., K) / rms(x) * weight (K) in x's dtype: float32 inside, rounded before the weight and
    after.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    inner = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return inner * weight.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded after each step."""
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
    """`matmul(rms_norm(x, norm_weight, eps), p, bias)` for each weight p, activations quantized
    once if they can.

    x (..., K); norm_weight (K), cast to x's dtype; biases: (N) or None for each weight; the rest as
    in `qkernels.matmul`. Returns (..., N) of each weight. Weights whose activations have other
    parameters (another static scale, another threshold) get codes of their own. Differentiable,
    then without fusion.

    Raises ValueError naming the argument, what was expected and what came, or why `backend` cannot.
    """
    if not weights:
        raise ValueError("weights: expected at least one, got none")
    biases = [None] * len(weights) if biases is None else list(biases)
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected {len(weights)}, one for each weight, got {len(biases)}")
    for i, (p, bias) in enumerate(zip(weights, biases, strict=True)):
        if p.shape[1] != weights[0].shape[1]:
            raise ValueError(
                f"weights[{i}]: expected {weights[0].shape[1]} features as in weights[0], got {p.shape[1]}"
            )
        ops.check_operands(x, p.shape, p.device, bias)
    k = weights[0].shape[1]
    if tuple(norm_weight.shape) != (k,) or not norm_weight.is_floating_point():
        raise ValueError(
            f"norm_weight: expected floats of shape ({k},), got {norm_weight.dtype} {tuple(norm_weight.shape)}"
        )
    if norm_weight.device != x.device:
        raise ValueError(f"norm_weight: expected device {x.device}, x's, got {norm_weight.device}")
    before = _Before(x, norm=norm_weight, eps=eps)
    return _products(before, weights, biases, backend, resolve_batch_invariant(batch_invariant))


def silu_mul_matmul(
    gate: Tensor,
    up: Tensor,
    p: PackedWeight,
    bias: Tensor | None = None,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> Tensor:
    """`matmul(silu(gate) * up, p, bias)`; gate and up (..., K) of one dtype, the rest as in
    `qkernels.matmul`.

    Raises ValueError naming the argument, what was expected and what came, or why `backend` cannot.
    """
    ops.check_operands(gate, p.shape, p.device, bias)
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(
            f"up: expected {gate.dtype} of shape {tuple(gate.shape)} on {gate.device} like gate, "
            f"got {up.dtype} {tuple(up.shape)} on {up.device}"
        )
    invariant = resolve_batch_invariant(batch_invariant)
    return _products(_Before(gate, up=up), [p], [bias], backend, invariant)[0]


def explain(
    weights: Sequence[PackedWeight],
    m: int = 1,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> str:
    """How `rms_norm_matmul` and `silu_mul_matmul` compute these weights for x of shape (m, K): a
    line a weight.

    `device` defaults to the weights'. Raises ValueError if `backend` has no kernel for one of them.
    """
    lines = []
    codes: dict[Any, int] = {}
    for i, p in enumerate(weights):
        where = p.device if device is None else torch.device(device)
        problem = problem_of(p, m, dtype, where, batch_invariant)
        kernel = registry.select(problem, backend)
        said = f"weights[{i}], {p.format} {p.shape}: "
        if (why := _why_separate(problem, kernel)) is not None:
            lines.append(said + f"not fused, a plain norm and then {kernel.name}: {why}")
            continue
        first = codes.setdefault((kernel.name, _activations(p)), i)
        made = (
            "norm and quantization in one kernel"
            if first == i
            else f"takes the codes of weights[{first}]"
        )
        lines.append(
            said + f"{made}, then {kernel.name}; not fused under autograd or torch.compile"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------- how
class _Before(NamedTuple):
    """What comes before the products, all of it in x's dtype: x, silu(x) * up or RMSNorm of x."""

    x: Tensor
    up: Tensor | None = None
    norm: Tensor | None = None
    eps: float = 0.0

    def plain(self) -> Tensor:
        """By itself, in plain torch."""
        if self.up is not None:
            return silu_mul(self.x, self.up)
        assert self.norm is not None
        return rms_norm(self.x, self.norm, self.eps)

    def watched(self, biases: Sequence[Tensor | None]) -> bool:
        others = [t for t in (self.up, self.norm, *biases) if t is not None and t.requires_grad]
        return ops._watched(self.x, None) or (torch.is_grad_enabled() and bool(others))


def _why_separate(problem: Problem, kernel: registry.Kernel) -> str | None:
    """Why nothing can be fused with the activations of `kernel`; None if it can."""
    if kernel.quantized is not None:
        return None
    fmt, params = formats.get(problem.format), dict(problem.params)
    if obstacle := fmt.obstacle(problem.shape, params):
        return obstacle
    if fmt.kernel_layout(params) != layouts.EIGHT_BIT:
        return f"{problem.format} with these parameters is weight-only, so no activations are quantized"
    return f"{kernel.name} does not take codes that another kernel made"


def _activations(p: PackedWeight) -> Any:
    """What tells the codes of activations that `p` takes from others'; read off the device once a
    weight.
    """
    key = "fused.activations"
    if key not in p.plans:
        traits = formats.get(p.format).eight_bit_traits(p.shape, p.params)
        # In the kernel layout and in checkpoints: under the kernel layout's names.
        held = p.storage
        if p.layout != layouts.EIGHT_BIT:
            held = layouts.pack(
                formats.get(p.format), p.shape, p.params, p.tensors, layouts.EIGHT_BIT
            )
        static = tuple(
            float(held[name].float()) if name in held else None
            for name in ("input_scale", "input_zero_point")
        )
        p.plans[key] = (traits.kind == "int8", traits.activation, traits.threshold, *static)
    return p.plans[key]


def _products(
    before: _Before,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    backend: str,
    invariant: bool,
) -> list[Tensor]:
    """The product with each weight; operands are checked already."""
    x, k = before.x, weights[0].shape[1]
    m = x.numel() // k
    groups: dict[Any, list[int]] = {}
    problems, kernels = [], []
    for i, p in enumerate(weights):
        problems.append(problem_of(p, m, x.dtype, x.device, invariant))
        kernels.append(registry.select(problems[i], backend))
    if m and not before.watched(biases):
        for i, p in enumerate(weights):
            if _why_separate(problems[i], kernels[i]) is None:
                ops.prepack_for(p, x, backend, invariant)
                groups.setdefault((kernels[i].name, _activations(p)), []).append(i)
    found: list[Tensor | None] = [None] * len(weights)
    for members in groups.values():
        parts = [(weights[i], biases[i], problems[i]) for i in members]
        for i, y in zip(members, _group(before, kernels[members[0]], parts, m, k), strict=True):
            found[i] = y.reshape(*x.shape[:-1], weights[i].shape[0])
    if any(y is None for y in found):
        plain = before.plain()
        for i, p in enumerate(weights):
            if found[i] is None:
                found[i] = ops.matmul(plain, p, biases[i], backend, invariant)
    return [y for y in found if y is not None]


def _group(
    before: _Before,
    kernel: registry.Kernel,
    parts: list[tuple[PackedWeight, Tensor | None, Problem]],
    m: int,
    k: int,
) -> list[Tensor]:
    """(M, N) of weights that take the same codes; the codes are made once, of a slice of rows at a
    time.
    """
    halves = kernel.quantized
    assert halves is not None
    x = before.x.reshape(m, k).contiguous()
    up = None if before.up is None else before.up.reshape(m, k).contiguous()
    norm = None if before.norm is None else before.norm.to(x.dtype).contiguous()
    ys = [torch.empty(m, p.shape[0], dtype=x.dtype, device=x.device) for p, _, _ in parts]
    scratch = max(halves.scratch_bytes(problem) for _, _, problem in parts)
    slices = list(workspace.slices(m, scratch))
    first, problem = parts[0][0], parts[0][2]
    known: dict[str, Any] = {}
    if len(slices) > 1:
        columns = halves.columns(x, first, problem, up=up, norm=norm, eps=before.eps)
        known = {} if columns is None else {"columns": columns}
    for rows in slices:
        part = None if up is None else up[rows]
        codes = halves.quantize(
            x[rows], first, problem, up=part, norm=norm, eps=before.eps, **known
        )
        for (p, bias, problem), y in zip(parts, ys, strict=True):
            halves.multiply(codes, p, bias, problem, out=y[rows])
    return ys
