"""The integer grids that GPTQ and AWQ share: w = scale * (code - zero), per group of K.

Round-to-nearest chooses scale and zero from a group's range, as GPTQ's quantizer does: the range
always contains 0; symmetric grids put the zero at 2^(bits-1).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Params, Shape

SMALLEST_NORMAL_FP16 = 2.0**-14


class Grid(NamedTuple):
    """A weight on an integer grid: w = scale[n, g] * (code[n, k] - zero[n, g]), g = group_of[k].

    codes: uint8 (N, K). scale: 16- or 32-bit float (N, G). zero: uint8 (N, G). group_of: int32 (K), None
    where groups are equal runs in order.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_of: Tensor | None

    def dequantize(self) -> Tensor:
        """(N, K) float32."""
        group_of = None if self.group_of is None else self.group_of.long()
        return decode(self.codes.T, self.scale.T, self.zero.T, group_of).contiguous()

    def group_index(self, group_size: int) -> Tensor:
        """int32 (K), the group of each input feature, stated or not."""
        return in_order(self.codes, group_size) if self.group_of is None else self.group_of

    def in_order(self, group_size: int) -> bool:
        """Whether the group of feature k is k // group_size."""
        return self.group_of is None or torch.equal(self.group_of, in_order(self.codes, group_size))


def in_order(codes: Tensor, group_size: int) -> Tensor:
    """k // group_size for the K features of codes (N, K), int32."""
    k = codes.shape[1]
    return torch.arange(k, dtype=torch.int32, device=codes.device) // (k if group_size == -1 else group_size)


def groups(k: int, group_size: int) -> int:
    """Number of groups along K; group_size -1 is one group."""
    return 1 if group_size == -1 else k // group_size


def check_group_size(fmt: str, shape: Shape, params: Params) -> None:
    """ValueError unless group_size is -1 or divides K."""
    size, k = params["group_size"], shape[1]
    if size != -1 and (size < 1 or k % size):
        raise ValueError(f"{fmt}: group_size: expected -1 or a divisor of K={k}, got {size}")


def check_group_index(fmt: str, name: str, index: Tensor, k: int, params: Params) -> None:
    """ValueError unless index (K) names groups that there are."""
    g = groups(k, params["group_size"])
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= g:
        raise ValueError(f"{fmt}: {name}: expected values in [0, {g}), got {low}..{high}")


def round_to_nearest(weight: Tensor, params: Params) -> Grid:
    """The grid of weight (N, K) for bits, group_size, symmetric and act_order."""
    n, k = weight.shape
    g = groups(k, params["group_size"])
    order = torch.arange(k, device=weight.device)
    act_order = params.get("act_order", False)
    if act_order:
        # With no calibration data every input counts the same, so the Hessian's diagonal says
        # nothing; columns of like size share a group instead.
        order = weight.square().sum(0).argsort(descending=True, stable=True)
    grouped = weight[:, order].view(n, g, -1) if act_order else weight.reshape(n, g, -1)
    scale, zero = fit(grouped, params["bits"], params["symmetric"])
    codes = encode(grouped, scale, zero, params["bits"]).view(n, k)
    if not act_order:
        return Grid(codes, scale, zero, None)
    original = torch.empty_like(codes)
    original[:, order] = codes
    group_of = torch.empty(k, dtype=torch.int32, device=weight.device)
    group_of[order] = torch.arange(g, dtype=torch.int32, device=weight.device).repeat_interleave(k // g)
    return Grid(original, scale, zero, group_of)


def fit(grouped: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group. grouped (N, G, g) float32 -> scale fp16 (N, G), zero uint8 (N, G).

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
        raise ValueError(f"weight: expected scales below 65504 (float16), got {scale.max().item():.6g}")
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


def decode(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor | None = None) -> Tensor:
    """codes (K, N), scales and zeros (G, N) -> weight (N, K) float32, a view with N contiguous.

    group_of: int (K), the group of each input feature; None where groups are equal runs in order.
    Exact in float32: an integer of at most 9 bits times a 16-bit scale.
    """
    n = codes.shape[1]
    steps = codes.float()
    if group_of is None:
        grouped = steps.view(scales.shape[0], -1, n)
        grouped.sub_(zeros.float()[:, None]).mul_(scales.float()[:, None])
    else:
        steps.sub_(zeros.float()[group_of]).mul_(scales.float()[group_of])
    return steps.T


def cuts(params: dict[str, Any], word: int) -> tuple[int, int]:
    """`Format.cuts` of codes that come `word` to whole words, along rows and along columns."""
    size = params["group_size"]
    return word, word if size == -1 else math.lcm(size, word)


def cut_groups(index: Tensor, group_size: int, begin: int, end: int) -> tuple[Tensor, Tensor, int]:
    """(group of each column, groups kept, group_size) of the columns begin..end-1 of a weight in act-order.

    index: int32 (end - begin), their groups, already cut out. Columns that have their groups to themselves
    (static groups) keep those. Others have columns of a group elsewhere, too: then every group they have is
    kept, and group_size only says how many that are: some group comes twice where their number does not
    divide the columns.
    """
    if group_size == -1:
        return index, torch.zeros(1, dtype=torch.int64, device=index.device), -1
    first, last = begin // group_size, end // group_size
    if int(index.min()) >= first and int(index.max()) < last:
        return index - first, torch.arange(first, last, device=index.device), group_size
    used, length = torch.unique(index.long()), end - begin
    count = next(c for c in range(used.numel(), length + 1) if length % c == 0)
    kept = torch.cat((used, used[-1:].expand(count - used.numel())))
    return torch.searchsorted(used, index.long()).to(index.dtype), kept, length // count
