"""Launches the weight-only kernel: arguments from a packed weight, configuration, grid, workspace."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import formats, layouts
from ...layouts import weight_only as layout
from .. import workspace
from ..device import sm_count
from ..plan import NOW, Recorded, Work
from . import autotune, configs, interpreted, transforms
from .launch import Launch, Replay, overtakes, pdl, prefetch

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: M from which x is gathered once, by a kernel of its own, instead of by every program (act-order)
GATHER_ROWS = 17
#: runs of a tile up to which sums are scaled instead of weights (H200, M = 16:
#: bench/results/2026-11-27-h200)
MOST_DOTS = 2
#: M from which outliers read a transposed copy of x, whose rows then lie next to each other
TRANSPOSE_ROWS = 64


def traits_of(problem: Problem) -> layout.WeightOnlyTraits:
    return formats.get(problem.format).weight_only_traits(problem.shape, dict(problem.params))


def sizes(traits: layout.WeightOnlyTraits) -> tuple[int, int, int, tuple[int, int]]:
    """Of one tile, as `configs.fitted` wants them: features, packed bytes of a row, scratch bytes
    of a row, twice.

    The scratch is read off compiled kernels (tests/kernels/test_shared_memory.py): high bits come
    as words of their own, and go to the threads that hold the low ones by way of shared memory; so
    do decoded weights, 2 bytes each, then and where a code is eight of them, but of these only a
    part for few rows.
    """
    high, features = (
        layout.high_words(traits.bits, traits.codebook),
        layout.tile_features(traits.bits, traits.codebook),
    )
    decoded = (
        (288, 2 * features + 160) if traits.codebook else (2 * features,) * 2 if high else (0, 0)
    )
    runs = min(16, features // max(1, min(traits.group_size, features)))
    scales = 8 * runs if runs > 8 else 0  # two of float32 a run change hands (q2_k, triton 3.6)
    return features, 64 + 4 * high, max(160 if high else 0, scales), decoded


def family(traits: layout.WeightOnlyTraits) -> str:
    """The name of its configurations: wide tiles hold more in registers, SpQR's real zero points
    yet more; codes of a byte move twice as much."""
    if traits.scaler == "two_level":
        return "weight_only.two_level"
    if traits.codebook:
        return "weight_only.vectors"
    return {2: "weight_only.wide", 3: "weight_only.wide", 8: "weight_only.bytes"}.get(
        traits.bits, "weight_only"
    )


@lru_cache(maxsize=4096)
def tabled(problem: Problem) -> configs.GemmConfig:
    """The table's entry for problem.m rows; of each expert where the problem has experts."""
    traits, arch = traits_of(problem), configs.architecture(problem.capability)
    own = (family(traits), arch, problem.m, problem.batch_invariant)
    return configs.choose(*own, *sizes(traits), experts=problem.experts > 0)


def constants(
    traits: layout.WeightOnlyTraits, shape: tuple[int, int], *, group_lookup: bool, indexed: bool
) -> dict[str, Any]:
    """The kernel's compile-time arguments that depend on the weight alone."""
    from ...triton_kernels import decoders, scalers

    decoder = decoders.BY_NAME[traits.decoder, traits.bits]
    return {
        "BITS": traits.bits,
        "WIDTH": layout.plane_bits(traits.bits, traits.codebook),
        "HIGH": layout.high_words(traits.bits, traits.codebook),
        "STEP": layout.high_step(traits.bits, traits.codebook),
        "SPLIT": decoder.split,
        "FINISH": decoder.finish,
        "SCALER": scalers.BY_NAME[traits.scaler],
        "GROUP": traits.group_size,
        "ROW_GROUP": traits.row_group,
        "SCALE_GROUP": layout.scale_group(traits, shape[1], group_lookup=group_lookup),
        "GROUP_LOOKUP": group_lookup,
        "HAS_MIN": traits.scaler in scalers.HAS_MIN,
        "ZERO": traits.scaler in scalers.ZERO,
        "LAST_SCALE": traits.scaler == "scale" and traits.group_size >= shape[1],
        "PERMUTED": indexed,
        "OUTLIERS": traits.outliers,
    }


def arguments(p: PackedWeight, traits: layout.WeightOnlyTraits) -> dict[str, Any]:
    """The kernel's arguments that depend on the weight alone."""
    n, k = p.shape
    storage = p.storage
    qdata = storage["qdata"]
    if traits.codebook:
        k = traits.group_size  # x comes out of its transform in whole tiles
    indexed = "perm" in storage
    # A pointer that is never read still has to be one: qdata stands in.
    read = [storage.get(name, qdata) for name in scaler_tensors(traits)]
    return {
        "qdata_ptr": qdata,
        "qhigh_ptr": storage.get("qhigh", qdata),
        "perm_ptr": storage.get("perm", qdata),
        "table_ptr": storage.get("lut", qdata),
        "scaler_args": tuple(read),
        "N": n,
        "K": k,
        "KP": storage["perm"].numel() if indexed else k,
        **constants(traits, p.shape, group_lookup="slice_group" in storage, indexed=indexed),
    }


def scaler_tensors(traits: layout.WeightOnlyTraits) -> tuple[str, ...]:
    """Names of the tensors that a format's scaler reads, in its order."""
    from ...triton_kernels import scalers

    return scalers.SCALER_TENSORS[traits.scaler]


def run(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    """x (M, K) contiguous float16 or bfloat16, p in the WEIGHT_ONLY layout -> y (M, N).

    Where x has to be copied, to gather, transpose or transform it, that is done for a slice of its
    rows at a time. Every slice is computed as all rows together would be, so the results are the
    same bits.
    """
    assert p.layout == layouts.WEIGHT_ONLY
    traits = traits_of(problem)
    weight = arguments(p, traits)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], p.shape[0], dtype=x.dtype, device=x.device)
    copied = row_bytes(p, traits, problem)

    def launch(config: configs.GemmConfig) -> Tensor:
        for rows in workspace.slices(x.shape[0], copied):
            _rows(x[rows], y[rows], p, bias, weight, config, problem)
        return y

    config = autotune.best(family(traits), problem, tabled(problem), launch, x.device)
    return autotune.timed_first(problem, config, lambda: launch(config))


def bind(p: PackedWeight, problem: Problem) -> Recorded | None:
    """`run` for this weight and problem alone: from its third call on it only starts kernels. None
    where the rows go by slices."""
    traits = traits_of(problem)
    if not workspace.fits(problem.m, row_bytes(p, traits, problem)):
        return None

    def compute(
        x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem, y: Tensor, work: Work
    ) -> None:
        config = autotune.tuned(family(traits), problem) or tabled(problem)
        _rows(x, y, p, bias, arguments(p, traits), config, problem, work)

    return Recorded(run, compute, Replay)


def row_bytes(p: PackedWeight, traits: layout.WeightOnlyTraits, problem: Problem) -> int:
    """Scratch memory that a row of x takes in `_rows`, without partial sums."""
    n, k = p.shape
    size = 0
    if traits.outliers and problem.m >= TRANSPOSE_ROWS:
        size += 2 * k
    if traits.transform_scales:
        size += 2 * (traits.group_size if traits.codebook else k) + 4 * n
    if "perm" in p.storage and problem.m >= GATHER_ROWS:
        size += 2 * p.storage["perm"].numel()
    return size


def _rows(
    x: Tensor,
    y: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    weight: dict[str, Any],
    config: configs.GemmConfig,
    problem: Problem,
    work: Work = NOW,
) -> None:
    """The product of some rows of x, into the same rows of y. `problem` is that of all rows."""
    traits = traits_of(problem)
    held = x.shape[0] * row_bytes(p, traits, problem)
    # What the kernel reads and how transforms are cut goes by all rows, lest the last slice differ.
    few = problem.m <= transforms.DECODE_ROWS or problem.batch_invariant
    sparse_x = x
    if traits.outliers:
        strides = (x.shape[1], 1)
        if problem.m >= TRANSPOSE_ROWS:
            sparse_x, strides = work.transposed(x), (1, x.shape[0])
        weight = {**weight, "outlier_args": (*_outliers(p), *strides)}
    if traits.transform_scales:
        x = transforms.before(x, p.storage, traits.transform_scales[0], traits.codebook, few, work)
    if weight["PERMUTED"] and problem.m >= GATHER_ROWS:
        x = _gathered(x, weight["perm_ptr"], work)
        weight = {**weight, "K": x.shape[1], "KP": x.shape[1], "PERMUTED": False}
    if traits.transform_scales is None:
        _launch(x, sparse_x, y, bias, weight, config, problem, held, work)
        return
    inside = work.empty(tuple(y.shape), torch.float32, y.device)
    _launch(x, sparse_x, inside, None, weight, config, problem, held, work)
    transforms.after(inside, y, p.storage, traits.transform_scales[1], bias, few, work)


def configuration(problem: Problem) -> str:
    """What `explain` says."""
    return autotune.words(family(traits_of(problem)), problem, tabled(problem))


def _launch(
    x: Tensor,
    sparse_x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    weight: dict[str, Any],
    config: configs.GemmConfig,
    problem: Problem,
    held: int = 0,
    work: Work = NOW,
) -> None:
    """The kernel on some rows of the problem. sparse_x: what outliers multiply. held: bytes of
    scratch memory taken already."""
    from ...triton_kernels.weight_only import weight_only_gemm

    m, n = y.shape
    blocks_n, blocks_m = -(-n // config.block_n), -(-m // config.block_m)
    tiles = -(-weight["KP"] // (16 * 32 // weight["WIDTH"]))
    # In how many shares K is summed goes by all rows of the problem, and so does each row's result.
    counted = blocks_n if problem.batch_invariant else blocks_n * -(-problem.m // config.block_m)
    k_slices = configs.k_slices_of(config, tiles, counted, sm_count(x.device))
    split = split_of(k_slices, blocks_n * blocks_m, config, held)
    partial = counter = weight["qdata_ptr"]  # what is never read still needs an address
    if split > 1:
        elements = split * blocks_n * blocks_m * config.block_n * config.block_m
        partial = work.empty((elements,), torch.float32, x.device)
        counter = workspace.counters(x.device)
    fixed = {
        "M": m,
        "HAS_BIAS": bias is not None,
        "UPCAST": x.dtype == torch.bfloat16 and interpreted(),
        "WAIT": overtakes(configs.architecture(problem.capability)),
        "POST_SCALE": scaled_after(weight, config, problem),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "K_SLICES": k_slices,
        "SPLIT_K": split,
        "GROUP_N": config.group_n,
        "WARPS": config.num_warps,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "outlier_args": (),
        "FOLDED": folded(weight, config, problem),
        "PREFETCH": prefetch(config.block_m),
        **pdl(x.device),
        **weight,
    }
    slots = ("x_ptr", "sparse_x_ptr", "bias_ptr", "y_ptr", "partial_ptr", "counter_ptr")
    launch = Launch(weight_only_gemm, (blocks_n * blocks_m, split), fixed, slots)
    work.start(launch, x, sparse_x, x if bias is None else bias, y, partial, counter)


def folded(weight: dict[str, Any], config: configs.GemmConfig, problem: Problem) -> bool:
    """Whether the runs of a tile go to columns of their own: where those that x leaves free of a
    dot's least number suffice.

    Not in batch-invariant mode: it sums in another order.
    """
    runs = _runs(weight)
    fits = runs > 1 and problem.m * runs <= config.block_m
    return (
        fits and config.block_m == 16 and not weight["LAST_SCALE"] and not problem.batch_invariant
    )


def scaled_after(weight: dict[str, Any], config: configs.GemmConfig, problem: Problem) -> bool:
    """The kernel's POST_SCALE: also where there is but one dot a tile, so that its sums are taken
    out once.

    Not where a tile has many runs: with a dot for each of its four, q4_k took 1.2 times as long at
    M = 16 as with scaled weights.
    """
    if problem.batch_invariant:
        return config.post_scale
    runs = _runs(weight)
    return (config.post_scale and runs <= MOST_DOTS) or (runs == 1 and config.block_m == 16)


def _runs(weight: dict[str, Any]) -> int:
    """Runs of a tile."""
    return int(16 * 32 // weight["WIDTH"] // weight["SCALE_GROUP"])


def split_of(k_slices: int, blocks: int, config: configs.GemmConfig, held: int = 0) -> int:
    """Programs along K: one a share, or one for all where the workspace or the counters would not
    do.

    held: bytes of the workspace that others have.
    """
    needed = held + k_slices * blocks * config.block_m * config.block_n * 4
    return k_slices if needed <= workspace.BYTES and blocks <= workspace.MAX_BLOCKS else 1


def _outliers(p: PackedWeight) -> tuple[Tensor, Tensor]:
    """Where they are, and what."""
    offsets, values = p.storage["outlier.row_offsets"], p.storage["outlier.col_vals"]
    # an empty tensor has no address
    return (offsets, values) if values.numel() else (offsets, offsets)


def _gathered(x: Tensor, perm: Tensor, work: Work) -> Tensor:
    """x (M, K) -> (M, KP) in kernel order, zeros where it is padded."""
    from ...triton_kernels.gather import gather_columns

    m, kp = x.shape[0], perm.numel()
    y = work.empty((m, kp), x.dtype, x.device)
    fixed = {"K": x.shape[1], "KP": kp, "BLOCK": 1024, **pdl(x.device)}
    work.start(
        Launch(gather_columns, (m, -(-kp // 1024)), fixed, ("x_ptr", "perm_ptr", "y_ptr")),
        x,
        perm,
        y,
    )
    return y
