"""Launches the 8-bit kernels. A call is two launches: activations to codes, then the product."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import layouts
from ...layouts import eight_bit as layout
from .. import workspace
from ..device import sm_count
from ..eight_bit import Activations, row_bytes, traits_of
from ..plan import NOW, Recorded, Work
from . import autotune, configs, interpreted, outlier_columns
from .launch import Launch, Replay, pdl, prefetch
from .outlier_columns import row_block, row_warps
from .weight_only import split_of

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: features of one step along K
STEP = 128


def family(traits: layout.EightBitTraits) -> str:
    """The family's name in the table of configurations: its accumulators need other registers."""
    if traits.weight_scale == "block":
        return "eight_bit.block"
    return "eight_bit.int8" if traits.kind == "int8" else "eight_bit.fp8"


@lru_cache(maxsize=4096)
def tabled(problem: Problem) -> configs.GemmConfig:
    """The table's entry for problem.m rows. For experts, these are the rows of one expert."""
    return configs.choose(
        family(traits_of(problem)),
        configs.architecture(problem.capability),
        problem.m,
        problem.batch_invariant,
        # STEP // 2, because configs.py counts 2 bytes for a feature of x, and codes have one.
        configs.StepSizes(features=STEP // 2, row_bytes=STEP),
        experts=problem.experts > 0,
    )


def has_fp8(capability: tuple[int, int] | None) -> bool:
    """Whether the GPU has instructions for fp8 (sm_89 on). True for triton's interpreter."""
    return capability is None or capability >= (8, 9)


def run(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    """x (M, K) contiguous float16 or bfloat16, p in the EIGHT_BIT layout -> y (M, N)."""
    y = torch.empty(x.shape[0], p.shape[0], dtype=x.dtype, device=x.device)
    slices = list(workspace.slices(x.shape[0], row_bytes(problem)))
    columns = columns_of(x, p, problem) if len(slices) > 1 else None
    for rows in slices:
        multiply(quantize(x[rows], p, problem, columns=columns), p, bias, problem, y[rows])
    return y


def columns_of(
    x: Tensor,
    p: PackedWeight,
    problem: Problem,
    *,
    up: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor | None:
    """The outlier columns of all rows of the problem, in the form of `Activations.columns`.

    None if a row's result does not depend on the other rows. The operands are those of `quantize`.
    """
    threshold = traits_of(problem).threshold
    if not threshold or problem.batch_invariant:
        return None
    return outlier_columns.find(x, threshold, up=up, norm=norm, eps=eps)


def configuration(problem: Problem) -> str:
    """The configuration, as `explain` shows it."""
    return autotune.words(family(traits_of(problem)), problem, tabled(problem))


# ---------------------------------------------------------------------- activations
def quantize(
    x: Tensor,
    p: PackedWeight,
    problem: Problem,
    *,
    up: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    columns: Tensor | None = None,
    work: Work = NOW,
) -> Activations:
    """x (M, K) -> its codes and scales, of the kind that the weight `p` is multiplied with.

    x: contiguous, like all operands.
    up: (M, K); silu(x) * up is quantized.
    norm: (K); RMSNorm with this weight comes first. Both round to x's dtype where models do.
    columns: the result of `columns_of` for all rows, if x is a slice of them.
    """
    from ...triton_kernels.activations import quantize_rows

    assert p.layout == layouts.EIGHT_BIT
    traits = traits_of(problem)
    (m, k), device = x.shape, x.device
    kp = layout.padded(k)
    int8 = traits.kind == "int8"
    # The kernel writes the bits of fp8 codes, because older GPUs have no such type.
    codes = work.empty((m, kp), torch.int8 if int8 else torch.uint8, device)
    if traits.activation == "tensor":
        scale = p.storage["input_scale"]
    else:
        groups = (-(-k // layout.BLOCK),) if traits.activation == "group" else ()
        scale = work.empty((*groups, m), torch.float32, device)
    # A pointer that is never used needs an address, so x stands in.
    normed, listed, flags = x, x, x
    outliers = int(traits.threshold > 0)
    if outliers:
        if columns is None:
            listed = work.empty((k + 1,), torch.int32, device)
            flags = work.counters(1 + k, device)
        else:
            listed, outliers = columns, 2
        if norm is not None or up is not None:
            normed = work.empty((m, k), x.dtype, device)
    block = row_block(kp)
    fixed = {
        "zero_ptr": p.storage.get("input_zero_point", p.storage["weight_scale"]),
        "eps": eps,
        "threshold": traits.threshold,
        "M": m,
        "K": k,
        "KP": kp,
        "INT8": int8,
        "SHARED": traits.activation,
        "HAS_ZERO": "input_zero_point" in p.storage,
        "OUTLIERS": outliers,
        "NORM": norm is not None,
        "GATED": up is not None,
        "NATIVE": has_fp8(problem.capability) and not interpreted(),
        "BLOCK": block,
        "num_warps": row_warps(block),
        **pdl(device),
    }
    slots = (
        "x_ptr", "up_ptr", "q_ptr", "scale_ptr", "norm_ptr", "normed_ptr",
        "columns_ptr", "counter_ptr",
    )  # fmt: skip
    gate, weight = x if up is None else up, x if norm is None else norm
    launch = Launch(quantize_rows, (m, 1), fixed, slots)
    work.start(launch, x, gate, codes, scale, weight, normed, listed, flags)
    codes = codes if int8 else codes.view(torch.float8_e4m3fn)
    return Activations(codes, scale, normed, listed if outliers else None)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, p: PackedWeight, problem: Problem
) -> Activations:
    """RMSNorm of x (M, K) with `weight` (K), quantized for `p`.

    x is read once, and the result of the norm is not written, unless LLM.int8() needs it in 16
    bits. It rounds to x's dtype where a model's norm does. `multiply` takes the result, for p and
    for weights of the same format and shape.

    Raises:
        ValueError: x or weight does not fit p.
    """
    k = p.shape[1]
    if x.dim() != 2 or x.shape[1] != k or x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"x: expected float16 or bfloat16 of shape (M, {k}), got {x.dtype} {tuple(x.shape)}"
        )
    if tuple(weight.shape) != (k,) or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected floats of shape ({k},), got {weight.dtype} {tuple(weight.shape)}"
        )
    return quantize(x.contiguous(), p, problem, norm=weight.contiguous(), eps=eps)


# ---------------------------------------------------------------------- the product
def multiply(
    a: Activations,
    p: PackedWeight,
    bias: Tensor | None,
    problem: Problem,
    out: Tensor | None = None,
) -> Tensor:
    """y (M, N) = quantized activations `a` times W^T, plus bias, in the dtype of `a.x`.

    `a` may hold only some rows of the problem; their results are the same as with all rows. out:
    the tensor to write y into.
    """
    traits = traits_of(problem)
    weight = arguments(a, p, traits, problem)
    y = (
        torch.empty(a.x.shape[0], p.shape[0], dtype=a.x.dtype, device=a.x.device)
        if out is None
        else out
    )
    bias = None if bias is None else bias.contiguous()

    def launch(config: configs.GemmConfig) -> Tensor:
        _launch(a, y, bias, weight, config, problem)
        return y

    config = autotune.best(family(traits), problem, tabled(problem), launch, a.x.device)
    return autotune.timed_first(problem, config, lambda: launch(config))


def constants(
    traits: layout.EightBitTraits, shape: tuple[int, int], problem: Problem, *, has_zero: bool
) -> dict[str, Any]:
    """The kernel's compile-time arguments that do not depend on the configuration."""
    return {
        "KIND": traits.kind,
        "BLOCKS": traits.weight_scale == "block",
        "ONE_SCALE": traits.activation == "tensor",
        "HAS_ZERO": has_zero,
        "OUTLIERS": traits.threshold > 0,
        "BY_ELEMENT": problem.batch_invariant,
        "WIDEN": traits.kind != "int8" and not has_fp8(problem.capability),
        "UPCAST": problem.dtype == torch.bfloat16 and problem.device == "cpu",
        "EVEN_K": layout.padded(shape[1]) % STEP == 0,
    }


def arguments(
    a: Activations, p: PackedWeight, traits: layout.EightBitTraits, problem: Problem
) -> dict[str, Any]:
    """The kernel's arguments that do not depend on the configuration."""
    storage = p.storage
    n, k = p.shape
    weight, codes = storage["weight"], a.codes
    fixed = constants(traits, p.shape, problem, has_zero="input_zero_point" in storage)
    if fixed["WIDEN"]:  # these GPUs have no fp8 type
        weight, codes = weight.view(torch.uint8), codes.view(torch.uint8)
    return {
        "x_ptr": codes,
        "weight_ptr": weight,
        "x_scale_ptr": a.scale,
        "w_scale_ptr": storage["weight_scale"],
        "zero_ptr": storage.get("input_zero_point", weight),
        "row_sum_ptr": storage.get("row_sum", weight),
        "x16_ptr": a.x,
        "columns_ptr": weight if a.columns is None else a.columns,
        "threshold": traits.threshold,
        "N": n,
        "K": k,
        "KP": layout.padded(k),
        **fixed,
    }


def _launch(
    a: Activations,
    y: Tensor,
    bias: Tensor | None,
    weight: dict[str, Any],
    config: configs.GemmConfig,
    problem: Problem,
    work: Work = NOW,
) -> None:
    """Launch the product for some rows of the problem. weight: `arguments`."""
    from ...triton_kernels.eight_bit import eight_bit_gemm

    m, n = y.shape
    blocks_n, blocks_m = -(-n // config.block_n), -(-m // config.block_m)
    # The number of K slices depends on all rows of the problem, because each row's result does.
    all_blocks = blocks_n if problem.batch_invariant else blocks_n * -(-problem.m // config.block_m)
    k_slices = configs.k_slices_of(config, -(-weight["KP"] // STEP), all_blocks, sm_count(y.device))
    scratch = sum(t.numel() * t.element_size() for t in (a.codes, a.scale))
    split = split_of(k_slices, blocks_n * blocks_m, config, scratch)
    partial = counter = weight["weight_ptr"]  # a pointer that is never read needs an address
    if split > 1:
        elements = split * blocks_n * blocks_m * config.block_n * config.block_m
        sums = torch.int32 if weight["KIND"] == "int8" else torch.float32
        partial = work.empty((elements,), sums, y.device)
        counter = work.counters(blocks_n * blocks_m, y.device)
    calls = {
        "x_ptr": weight["x_ptr"],
        "x_scale_ptr": weight["x_scale_ptr"],
        "x16_ptr": weight["x16_ptr"],
        "columns_ptr": weight["columns_ptr"],
        "bias_ptr": a.x if bias is None else bias,
        "y_ptr": y,
        "partial_ptr": partial,
        "counter_ptr": counter,
    }
    fixed = {
        **{name: value for name, value in weight.items() if name not in calls},
        "M": m,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "K_SLICES": k_slices,
        "SPLIT_K": split,
        "GROUP_N": config.group_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "PREFETCH": prefetch(config.block_m),
        **pdl(y.device),
    }
    launch = Launch(eight_bit_gemm, (blocks_n * blocks_m, split), fixed, tuple(calls))
    work.start(launch, *calls.values())


def bind(p: PackedWeight, problem: Problem) -> Recorded | None:
    """`run` for this weight and problem alone, which from its third call on only starts kernels.

    None if `run` computes the rows in slices.
    """
    if not workspace.fits(problem.m, row_bytes(problem)):
        return None

    def compute(
        x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem, y: Tensor, work: Work
    ) -> None:
        traits = traits_of(problem)
        a = quantize(x, p, problem, work=work)
        config = autotune.tuned(family(traits), problem) or tabled(problem)
        _launch(a, y, bias, arguments(a, p, traits, problem), config, problem, work)

    return Recorded(run, compute, Replay)
