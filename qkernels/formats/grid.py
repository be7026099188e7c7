"""The integer grids that GPTQ and AWQ share: w = scale * (code - zero), per group of K.

Feature k is of group k // group_size, but for act-order. Where group_size does not divide K the
last group is short: there are ceil(K / group_size) groups. Round-to-nearest chooses scale and zero
from a group's range, as GPTQ's quantizer does: the range always contains 0; symmetric grids put the
zero at 2^(bits-1).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .types import Params

SMALLEST_NORMAL_FP16 = 2.0**-14
#: the smallest group sizes taken by default: powers of two, and what else divides K where groups
#: must be whole
SMALLEST_POWER, SMALLEST_DIVISOR = 32, 16


class Grid(NamedTuple):
    """A weight on an integer grid: w = scale[n, g] * (code[n, k] - zero[n, g]), g = group_of[k].

    codes: uint8 (N, K). scale: 16- or 32-bit float (N, G). zero: uint8 (N, G). group_size: features
    of a group, -1 for all. group_of: int32 (K), None where it is k // group_size.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int
    group_of: Tensor | None = None

    def dequantize(self) -> Tensor:
        """(N, K) float32."""
        group_of = None if self.group_of is None else self.group_of.long()
        return decode(
            self.codes.T, self.scale.T, self.zero.T, self.group_size, group_of
        ).contiguous()

    def group_index(self) -> Tensor:
        """int32 (K), the group of each input feature, stated or not."""
        return in_order(self.codes, self.group_size) if self.group_of is None else self.group_of

    def in_order(self, group_size: int) -> bool:
        """Whether the group of feature k is k // group_size."""
        return torch.equal(self.group_index(), in_order(self.codes, group_size))


def check_group_size(fmt: str, k: int, size: int, short: bool) -> None:
    """ValueError unless `size` is -1 or a size of groups of K features, the last of which may be
    `short`.
    """
    if size == -1 or (size >= 1 and (short or k % size == 0)):
        return
    if short:
        raise ValueError(f"{fmt}: group_size: expected -1 or at least 1, got {size}")
    raise ValueError(
        f"{fmt}: group_size: expected -1 or a divisor of K={k}, because {fmt} stores no short last group, got {size}"
    )


def default_group_size(sizes: list[int], default: int, short: bool) -> int:
    """The group size for weights with so many input features each, not all of them multiples of
    `default`.

    The largest power of two that divides all, which other kernels take, too; without one a `short`
    last group of the default, or the largest divisor.
    """
    common = math.gcd(*sizes)
    powers = (1 << i for i in range(default.bit_length() - 1, SMALLEST_POWER.bit_length() - 2, -1))
    other = [] if short else range(default, SMALLEST_DIVISOR - 1, -1)
    divisor = next((size for size in (*powers, *other) if common % size == 0), None)
    return divisor or (default if short else -1)


def in_order(codes: Tensor, group_size: int) -> Tensor:
    """k // group_size for the K features of codes (N, K), int32."""
    k = codes.shape[1]
    return torch.arange(k, dtype=torch.int32, device=codes.device) // (
        k if group_size == -1 else group_size
    )


def groups(k: int, group_size: int) -> int:
    """Number of groups along K, the last of which may be short; group_size -1 is one group."""
    return 1 if group_size == -1 else -(-k // group_size)


def in_groups(values: Tensor, group_size: int) -> Tensor:
    """values (N, K) -> (N, G, g), zeros behind those of a short last group: they widen no range."""
    n, k = values.shape
    size = k if group_size == -1 else min(group_size, k)
    if k % size:
        values = torch.nn.functional.pad(values, (0, -k % size))
    return values.reshape(n, -1, size)


def check_group_index(fmt: str, name: str, index: Tensor, k: int, params: Params) -> None:
    """ValueError unless index (K) names groups that there are."""
    g = groups(k, params["group_size"])
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= g:
        raise ValueError(f"{fmt}: {name}: expected values in [0, {g}), got {low}..{high}")


def round_to_nearest(weight: Tensor, params: Params) -> Grid:
    """The grid of weight (N, K) for bits, group_size, symmetric and act_order."""
    (n, k), size = weight.shape, params["group_size"]
    act_order = params.get("act_order", False)
    if act_order:
        # With no calibration data every input counts the same, so the Hessian's diagonal says
        # nothing; columns of like size share a group instead.
        order = weight.square().sum(0).argsort(descending=True, stable=True)
        weight = weight[:, order]
    grouped = in_groups(weight, size)
    scale, zero = fit(grouped, params["bits"], params["symmetric"])
    codes = encode(grouped, scale, zero, params["bits"]).view(n, -1)[:, :k].contiguous()
    if not act_order:
        return Grid(codes, scale, zero, size)
    original, group_of = torch.empty_like(codes), in_order(codes, size)
    original[:, order] = codes
    return Grid(original, scale, zero, size, group_of.scatter(0, order, group_of))


def fit(grouped: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group. grouped (N, G, g) float32 -> scale fp16 (N, G), zero uint8 (N,
    G).

    Raises ValueError if a scale does not fit float16, the dtype checkpoints store.
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
    # An all-zero group gets scale 1 (its codes are all `zero`); a subnormal scale loses its bits.
    scale = torch.where(high > low, scale.clamp(min=SMALLEST_NORMAL_FP16), torch.ones_like(scale))
    scale = scale.half()
    if symmetric:
        zero = torch.full_like(scale, (top + 1) // 2)
    else:
        zero = torch.round(-low / scale.float()).clamp(0, top)
    return scale, zero.to(torch.uint8)


def encode(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest codes uint8 (N, G, g), rounded with the scale as stored (float16)."""
    codes = torch.round(grouped / scale.float()[..., None]) + zero.float()[..., None]
    return codes.clamp(0, (1 << bits) - 1).to(torch.uint8)


def decode(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, group_of: Tensor | None = None
) -> Tensor:
    """codes (K, N), scales and zeros (G, N) -> weight (N, K) float32, a view with N contiguous.

    group_of: int (K), the group of each input feature; None where it is k // group_size.
    Exact in float32: an integer of at most 9 bits times a 16-bit scale.
    """
    k, n = codes.shape
    steps, scales, zeros = codes.float(), scales.float(), zeros.float()
    if group_of is None:
        size = k if group_size == -1 else group_size
        whole = k // size  # groups; behind them there is a short one, or nothing
        full, rest = steps[: whole * size].view(whole, size, n), steps[whole * size :]
        full.sub_(zeros[:whole, None]).mul_(scales[:whole, None])
        rest.sub_(zeros[whole:]).mul_(scales[whole:])
    else:
        steps.sub_(zeros[group_of]).mul_(scales[group_of])
    return steps.T


def cuts(params: dict[str, Any], word: int) -> tuple[int, int]:
    """`Format.cuts` of codes that come `word` to whole words, along rows and along columns."""
    size = params["group_size"]
    return word, word if size == -1 else math.lcm(size, word)


def cut_groups(index: Tensor, group_size: int, begin: int, end: int) -> tuple[Tensor, Tensor, int]:
    """(group of each column, groups kept, group_size) of the columns begin..end-1 of a weight in
    act-order.

    index: int32 (end - begin), their groups, already cut out. Columns that have their groups to
    themselves (static groups) keep those. Others have columns of a group elsewhere, too: then every
    group they have is kept, and group_size only says how many that are: the last one comes again
    where no size says so few.
    """
    if group_size == -1:
        return index, torch.zeros(1, dtype=torch.int64, device=index.device), -1
    first, last = begin // group_size, groups(end, group_size)
    if int(index.min()) >= first and int(index.max()) < last:
        return index - first, torch.arange(first, last, device=index.device), group_size
    used, length = torch.unique(index.long()), end - begin
    size = length // used.numel()
    kept = torch.cat((used, used[-1:].expand(groups(length, size) - used.numel())))
    return torch.searchsorted(used, index.long()).to(index.dtype), kept, size
