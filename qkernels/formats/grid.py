"""Integer grids, shared by GPTQ, AWQ and pack_quantized: w = scale * (code - zero) in groups of K.

Input feature k belongs to group k // group_size, except with act-order, where an index says the
group of each feature. Where group_size does not divide K the last group is short: there are
ceil(K / group_size) groups. Round-to-nearest chooses scale and zero from a group's range, as GPTQ's
quantizer does: the range always contains 0; symmetric grids put the zero at 2^(bits-1).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .types import Params

SMALLEST_NORMAL_FP16 = 2.0**-14
#: The smallest group sizes that `default_group_size` chooses: a power of two, and any divisor of K
#: for formats without a short last group.
SMALLEST_POWER, SMALLEST_DIVISOR = 32, 16


class Grid(NamedTuple):
    """A weight on an integer grid: w = scale[n, g] * (code[n, k] - zero[n, g]), g = group_of[k].

    Attributes:
        codes: uint8 (N, K).
        scale: 16- or 32-bit float (N, G).
        zero: uint8 (N, G).
        group_size: input features in a group, -1 for all.
        group_of: int32 (K), the group of each input feature; None where it is k // group_size.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int
    group_of: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight, (N, K) float32."""
        group_of = None if self.group_of is None else self.group_of.long()
        return decode(
            self.codes.T, self.scale.T, self.zero.T, self.group_size, group_of
        ).contiguous()

    def group_index(self) -> Tensor:
        """int32 (K), the group of each input feature, also where `group_of` is None."""
        if self.group_of is None:
            return consecutive_groups(self.codes, self.group_size)
        return self.group_of

    def in_order(self, group_size: int) -> bool:
        """Whether the group of feature k is k // group_size."""
        return torch.equal(self.group_index(), consecutive_groups(self.codes, group_size))


def check_group_size(fmt: str, k: int, size: int, short: bool) -> None:
    """Raise ValueError unless `size` is -1 or a group size for K features.

    short: whether the last group may be short; otherwise `size` must divide K.
    """
    if size == -1 or (size >= 1 and (short or k % size == 0)):
        return
    if short:
        raise ValueError(f"{fmt}: group_size: expected -1 or at least 1, got {size}")
    raise ValueError(
        f"{fmt}: group_size: expected -1 or a divisor of K={k}, because {fmt} stores no short "
        f"last group, got {size}"
    )


def default_group_size(sizes: list[int], default: int, short: bool) -> int:
    """One group size for weights with `sizes` input features, where `default` does not divide all.

    That is the largest power of two that divides every size, because other kernels take it, too.
    If there is none, it is `default` for formats with a `short` last group, and the largest divisor
    for the others.
    """
    common = math.gcd(*sizes)
    powers = (1 << i for i in range(default.bit_length() - 1, SMALLEST_POWER.bit_length() - 2, -1))
    divisors = [] if short else range(default, SMALLEST_DIVISOR - 1, -1)
    divisor = next((size for size in (*powers, *divisors) if common % size == 0), None)
    return divisor or (default if short else -1)


def consecutive_groups(codes: Tensor, group_size: int) -> Tensor:
    """k // group_size for the K features of codes (N, K), int32 (K)."""
    k = codes.shape[1]
    return torch.arange(k, dtype=torch.int32, device=codes.device) // (
        k if group_size == -1 else group_size
    )


def group_count(k: int, group_size: int) -> int:
    """Number of groups along K, the last of which may be short; group_size -1 means one group."""
    return 1 if group_size == -1 else -(-k // group_size)


def split_groups(values: Tensor, group_size: int) -> Tensor:
    """Values (N, K) -> (N, G, g). Zeros pad a short last group, because they widen no range."""
    n, k = values.shape
    size = k if group_size == -1 else min(group_size, k)
    if k % size:
        values = torch.nn.functional.pad(values, (0, -k % size))
    return values.reshape(n, -1, size)


def check_group_index(fmt: str, name: str, index: Tensor, k: int, params: Params) -> None:
    """Raise ValueError unless the values of `index` (K) are numbers of groups."""
    g = group_count(k, params["group_size"])
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= g:
        raise ValueError(f"{fmt}: {name}: expected values in [0, {g}), got {low}..{high}")


def round_to_nearest(weight: Tensor, params: Params) -> Grid:
    """The grid of weight (N, K) for the parameters bits, group_size, symmetric and act_order."""
    (n, k), size = weight.shape, params["group_size"]
    act_order = params.get("act_order", False)
    if act_order:
        # Without calibration data every input counts the same, so the Hessian's diagonal gives no
        # order. Columns of similar norm share a group instead.
        order = weight.square().sum(0).argsort(descending=True, stable=True)
        weight = weight[:, order]
    grouped = split_groups(weight, size)
    scale, zero = fit(grouped, params["bits"], params["symmetric"])
    codes = encode(grouped, scale, zero, params["bits"]).view(n, -1)[:, :k].contiguous()
    if not act_order:
        return Grid(codes, scale, zero, size)
    original, group_of = torch.empty_like(codes), consecutive_groups(codes, size)
    original[:, order] = codes
    return Grid(original, scale, zero, size, group_of.scatter(0, order, group_of))


def fit(grouped: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group: (N, G, g) float32 -> scale fp16 (N, G), zero uint8 (N, G).

    Raises ValueError if a scale does not fit float16, the dtype that checkpoints store.
    """
    top = (1 << bits) - 1
    low = grouped.amin(-1).clamp(max=0)
    high = grouped.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = (high - low) / top
    if bool((scale > torch.finfo(torch.float16).max).any()):
        raise ValueError(
            f"weight: expected scales below 65504 (float16), got {scale.max().item():.6g}"
        )
    # An all-zero group gets scale 1 (its codes are all `zero`). A subnormal scale would lose bits.
    scale = torch.where(high > low, scale.clamp(min=SMALLEST_NORMAL_FP16), torch.ones_like(scale))
    scale = scale.half()
    if symmetric:
        zero = torch.full_like(scale, (top + 1) // 2)
    else:
        zero = torch.round(-low / scale.float()).clamp(0, top)
    return scale, zero.to(torch.uint8)


def encode(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest codes uint8 (N, G, g), rounded with the stored scale (float16)."""
    codes = torch.round(grouped / scale.float()[..., None]) + zero.float()[..., None]
    return codes.clamp(0, (1 << bits) - 1).to(torch.uint8)


def decode(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, group_of: Tensor | None = None
) -> Tensor:
    """Codes (K, N), scales and zeros (G, N) -> weight (N, K) float32, a view with N contiguous.

    group_of: int (K), the group of each input feature; None where it is k // group_size.
    The result is exact in float32: an integer of at most 9 bits times a 16-bit scale.
    """
    k, n = codes.shape
    steps, scales, zeros = codes.float(), scales.float(), zeros.float()
    if group_of is None:
        size = k if group_size == -1 else group_size
        whole = k // size  # whole groups; a short group may follow
        full, rest = steps[: whole * size].view(whole, size, n), steps[whole * size :]
        full.sub_(zeros[:whole, None]).mul_(scales[:whole, None])
        rest.sub_(zeros[whole:]).mul_(scales[whole:])
    else:
        steps.sub_(zeros[group_of]).mul_(scales[group_of])
    return steps.T


def cut_sizes(params: dict[str, Any], codes: int) -> tuple[int, int]:
    """`Format.cuts` where `codes` neighbouring codes fill whole words, along rows and columns."""
    size = params["group_size"]
    return codes, codes if size == -1 else math.lcm(size, codes)


def cut_groups(index: Tensor, group_size: int, begin: int, end: int) -> tuple[Tensor, Tensor, int]:
    """Groups of the columns begin..end-1 of a weight in act-order.

    If no other column belongs to the groups of these columns (static groups), the part has exactly
    those groups. Otherwise other columns share them: the part gets a copy of every group it uses,
    and its group_size only states their number. Where no group_size states so small a number, the
    last group is repeated.

    Args:
        index: int32 (end - begin), the group of each column, already cut out.

    Returns:
        (new group of each column; int64, the old group of each new one; group_size).
    """
    if group_size == -1:
        return index, torch.zeros(1, dtype=torch.int64, device=index.device), -1
    first, last = begin // group_size, group_count(end, group_size)
    if int(index.min()) >= first and int(index.max()) < last:
        return index - first, torch.arange(first, last, device=index.device), group_size
    used, length = torch.unique(index.long()), end - begin
    size = length // used.numel()
    groups = torch.cat((used, used[-1:].expand(group_count(length, size) - used.numel())))
    return torch.searchsorted(used, index.long()).to(index.dtype), groups, size
