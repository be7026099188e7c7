"""Launches the weight-only kernel: its arguments, configuration, grid and workspace."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import layouts
from ...layouts import weight_only as layout
from .. import workspace
from ..device import sm_count
from ..plan import Plan, Product, Symbolic
from ..weight_only import traits_of
from . import autotune, configs, interpreted, transforms
from .launch import overtakes, prefetch, start
from .product import product

if TYPE_CHECKING:
    from ...triton_kernels.weight_only import KernelTraits, Method
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: M from which a separate kernel gathers x once, instead of each program (act-order)
GATHER_ROWS = 17
#: scale groups of a tile up to which sums are scaled instead of weights (H200, M = 16:
#: bench/results/2026-11-27-h200)
MOST_DOTS = 2
#: M from which outliers read a transposed copy of x, where the rows of one feature are contiguous
TRANSPOSE_ROWS = 64


def sizes(traits: layout.WeightOnlyTraits) -> configs.StepSizes:
    """The sizes of one step along K, which is one tile.

    The scratch sizes were read off compiled kernels; tests/kernels/test_shared_memory.py checks
    them. Shared memory is needed where data changes threads:
    - High bits are in separate words and go to the threads that hold the low bits.
    - Decoded weights, 2 bytes each, change threads if codes have high bits. With a codebook they do
      too, but with few rows of x only a part of them.
    - Two float32 scales per scale group do, where a tile has more than 8 groups (q2_k, triton 3.6).
    """
    high, features = traits.codes.high_words, traits.codes.tile
    decoded = (0, 0)
    if traits.codes.codebook:
        decoded = (288, 2 * features + 160)
    elif high:
        decoded = (2 * features, 2 * features)
    groups = min(16, features // max(1, min(traits.group_size, features)))
    scales = 8 * groups if groups > 8 else 0
    return configs.StepSizes(features, 64 + 4 * high, max(160 if high else 0, scales), decoded)


def family(traits: layout.WeightOnlyTraits) -> str:
    """The family's name in the table of configurations.

    Tiles of 2- and 3-bit codes ("wide") need more registers, the two levels of SpQR's scales still
    more. Codes of a byte move twice as many bytes.
    """
    if f"weight_only.{traits.scaler}" in configs.FAMILIES:
        return f"weight_only.{traits.scaler}"
    if traits.codes.codebook:
        return "weight_only.codebook"
    return {2: "weight_only.wide", 3: "weight_only.wide", 8: "weight_only.bytes"}.get(
        traits.bits, "weight_only"
    )


@lru_cache(maxsize=4096)
def tabled(problem: Problem) -> configs.GemmConfig:
    """The table's entry for problem.m rows. For experts, these are the rows of one expert."""
    traits, arch = traits_of(problem), configs.architecture(problem.capability)
    return configs.choose(
        family(traits),
        arch,
        problem.m,
        problem.batch_invariant,
        sizes(traits),
        experts=problem.experts > 0,
    )


def kernel_traits(
    traits: layout.WeightOnlyTraits, shape: tuple[int, int], *, group_lookup: bool
) -> KernelTraits:
    """The kernel's argument TRAITS. group_lookup: whether the weight has a `slice_group`."""
    from ...triton_kernels import decoders, scalers
    from ...triton_kernels.weight_only import KernelTraits

    codes, scales = traits.codes, traits.scales
    return KernelTraits(
        tile=codes.tile,
        bits=codes.bits,
        width=codes.width,
        high_words=codes.high_words,
        high_step=codes.high_step,
        split=getattr(decoders, f"split_{codes.split}"),
        finish=getattr(decoders, f"finish_{codes.finish}"),
        scaler=getattr(scalers, scales.triton),
        group_size=traits.group_size,
        row_group=traits.row_group,
        scale_group=layout.scale_group(traits, shape[1], group_lookup=group_lookup),
        group_lookup=group_lookup,
        has_min=scales.zero == "min",
        has_zero=scales.zero == "point",
        last_scale=scales.zero == "none" and not scales.flat and traits.group_size >= shape[1],
        outliers=traits.outliers,
    )


#: the tensors of the kernel's weight_args
_WEIGHT_TENSORS = ("qdata", "qhigh", "perm", "lut")


def pointers(
    storage: Mapping[str, Tensor], traits: layout.WeightOnlyTraits
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The kernel's weight_args and scaler_args.

    A pointer that the kernel never reads still needs an address, so qdata stands in for it.
    """
    qdata = storage["qdata"]
    weight = tuple(storage.get(name, qdata) for name in _WEIGHT_TENSORS)
    return weight, tuple(storage.get(name, qdata) for name in scaler_tensors(traits))


def arguments(p: PackedWeight, traits: layout.WeightOnlyTraits) -> dict[str, Any]:
    """The kernel's arguments that depend on the weight alone."""
    n, k = p.shape
    storage = p.storage
    if traits.codes.codebook:
        k = traits.group_size  # the transform of x writes whole tiles
    weight_args, scaler_args = pointers(storage, traits)
    return {
        "weight_args": weight_args,
        "scaler_args": scaler_args,
        "N": n,
        "K": k,
        "KP": storage["perm"].numel() if "perm" in storage else k,
        "TRAITS": kernel_traits(traits, p.shape, group_lookup="slice_group" in storage),
    }


def scaler_tensors(traits: layout.WeightOnlyTraits) -> tuple[str, ...]:
    """Names of the tensors that a format's scaler reads, in order."""
    names = tuple(f"scaler.{name}" for name in traits.scales.tensors)
    return (*names, "slice_group") if traits.scales.lookup else names


def run(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    """x (M, K) contiguous float16 or bfloat16, p in the WEIGHT_ONLY layout -> y (M, N)."""
    return bind(p, problem)(x, p, bias, problem)


def bind(p: PackedWeight, problem: Problem) -> Product:
    """`run` for this weight and problem alone."""
    return product(family(traits_of(problem)), tabled(problem), declare)


def declare(plan: Plan, p: PackedWeight, config: configs.GemmConfig, problem: Problem) -> None:
    """A `product.Declare`.

    If x has to be gathered, transposed or transformed, that copies one slice of its rows at a time.
    Every decision depends on the number of all rows, so each slice is computed exactly as with all
    rows at once, and the results are the same bits.
    """
    assert p.layout == layouts.WEIGHT_ONLY
    traits = traits_of(problem)
    x, bias = plan.operands
    few = problem.m <= transforms.DECODE_ROWS or problem.batch_invariant

    def rows(x: Symbolic, y: Symbolic) -> None:
        weight, sparse_x = arguments(p, traits), x
        if traits.outliers:
            strides = (x.shape[1], 1)
            if problem.m >= TRANSPOSE_ROWS:
                sparse_x, strides = _transposed(plan, x), (1, x.shape[0])
            weight["outlier_args"] = (*_outliers(p), *strides)
        if traits.transform_scales:
            divisor = traits.transform_scales[0]
            x = transforms.before(plan, x, p.storage, divisor, traits.codes.codebook, few)
        permuted = "perm" in p.storage
        if permuted and problem.m >= GATHER_ROWS:
            x = _gathered(plan, x, p.storage["perm"])
            weight["K"] = x.shape[1]
            permuted = False
        if traits.transform_scales is None:
            _launch(plan, x, sparse_x, y, bias, weight, config, problem, permuted)
            return
        inner_y = plan.empty(y.shape, torch.float32)
        _launch(plan, x, sparse_x, inner_y, None, weight, config, problem, permuted)
        transforms.after(plan, inner_y, y, p.storage, traits.transform_scales[1], bias, few)

    assert x is not None
    plan.by_rows(rows, x, plan.y)


def configuration(problem: Problem) -> str:
    """The configuration, as `explain` shows it."""
    return autotune.words(family(traits_of(problem)), problem, tabled(problem))


def _launch(
    plan: Plan,
    x: Symbolic,
    sparse_x: Symbolic,
    y: Symbolic,
    bias: Symbolic | None,
    weight: dict[str, Any],
    config: configs.GemmConfig,
    problem: Problem,
    permuted: bool = False,
) -> None:
    """Declare the kernel's launch for some rows of the problem.

    sparse_x: the x that outliers multiply. weight: `arguments`. permuted: whether the kernel
    gathers x.
    """
    from ...triton_kernels.weight_only import weight_only_gemm

    m, n = y.shape
    blocks_n, blocks_m = -(-n // config.block_n), -(-m // config.block_m)
    traits: KernelTraits = weight["TRAITS"]
    tiles = -(-weight["KP"] // traits.tile)
    # The number of K slices depends on all rows of the problem, because each row's result does.
    all_blocks = blocks_n if problem.batch_invariant else blocks_n * -(-problem.m // config.block_m)
    k_slices = configs.k_slices_of(config, tiles, all_blocks, sm_count(plan.device))
    split = split_of(k_slices, blocks_n * blocks_m, config, plan.used)
    unread = weight["weight_args"][0]  # a pointer that is never read needs an address
    elements = split * blocks_n * blocks_m * config.block_n * config.block_m
    arguments = {
        "x_ptr": x,
        "sparse_x_ptr": sparse_x,
        "bias_ptr": x if bias is None else bias,
        "y_ptr": y,
        "partial_ptr": plan.empty((elements,), torch.float32) if split > 1 else unread,
        "counter_ptr": plan.counters(blocks_n * blocks_m) if split > 1 else unread,
        "M": m,
        "METHOD": method(
            traits,
            config,
            problem,
            permuted=permuted,
            upcast=x.dtype == torch.bfloat16 and interpreted(),
        ),
        "HAS_BIAS": bias is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "K_SLICES": k_slices,
        "SPLIT_K": split,
        "GROUP_N": config.group_n,
        "WARPS": config.num_warps,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "outlier_args": (),
        "PREFETCH": prefetch(config.block_m),
        **weight,
    }
    start(plan, weight_only_gemm, (blocks_n * blocks_m, split), arguments)


def method(
    traits: KernelTraits,
    config: configs.GemmConfig,
    problem: Problem,
    *,
    permuted: bool,
    upcast: bool,
) -> Method:
    """The kernel's argument METHOD. permuted, upcast: as in `Method`."""
    from ...triton_kernels.weight_only import Method

    return Method(
        folded=folded(traits, config, problem),
        post_scale=post_scale(traits, config, problem),
        permuted=permuted,
        upcast=upcast,
        wait=overtakes(configs.architecture(problem.capability)),
    )


def folded(traits: KernelTraits, config: configs.GemmConfig, problem: Problem) -> bool:
    """Whether the unused columns of the dot hold the other scale groups of the same row.

    That needs few enough rows. Never in batch-invariant mode, because it sums in another order.
    """
    groups = _scale_groups(traits)
    fits = groups > 1 and problem.m * groups <= config.block_m
    return fits and config.block_m == 16 and not traits.last_scale and not problem.batch_invariant


def post_scale(traits: KernelTraits, config: configs.GemmConfig, problem: Problem) -> bool:
    """Whether the kernel scales sums instead of weights.

    It also does if a tile has only one dot, because its sums are then read once. It does not if a
    tile has many scale groups: with a dot for each of its four groups, q4_k took 1.2 times as long
    at M = 16 as with scaled weights.
    """
    if problem.batch_invariant:
        return config.post_scale
    groups = _scale_groups(traits)
    return (config.post_scale and groups <= MOST_DOTS) or (groups == 1 and config.block_m == 16)


def _scale_groups(traits: KernelTraits) -> int:
    """Scale groups of a tile."""
    return traits.tile // traits.scale_group


def split_of(k_slices: int, blocks: int, config: configs.GemmConfig, scratch: int = 0) -> int:
    """SPLIT_K: one program per K slice, or one for all slices.

    The latter if the workspace does not suffice. scratch: bytes of it that are already in use.
    """
    needed = scratch + k_slices * blocks * config.block_m * config.block_n * 4
    return k_slices if needed <= workspace.BYTES else 1


def _outliers(p: PackedWeight) -> tuple[Tensor, Tensor]:
    """(row_offsets, col_vals) of the sparse outliers."""
    offsets, values = p.storage["outlier.row_offsets"], p.storage["outlier.col_vals"]
    # An empty tensor has no address.
    return (offsets, values) if values.numel() else (offsets, offsets)


def _transposed(plan: Plan, x: Symbolic) -> Symbolic:
    """x (M, K) -> (K, M)."""
    y = plan.empty((x.shape[1], x.shape[0]), x.dtype)
    plan.by_torch(lambda x, y: y.copy_(x.T), x, y)
    return y


def _gathered(plan: Plan, x: Symbolic, perm: Tensor) -> Symbolic:
    """x (M, K) -> (M, KP) in kernel order, zeros in the padding."""
    from ...triton_kernels.gather import gather_columns

    m, kp = x.shape[0], perm.numel()
    y = plan.empty((m, kp), x.dtype)
    arguments = {
        "x_ptr": x, "perm_ptr": perm, "y_ptr": y, "K": x.shape[1], "KP": kp, "BLOCK": 1024,
    }  # fmt: skip
    start(plan, gather_columns, (m, -(-kp // 1024)), arguments)
    return y
