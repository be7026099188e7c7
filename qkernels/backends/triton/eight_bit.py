"""Launches the 8-bit kernels. A call is two launches: activations to codes, then the product."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import layouts
from ...layouts import eight_bit as layout
from ..device import sm_count
from ..eight_bit import Activations, traits_of
from ..plan import Plan, Product, Symbolic
from . import autotune, configs, interpreted, outlier_columns
from .launch import prefetch, start
from .outlier_columns import row_block, row_warps
from .product import product
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
    return bind(p, problem)(x, p, bias, problem)


def bind(p: PackedWeight, problem: Problem) -> Product:
    """`run` for this weight and problem alone."""
    return product(family(traits_of(problem)), tabled(problem), declare)


def declare(plan: Plan, p: PackedWeight, config: configs.GemmConfig, problem: Problem) -> None:
    """A `product.Declare`."""
    whole, bias = plan.operands
    assert whole is not None

    def rows(x: Symbolic, y: Symbolic, shared: Symbolic | None = None) -> None:
        a = quantize(plan, x, p, problem, columns=shared)
        _launch(plan, a, y, p, bias, config, problem)

    plan.by_rows(rows, whole, plan.y, before_slices=lambda: columns_of(plan, whole, p, problem))


def columns_of(
    plan: Plan,
    x: Symbolic,
    p: PackedWeight,
    problem: Problem,
    *,
    up: Symbolic | None = None,
    norm: Symbolic | None = None,
    eps: float = 0.0,
) -> Symbolic | None:
    """The outlier columns of all rows of the problem, in the form of `Activations.columns`.

    None if a row's result does not depend on the other rows. The operands are those of `quantize`.
    """
    threshold = traits_of(problem).threshold
    if not threshold or problem.batch_invariant:
        return None
    return outlier_columns.find(plan, x, threshold, up=up, norm=norm, eps=eps)


def configuration(problem: Problem) -> str:
    """The configuration, as `explain` shows it."""
    return autotune.words(family(traits_of(problem)), problem, tabled(problem))


# ---------------------------------------------------------------------- activations
def quantize(
    plan: Plan,
    x: Symbolic,
    p: PackedWeight,
    problem: Problem,
    *,
    up: Symbolic | None = None,
    norm: Symbolic | None = None,
    eps: float = 0.0,
    columns: Symbolic | None = None,
) -> Activations:
    """x (M, K) -> its codes and scales, of the kind that the weight `p` is multiplied with.

    up: (M, K); silu(x) * up is quantized.
    norm: (K); RMSNorm with this weight comes first. Both round to x's dtype where models do.
    columns: the result of `columns_of` for all rows, if x is a slice of them.
    """
    from ...triton_kernels.activations import quantize_rows

    assert p.layout == layouts.EIGHT_BIT
    traits = traits_of(problem)
    m, k = x.shape
    kp = layout.padded(k)
    int8 = traits.kind == "int8"
    # The kernel writes the bits of fp8 codes, because older GPUs have no such type.
    codes = plan.empty((m, kp), torch.int8 if int8 else torch.uint8)
    scale: Any = p.storage.get("input_scale")
    if traits.activation != "tensor":
        groups = (-(-k // layout.BLOCK),) if traits.activation == "group" else ()
        scale = plan.empty((*groups, m), torch.float32)
    # A pointer that is never used needs an address, so x stands in.
    normed, listed, flags = x, x, x
    outliers = int(traits.threshold > 0)
    if outliers:
        if columns is None:
            listed = plan.empty((k + 1,), torch.int32)
            flags = plan.counters(1 + k)
        else:
            listed, outliers = columns, 2
        if norm is not None or up is not None:
            normed = plan.empty((m, k), x.dtype)
    block = row_block(kp)
    arguments = {
        "x_ptr": x,
        "up_ptr": x if up is None else up,
        "q_ptr": codes,
        "scale_ptr": scale,
        "norm_ptr": x if norm is None else norm,
        "normed_ptr": normed,
        "columns_ptr": listed,
        "counter_ptr": flags,
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
    }
    start(plan, quantize_rows, (m, 1), arguments)
    codes = codes if int8 else codes.view(torch.float8_e4m3fn)
    return Activations(codes, scale, normed, listed if outliers else None)


# ---------------------------------------------------------------------- the product
def multiply(
    plan: Plan,
    a: Activations,
    p: PackedWeight,
    bias: Symbolic | None,
    problem: Problem,
    y: Symbolic,
) -> None:
    """y (M, N) = quantized activations `a` times W^T, plus bias.

    `a` may hold only some rows of the problem; their results are the same as with all rows.
    """
    config = autotune.tuned(family(traits_of(problem)), problem) or tabled(problem)
    _launch(plan, a, y, p, bias, config, problem)


def tune(x: Tensor, p: PackedWeight, problem: Problem) -> None:
    """Tune the product, if a call has to do it now."""
    if autotune.due(family(traits_of(problem)), problem, x.device):
        run(x, p, None, problem)


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
    plan: Plan,
    a: Activations,
    y: Symbolic,
    p: PackedWeight,
    bias: Symbolic | None,
    config: configs.GemmConfig,
    problem: Problem,
) -> None:
    """Declare the product's launch for some rows of the problem."""
    from ...triton_kernels.eight_bit import eight_bit_gemm

    m, n = y.shape
    weight = arguments(a, p, traits_of(problem), problem)
    blocks_n, blocks_m = -(-n // config.block_n), -(-m // config.block_m)
    # The number of K slices depends on all rows of the problem, because each row's result does.
    all_blocks = blocks_n if problem.batch_invariant else blocks_n * -(-problem.m // config.block_m)
    steps = -(-weight["KP"] // STEP)
    k_slices = configs.k_slices_of(config, steps, all_blocks, sm_count(plan.device))
    split = split_of(k_slices, blocks_n * blocks_m, config, plan.used)
    unread = weight["weight_ptr"]  # a pointer that is never read needs an address
    elements = split * blocks_n * blocks_m * config.block_n * config.block_m
    sums = torch.int32 if weight["KIND"] == "int8" else torch.float32
    launched = {
        **weight,
        "bias_ptr": a.x if bias is None else bias,
        "y_ptr": y,
        "partial_ptr": plan.empty((elements,), sums) if split > 1 else unread,
        "counter_ptr": plan.counters(blocks_n * blocks_m) if split > 1 else unread,
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
    }
    start(plan, eight_bit_gemm, (blocks_n * blocks_m, split), launched)
