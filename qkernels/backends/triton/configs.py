"""Tile sizes and launch options: one table per kernel family, keyed by architecture and shape
class.

The tables hold starting points that fit every architecture; an entry for one architecture overrides
the generic one. `fitted` shrinks what would not fit in shared memory, so no configuration that an
architecture cannot launch ever reaches it. On-device tuning (autotune.py) replaces a table's entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

#: shared memory one block may use, KiB, by architecture (CUDA programming guide, compute
#: capabilities)
SHARED_KIB = {
    80: 163,
    86: 99,
    87: 163,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    110: 227,
    120: 99,
    121: 99,
}
#: kept free for what triton adds to the pipeline's buffers: conversions, barriers; and to those of
#: decoded weights
_SHARED_MARGIN, _DECODED_MARGIN = 8 * 1024, 6 * 1024


class GemmConfig(NamedTuple):
    """One kernel configuration.

    post_scale: scale sums instead of weights, where a tile has few scales a row.
    shares: parts K is cut into; 0: as many as give each multiprocessor `resident` blocks.
    group_n: blocks of N that run next to each other.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    post_scale: bool = False
    k_slices: int = 1
    group_n: int = 8
    resident: int = 2


#: (family, architecture or 0 for any, class of M) -> configuration. A family without an entry of
#: its own takes
#: that of the family it is named after, "weight_only" for "weight_only.bytes". Those of sm_90 were
#: measured
#: (bench/results/2026-11-27-h200/configurations.md), but for the vectors family's middle and
#: prefill.
TABLE: dict[tuple[str, int, str], GemmConfig] = {
    ("weight_only", 0, "decode"): GemmConfig(16, 64, 4, 5, post_scale=True, k_slices=0),
    ("weight_only", 0, "middle"): GemmConfig(64, 64, 4, 3, post_scale=False, k_slices=0),
    ("weight_only", 0, "prefill"): GemmConfig(128, 128, 8, 3),
    ("weight_only", 90, "decode"): GemmConfig(16, 128, 8, 7, post_scale=True, k_slices=0),
    ("weight_only", 90, "small"): GemmConfig(32, 128, 8, 4, post_scale=True, k_slices=0),
    ("weight_only", 90, "middle"): GemmConfig(64, 128, 8, 4, post_scale=True, k_slices=0),
    ("weight_only", 90, "large"): GemmConfig(
        128, 128, 8, 3, post_scale=True, k_slices=0, resident=1
    ),
    ("weight_only", 90, "prefill"): GemmConfig(256, 128, 8, 3, k_slices=0, resident=1),
    ("weight_only.bytes", 90, "decode"): GemmConfig(
        16, 64, 4, 4, post_scale=True, k_slices=0, resident=4
    ),
    ("weight_only.bytes", 90, "prefill"): GemmConfig(128, 128, 8, 3, k_slices=0, resident=1),
    # mma.sync keeps both the accumulators and the decoded operand in registers: wider blocks spill.
    ("weight_only", 80, "middle"): GemmConfig(64, 128, 8, 3, k_slices=0),
    ("weight_only", 120, "middle"): GemmConfig(64, 128, 8, 3, k_slices=0),
    ("weight_only", 80, "prefill"): GemmConfig(64, 128, 8, 3),
    ("weight_only", 120, "prefill"): GemmConfig(64, 128, 8, 3),
    # Blackwell keeps accumulators in tensor memory: few columns are cheap, taking them out is not.
    ("weight_only", 100, "decode"): GemmConfig(16, 128, 8, 4, post_scale=False, k_slices=0),
    ("weight_only", 100, "middle"): GemmConfig(64, 128, 8, 3, k_slices=0),
    # Codes of 2 and 3 bits come 256 features a step, twice as many decoded values to hold.
    ("weight_only.wide", 0, "decode"): GemmConfig(16, 64, 4, 5, post_scale=True, k_slices=0),
    ("weight_only.wide", 90, "decode"): GemmConfig(
        16, 64, 4, 3, post_scale=True, k_slices=0, resident=4
    ),
    ("weight_only.wide", 0, "middle"): GemmConfig(64, 64, 4, 3, k_slices=0),
    ("weight_only.wide", 0, "prefill"): GemmConfig(128, 128, 8, 3),
    ("weight_only.wide", 80, "middle"): GemmConfig(32, 128, 8, 3, k_slices=0),
    ("weight_only.wide", 80, "prefill"): GemmConfig(32, 128, 8, 3),
    ("weight_only.wide", 120, "middle"): GemmConfig(32, 128, 8, 3, k_slices=0),
    ("weight_only.wide", 120, "prefill"): GemmConfig(32, 128, 8, 3),
    ("weight_only.wide", 100, "decode"): GemmConfig(16, 128, 8, 4, post_scale=False, k_slices=0),
    ("weight_only.wide", 100, "middle"): GemmConfig(64, 128, 8, 2, k_slices=0),
    ("weight_only.wide", 100, "prefill"): GemmConfig(128, 128, 8, 2),
    ("weight_only.two_level", 0, "decode"): GemmConfig(16, 64, 4, 3, post_scale=True, k_slices=0),
    ("weight_only.two_level", 0, "middle"): GemmConfig(32, 128, 8, 3, k_slices=0),
    ("weight_only.two_level", 0, "prefill"): GemmConfig(32, 128, 8, 3),
    # Each code looks up eight weights, and with more columns mma.sync's warps would decode them
    # twice.
    ("weight_only.vectors", 0, "decode"): GemmConfig(16, 64, 4, 3, k_slices=0),
    ("weight_only.vectors", 0, "middle"): GemmConfig(16, 64, 4, 3, k_slices=0),
    ("weight_only.vectors", 0, "prefill"): GemmConfig(16, 64, 4, 3),
    ("weight_only.vectors", 80, "decode"): GemmConfig(16, 128, 8, 3, k_slices=0),
    ("weight_only.vectors", 80, "middle"): GemmConfig(16, 128, 8, 3, k_slices=0),
    ("weight_only.vectors", 90, "decode"): GemmConfig(16, 64, 4, 3, k_slices=0, resident=4),
    ("weight_only.vectors", 90, "middle"): GemmConfig(64, 64, 4, 3, k_slices=0),
    ("weight_only.vectors", 90, "prefill"): GemmConfig(64, 64, 4, 3),
    ("weight_only.vectors", 100, "middle"): GemmConfig(64, 64, 4, 3, k_slices=0),
    ("weight_only.vectors", 100, "prefill"): GemmConfig(64, 128, 8, 3),
    ("eight_bit.int8", 0, "decode"): GemmConfig(16, 64, 4, 5, k_slices=0),
    ("eight_bit.int8", 0, "middle"): GemmConfig(64, 64, 4, 4, k_slices=0),
    ("eight_bit.int8", 0, "prefill"): GemmConfig(128, 128, 8, 3),
    ("eight_bit.int8", 90, "decode"): GemmConfig(16, 128, 8, 7, k_slices=0, resident=1),
    ("eight_bit.int8", 90, "middle"): GemmConfig(64, 64, 4, 5, k_slices=0),
    ("eight_bit.int8", 90, "batch"): GemmConfig(128, 64, 4, 4),
    # Three stages, not four: two blocks fit on a multiprocessor. With 256 columns triton 3.6
    # spills.
    ("eight_bit.int8", 90, "prefill"): GemmConfig(128, 128, 8, 3, group_n=32),
    ("eight_bit.fp8", 0, "decode"): GemmConfig(16, 64, 4, 5, k_slices=0),
    ("eight_bit.fp8", 0, "middle"): GemmConfig(64, 64, 4, 4, k_slices=0),
    ("eight_bit.fp8", 90, "decode"): GemmConfig(16, 128, 8, 7, k_slices=0, resident=1),
    ("eight_bit.fp8", 90, "middle"): GemmConfig(64, 64, 4, 5, k_slices=0),
    # Sums of one step lie beside the total on sm_90: wider blocks spill.
    ("eight_bit.fp8", 90, "prefill"): GemmConfig(128, 64, 4, 4, group_n=32),
    ("eight_bit.fp8", 0, "prefill"): GemmConfig(128, 128, 8, 4),
    ("eight_bit.block", 0, "decode"): GemmConfig(16, 64, 4, 5, k_slices=0),
    ("eight_bit.block", 0, "middle"): GemmConfig(64, 64, 4, 4, k_slices=0),
    ("eight_bit.block", 0, "prefill"): GemmConfig(128, 128, 8, 4),
    # Out of tensor memory, through registers, for the scales of each step.
    ("eight_bit.block", 100, "prefill"): GemmConfig(64, 128, 8, 4),
}
#: what replaces the table's entries in the kernels of experts, with the same keys: those kernels
#: hold a
#: little more in registers, slots and the weights' offsets, and what just fits otherwise would
#: spill
EXPERTS: dict[tuple[str, int, str], GemmConfig] = {
    # Not measured yet: as on any architecture.
    ("weight_only", 90, "decode"): GemmConfig(16, 64, 4, 5, post_scale=True),
    ("weight_only", 90, "middle"): GemmConfig(64, 64, 4, 3),
    ("weight_only", 90, "prefill"): GemmConfig(128, 128, 8, 3),
    ("weight_only.bytes", 90, "decode"): GemmConfig(16, 64, 4, 5, post_scale=True),
    ("weight_only.wide", 90, "decode"): GemmConfig(16, 64, 4, 5, post_scale=True),
    ("eight_bit.int8", 90, "decode"): GemmConfig(16, 64, 4, 5),
    ("eight_bit.int8", 90, "middle"): GemmConfig(64, 64, 4, 4),
    ("eight_bit.int8", 90, "batch"): GemmConfig(128, 128, 8, 4),
    ("eight_bit.int8", 90, "prefill"): GemmConfig(128, 128, 8, 4),
    ("eight_bit.fp8", 90, "decode"): GemmConfig(16, 64, 4, 5),
    ("eight_bit.fp8", 90, "middle"): GemmConfig(64, 64, 4, 4),
    ("eight_bit.fp8", 90, "prefill"): GemmConfig(128, 128, 8, 4),
    # Weights are scaled, not sums of a tile, which would have to be held beside the total.
    ("weight_only", 120, "decode"): GemmConfig(16, 64, 4, 5, post_scale=False),
    ("weight_only.wide", 80, "middle"): GemmConfig(16, 128, 8, 3),
    ("weight_only.wide", 80, "prefill"): GemmConfig(16, 128, 8, 3),
    ("weight_only.wide", 120, "middle"): GemmConfig(16, 128, 8, 3),
    ("weight_only.wide", 120, "prefill"): GemmConfig(16, 128, 8, 3),
    ("weight_only.wide", 90, "prefill"): GemmConfig(64, 128, 8, 3),
    ("weight_only.wide", 100, "prefill"): GemmConfig(64, 128, 8, 2),
    ("eight_bit.block", 80, "prefill"): GemmConfig(64, 128, 8, 4),
    ("eight_bit.block", 90, "prefill"): GemmConfig(64, 128, 8, 4),
}
#: the order of the sum over K must not depend on M here: all but block_m is the same for every M
BATCH_INVARIANT = {
    "weight_only": GemmConfig(16, 64, 4, 4, post_scale=True, k_slices=0),
    "weight_only.wide": GemmConfig(16, 64, 4, 4, post_scale=True, k_slices=0),
    "weight_only.two_level": GemmConfig(16, 64, 4, 3, post_scale=True, k_slices=0),
    "weight_only.vectors": GemmConfig(16, 64, 4, 3, k_slices=0),
    "eight_bit.int8": GemmConfig(16, 64, 4, 4, k_slices=0),
    "eight_bit.fp8": GemmConfig(16, 64, 4, 4, k_slices=0),
    "eight_bit.block": GemmConfig(16, 64, 4, 4, k_slices=0),
}
_INVARIANT_BLOCK_M = {"decode": 16, "middle": 64, "prefill": 64}


def m_class(m: int) -> str:
    """Shape class of M: "decode" up to 16 rows, "middle" up to 128, "prefill" above."""
    return "decode" if m <= 16 else "middle" if m <= 128 else "prefill"


def _classes(m: int) -> tuple[str, ...]:
    """The classes of M whose entries hold, the narrowest first: parts of "middle" and "prefill" may
    have their own.
    """
    parts = (("small", 17, 32), ("large", 65, 128), ("batch", 129, 256))
    return (*(name for name, least, most in parts if least <= m <= most), m_class(m))


def architecture(capability: tuple[int, int] | None) -> int:
    """8.6 -> 86; 0 without a GPU."""
    return 0 if capability is None else capability[0] * 10 + capability[1]


def _tabled(family: str, arch: int, m: int, experts: bool) -> GemmConfig:
    for name in (family, family.split(".")[0]):
        for table in (EXPERTS, TABLE) if experts else (TABLE,):
            for known in (arch, arch // 10 * 10, 0):
                for of_m in _classes(m):
                    if (name, known, of_m) in table:
                        return table[name, known, of_m]
    raise KeyError(family)


def choose(
    family: str,
    arch: int,
    m: int,
    batch_invariant: bool,
    tile: int,
    row_bytes: int,
    row_scratch: int = 0,
    decoded: tuple[int, int] = (0, 0),
    *,
    experts: bool = False,
) -> GemmConfig:
    """The table's configuration for M rows, of each expert with `experts`, made to fit `arch`.

    tile, row_bytes, row_scratch, decoded: as in `fitted`.
    """
    config = _tabled(family, arch, m, experts)
    if batch_invariant:
        name = family if family in BATCH_INVARIANT else family.split(".")[0]
        config = BATCH_INVARIANT[name]._replace(block_m=_INVARIANT_BLOCK_M[m_class(m)])
    return fitted(config, arch, tile, row_bytes, row_scratch, decoded)


def fitted(
    config: GemmConfig,
    arch: int,
    tile: int,
    row_bytes: int,
    row_scratch: int = 0,
    decoded: tuple[int, int] = (0, 0),
) -> GemmConfig:
    """`config`, with fewer stages and then narrower blocks until it fits in shared memory.

    tile: features of one step along K. row_bytes: packed bytes of one step, per output row.
    row_scratch: bytes per output row that codes need, beside the pipeline, to change hands between
    threads. decoded: the same of decoded weights, with up to 16 rows of x in a block and with more.
    """
    limit = SHARED_KIB.get(arch, 99) * 1024
    while shared_bytes(config, tile, row_bytes, row_scratch, decoded) > limit:
        if config.num_stages > 2:
            config = config._replace(num_stages=config.num_stages - 1)
        elif config.block_m > 16:
            config = config._replace(block_m=config.block_m // 2)
        elif config.block_n > 64:
            config = config._replace(block_n=config.block_n // 2)
        else:
            raise ValueError(
                f"no configuration fits sm_{arch}: {config} with {tile} features a step"
            )
    return config


def shared_bytes(
    config: GemmConfig,
    tile: int,
    row_bytes: int,
    row_scratch: int = 0,
    decoded: tuple[int, int] = (0, 0),
) -> int:
    """At most this much shared memory: of the pipeline, or of the epilogue's transposition if that
    is larger.

    A step's decoded weights only change hands for mma.sync, which takes the oldest stage into
    registers before.
    """
    stage = config.block_n * row_bytes + config.block_m * tile * 2
    needed = max(
        config.num_stages * stage + config.block_n * row_scratch,
        config.block_m * config.block_n * 4,
    )
    scratch = config.block_n * decoded[config.block_m > 16]
    through = (config.num_stages - 1) * stage + scratch + _DECODED_MARGIN if scratch else 0
    return max(needed + _SHARED_MARGIN, through)


def k_slices_of(config: GemmConfig, tiles: int, blocks: int, sm_count: int) -> int:
    """Parts to cut K of `tiles` tiles into when the grid has `blocks` blocks; none of them empty."""
    k_slices = config.k_slices
    if k_slices == 0:
        k_slices = max(1, min(config.resident * sm_count // blocks, tiles // 2, 32))
    k_slice = -(-tiles // min(k_slices, tiles))
    return -(-tiles // k_slice)


def candidates(config: GemmConfig, m: int) -> Iterator[GemmConfig]:
    """What autotuning tries: the table's entry first, then its neighbourhood."""
    yield config
    blocks_m = {"decode": (16,), "middle": (32, 64), "prefill": (64, 128, 256)}[m_class(m)]
    for block_m in blocks_m:
        for block_n, num_warps in ((64, 4), (128, 4), (128, 8)):
            for num_stages in (3, 4, 6) if m_class(m) == "decode" else (2, 3, 4):
                for post_scale in (True, False) if m_class(m) != "prefill" else (False,):
                    k_slices = (0, 1, 4, 8) if m_class(m) != "prefill" else (1,)
                    for k_slice in k_slices:
                        found = GemmConfig(
                            block_m, block_n, num_warps, num_stages, post_scale, k_slice
                        )
                        if found != config:
                            yield found
