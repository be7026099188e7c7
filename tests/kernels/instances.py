"""Cases that run one kernel in one way, so that what belongs to the kernel is tested once for them.

Many formats share a kernel instance: the same sums in the same order with other codes. Each format
is compared with the reference in test_weight_only.py and test_eight_bit.py; properties that hold
for an instance (its bits do not depend on M, its plans are kept) are tested once for each
instance. On a GPU they are tested for every case: there the compiler makes its own of each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest

import qkernels as qk
from qkernels.backends.triton import eight_bit, weight_only
from qkernels.layouts.codecs import SLICE
from qkernels.layouts.eight_bit import EightBitTraits
from qkernels.layouts.weight_only import WeightOnlyTraits

from ..conftest import CASES, DEVICE, case_id, k_of, layout_of

Case = tuple[str, dict[str, Any]]
SHAPE = (40, 576)


def traits_of(case: Case) -> WeightOnlyTraits | EightBitTraits:
    """How the kernel family of a case's layout treats its format."""
    name, params = case
    fmt, shape = qk.formats.get(name), (SHAPE[0], k_of(name, SHAPE[1]))
    params = {key: value for key, value in params.items() if key not in fmt.quantize_only}
    if layout_of(*case) == "weight_only":
        return fmt.weight_only_traits(shape, fmt.resolve(shape, params))
    return fmt.eight_bit_traits(shape, fmt.resolve(shape, params))


def decoder_of(case: Case) -> Hashable:
    """What turns a case's codes into numbers."""
    traits = traits_of(case)
    if isinstance(traits, WeightOnlyTraits):
        return traits.decoder, traits.bits
    return traits.kind, traits.weight_scale


def sums_of(case: Case) -> Hashable:
    """All that decides which kernels a product launches, and in which order it sums.

    Not the decoder and not where scales lie: both give the same number for a weight whatever it is
    summed with.
    """
    traits = traits_of(case)
    if isinstance(traits, EightBitTraits):
        zero = "input_zero_point" in case[1]
        return eight_bit.family(traits), traits.activation, traits.threshold > 0, zero
    scale_groups = traits.codes.tile // weight_only.layout.scale_group(
        traits, SHAPE[1], group_lookup=traits.group_size % SLICE > 0
    )
    return (
        weight_only.family(traits),
        min(scale_groups, weight_only.MOST_DOTS + 1),
        traits.scales.zero,
        traits.group_size >= SHAPE[1],
        traits.group_size % SLICE > 0 or bool(case[1].get("act_order")),
        traits.outliers,
        traits.transform_scales is not None,
        traits.codes.codebook,
    )


def launch_of(case: Case) -> Hashable:
    """All that decides which kernels a product launches, with which tensors."""
    traits = traits_of(case)
    scaler = traits.scaler if isinstance(traits, WeightOnlyTraits) else traits.weight_scale
    return sums_of(case), scaler


def one_of_each(key: Callable[[Case], Hashable], cases: list[Case]) -> list[Case]:
    """The first case of each key; on a GPU all cases."""
    if DEVICE == "cuda":
        return cases
    first: dict[Hashable, Case] = {}
    for case in cases:
        first.setdefault(key(case), case)
    return list(first.values())


FUSED = [case for case in CASES if layout_of(*case) is not None]


def parametrized(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "params"), cases, ids=map(case_id, cases))


fused_cases = parametrized(FUSED)
#: one case of each way to sum
cases_by_sums = parametrized(one_of_each(sums_of, FUSED))
#: one case of each way to launch
cases_by_launch = parametrized(one_of_each(launch_of, FUSED))
