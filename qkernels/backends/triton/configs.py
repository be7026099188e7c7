"""Kernel configurations: block sizes and launch options, in one table.

The key is the kernel family, the architecture and the shape class of M. An entry for architecture 0
is a starting point that fits every architecture; an entry for one architecture overrides it.
`fitted` shrinks a configuration that does not fit in shared memory, so a kernel is only launched
with a configuration that fits. On-device tuning (autotune.py) replaces the table's entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

#: shared memory that one block may use, KiB, by architecture (CUDA programming guide, compute
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
#: bytes that triton may add to the buffers of the pipeline, for conversions and barriers
_SHARED_MARGIN = 8 * 1024
#: the same where decoded weights pass through shared memory
_DECODED_MARGIN = 6 * 1024


class GemmConfig(NamedTuple):
    """One kernel configuration.

    block_m, block_n: rows of x and rows of W that one program multiplies.
    post_scale: scale the sums instead of the weights, where a tile has few scales a row.
    k_slices: slices K is cut into. 0: as many as give each SM `resident` blocks.
    group_n: blocks of N that run next to each other.
    resident: see k_slices.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    post_scale: bool = False
    k_slices: int = 1
    group_n: int = 8
    resident: int = 2


class StepSizes(NamedTuple):
    """What one step along K needs, from which the shared memory of a block follows.

    features: features of the step.
    row_bytes: packed bytes of one output row.
    row_scratch: bytes per output row through which codes change threads, besides the pipeline.
    decoded: bytes per output row through which decoded weights change threads: with up to 16 rows
        of x in a block, and with more.
    """

    features: int
    row_bytes: int
    row_scratch: int = 0
    decoded: tuple[int, int] = (0, 0)


#: (family, architecture or 0 for any, class of M) -> configuration. A family without an entry takes
#: the entry of the family before the dot: "weight_only" for "weight_only.bytes". The entries of
#: sm_90 were measured (bench/results/2026-11-27-h200/configurations.md), except "middle" and
#: "prefill" of "weight_only.codebook".
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
    # Blackwell keeps accumulators in tensor memory: few columns are cheap, reading them is not.
    ("weight_only", 100, "decode"): GemmConfig(16, 128, 8, 4, post_scale=False, k_slices=0),
    ("weight_only", 100, "middle"): GemmConfig(64, 128, 8, 3, k_slices=0),
    # A step of 2- or 3-bit codes has 256 features: twice as many decoded values in registers.
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
    # Each code looks up eight weights. With more columns, mma.sync's warps would decode them twice.
    ("weight_only.codebook", 0, "decode"): GemmConfig(16, 64, 4, 3, k_slices=0),
    ("weight_only.codebook", 0, "middle"): GemmConfig(16, 64, 4, 3, k_slices=0),
    ("weight_only.codebook", 0, "prefill"): GemmConfig(16, 64, 4, 3),
    ("weight_only.codebook", 80, "decode"): GemmConfig(16, 128, 8, 3, k_slices=0),
    ("weight_only.codebook", 80, "middle"): GemmConfig(16, 128, 8, 3, k_slices=0),
    ("weight_only.codebook", 90, "decode"): GemmConfig(16, 64, 4, 3, k_slices=0, resident=4),
    ("weight_only.codebook", 90, "middle"): GemmConfig(64, 64, 4, 3, k_slices=0),
    ("weight_only.codebook", 90, "prefill"): GemmConfig(64, 64, 4, 3),
    ("weight_only.codebook", 100, "middle"): GemmConfig(64, 64, 4, 3, k_slices=0),
    ("weight_only.codebook", 100, "prefill"): GemmConfig(64, 128, 8, 3),
    ("eight_bit.int8", 0, "decode"): GemmConfig(16, 64, 4, 5, k_slices=0),
    ("eight_bit.int8", 0, "middle"): GemmConfig(64, 64, 4, 4, k_slices=0),
    ("eight_bit.int8", 0, "prefill"): GemmConfig(128, 128, 8, 3),
    ("eight_bit.int8", 90, "decode"): GemmConfig(16, 128, 8, 7, k_slices=0, resident=1),
    ("eight_bit.int8", 90, "middle"): GemmConfig(64, 64, 4, 5, k_slices=0),
    ("eight_bit.int8", 90, "batch"): GemmConfig(128, 64, 4, 4),
    # Three stages, not four: two blocks fit on an SM. With 256 columns triton 3.6 spills.
    ("eight_bit.int8", 90, "prefill"): GemmConfig(128, 128, 8, 3, group_n=32),
    ("eight_bit.fp8", 0, "decode"): GemmConfig(16, 64, 4, 5, k_slices=0),
    ("eight_bit.fp8", 0, "middle"): GemmConfig(64, 64, 4, 4, k_slices=0),
    ("eight_bit.fp8", 90, "decode"): GemmConfig(16, 128, 8, 7, k_slices=0, resident=1),
    ("eight_bit.fp8", 90, "middle"): GemmConfig(64, 64, 4, 5, k_slices=0),
    # On sm_90 the registers hold the sums of a step and the total: wider blocks spill.
    ("eight_bit.fp8", 90, "prefill"): GemmConfig(128, 64, 4, 4, group_n=32),
    ("eight_bit.fp8", 0, "prefill"): GemmConfig(128, 128, 8, 4),
    ("eight_bit.block", 0, "decode"): GemmConfig(16, 64, 4, 5, k_slices=0),
    ("eight_bit.block", 0, "middle"): GemmConfig(64, 64, 4, 4, k_slices=0),
    ("eight_bit.block", 0, "prefill"): GemmConfig(128, 128, 8, 4),
    # The sums of each step go from tensor memory through registers, where they are scaled.
    ("eight_bit.block", 100, "prefill"): GemmConfig(64, 128, 8, 4),
}
#: entries that replace those of TABLE in the kernels of experts, with the same keys. These kernels
#: hold a little more in registers (slots, offsets of the expert's weights), so a configuration that
#: just fits the other kernels would spill.
EXPERTS: dict[tuple[str, int, str], GemmConfig] = {
    # Not measured yet: the entries for any architecture.
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
    # Weights are scaled, because the sums of a tile need registers besides the total.
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
#: the families that have entries of their own
FAMILIES = frozenset(name for name, *_ in TABLE)
#: configurations of batch-invariant mode, where the order of the sum over K must not depend on M:
#: everything except block_m is the same for every M
BATCH_INVARIANT = {
    "weight_only": GemmConfig(16, 64, 4, 4, post_scale=True, k_slices=0),
    "weight_only.wide": GemmConfig(16, 64, 4, 4, post_scale=True, k_slices=0),
    "weight_only.two_level": GemmConfig(16, 64, 4, 3, post_scale=True, k_slices=0),
    "weight_only.codebook": GemmConfig(16, 64, 4, 3, k_slices=0),
    "eight_bit.int8": GemmConfig(16, 64, 4, 4, k_slices=0),
    "eight_bit.fp8": GemmConfig(16, 64, 4, 4, k_slices=0),
    "eight_bit.block": GemmConfig(16, 64, 4, 4, k_slices=0),
}
_INVARIANT_BLOCK_M = {"decode": 16, "middle": 64, "prefill": 64}


def m_class(m: int) -> str:
    """Shape class of M: "decode" up to 16 rows, "middle" up to 128, "prefill" above."""
    return "decode" if m <= 16 else "middle" if m <= 128 else "prefill"


def _classes(m: int) -> tuple[str, ...]:
    """The classes of M whose entries apply, the narrowest first.

    Three narrow classes are parts of "middle" and "prefill": "small", "large" and "batch".
    """
    narrow = (("small", 17, 32), ("large", 65, 128), ("batch", 129, 256))
    return (*(name for name, least, most in narrow if least <= m <= most), m_class(m))


def architecture(capability: tuple[int, int] | None) -> int:
    """8.6 -> 86; 0 without a GPU."""
    return 0 if capability is None else capability[0] * 10 + capability[1]


def _tabled(family: str, arch: int, m: int, experts: bool) -> GemmConfig:
    for name in (family, family.split(".")[0]):
        for table in (EXPERTS, TABLE) if experts else (TABLE,):
            for table_arch in (arch, arch // 10 * 10, 0):
                for class_ in _classes(m):
                    if (name, table_arch, class_) in table:
                        return table[name, table_arch, class_]
    raise KeyError(family)


def choose(
    family: str,
    arch: int,
    m: int,
    batch_invariant: bool,
    sizes: StepSizes,
    *,
    experts: bool = False,
) -> GemmConfig:
    """The table's configuration for M rows, shrunk until it fits `arch`.

    experts: whether it is for a kernel of experts; m is then the rows of one expert.
    """
    config = _tabled(family, arch, m, experts)
    if batch_invariant:
        name = family if family in BATCH_INVARIANT else family.split(".")[0]
        config = BATCH_INVARIANT[name]._replace(block_m=_INVARIANT_BLOCK_M[m_class(m)])
    return fitted(config, arch, sizes)


def fitted(config: GemmConfig, arch: int, sizes: StepSizes) -> GemmConfig:
    """`config`, with fewer stages and then smaller blocks until it fits in shared memory.

    Raises:
        ValueError: not even the smallest blocks fit.
    """
    limit = SHARED_KIB.get(arch, 99) * 1024
    while shared_bytes(config, sizes) > limit:
        if config.num_stages > 2:
            config = config._replace(num_stages=config.num_stages - 1)
        elif config.block_m > 16:
            config = config._replace(block_m=config.block_m // 2)
        elif config.block_n > 64:
            config = config._replace(block_n=config.block_n // 2)
        else:
            raise ValueError(
                f"no configuration fits sm_{arch}: {config} with {sizes.features} features a step"
            )
    return config


def shared_bytes(config: GemmConfig, sizes: StepSizes) -> int:
    """An upper bound of the shared memory of one block, in bytes.

    It is the largest of three needs: the pipeline, the transposition in the epilogue, and the
    pipeline while decoded weights change threads. The last happens only for mma.sync, which has
    already read the oldest stage into registers by then.
    """
    stage = config.block_n * sizes.row_bytes + config.block_m * sizes.features * 2
    pipeline = config.num_stages * stage + config.block_n * sizes.row_scratch
    epilogue = config.block_m * config.block_n * 4
    scratch = config.block_n * sizes.decoded[config.block_m > 16]
    decoding = (config.num_stages - 1) * stage + scratch + _DECODED_MARGIN if scratch else 0
    return max(max(pipeline, epilogue) + _SHARED_MARGIN, decoding)


def k_slices_of(config: GemmConfig, tiles: int, blocks: int, sm_count: int) -> int:
    """Slices to cut `tiles` tiles of K into, for a grid of `blocks` blocks; no slice is empty."""
    k_slices = config.k_slices
    if k_slices == 0:
        k_slices = max(1, min(config.resident * sm_count // blocks, tiles // 2, 32))
    slice_tiles = -(-tiles // min(k_slices, tiles))
    return -(-tiles // slice_tiles)


def candidates(config: GemmConfig, m: int) -> Iterator[GemmConfig]:
    """The configurations that autotuning tries: the table's entry first, then similar ones."""
    yield config
    blocks_m = {"decode": (16,), "middle": (32, 64), "prefill": (64, 128, 256)}[m_class(m)]
    for block_m in blocks_m:
        for block_n, num_warps in ((64, 4), (128, 4), (128, 8)):
            for num_stages in (3, 4, 6) if m_class(m) == "decode" else (2, 3, 4):
                for post_scale in (True, False) if m_class(m) != "prefill" else (False,):
                    for k_slices in (0, 1, 4, 8) if m_class(m) != "prefill" else (1,):
                        candidate = GemmConfig(
                            block_m, block_n, num_warps, num_stages, post_scale, k_slices
                        )
                        if candidate != config:
                            yield candidate
