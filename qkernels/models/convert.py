"""Converts weights from one storage format to another, exactly where both hold the same integers.

Where both formats are integer grids (codes, scales, zero points, groups: `Format.to_grid`) the grid
is carried over, and the result is checked to have the same grid. Otherwise the weight is
dequantized and rounded again, which costs accuracy; the report says so and gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from .. import formats
from ..formats.base import Format
from ..formats.grid import Grid
from ..nn.experts import DOWN, GATE, ROLES, UP, QuantExperts
from ..nn.linear import QuantLinear
from ..weights.experts import PackedExperts
from ..weights.packed import PackedWeight, pack, quantize

#: parameters that determine a grid, so a conversion keeps the source's where it can
_GRID_PARAMS = ("bits", "group_size", "act_order")
#: parameters taken from the source, as (name, value) pairs
Guess = tuple[tuple[str, Any], ...]
EXACT, REQUANTIZED, DEQUANTIZED, KEPT = "exact", "requantized", "dequantized", "kept"


@dataclass(frozen=True)
class Conversion:
    """The conversion of one layer.

    Attributes:
        name: full name of the layer.
        source, target: the formats.
        how: "exact" (same codes, scales and zero points), "requantized" (dequantized and rounded
            again), "dequantized" (to unquantized 16-bit weights) or "kept" (it had the target
            format and parameters already).
        reason: why the conversion is not exact; "" if it is.
        error: norm(new - old) / norm(old) of the dequantized weights.
    """

    name: str
    source: str
    target: str
    how: str
    reason: str
    error: float


def convert_weight(p: PackedWeight, format: str, **params: Any) -> tuple[PackedWeight, str, str]:
    """Convert one weight; returns (weight in `format`, how, reason), the latter as in `Conversion`.

    `params` are the target's parameters. Where they are not given, bits, group size and act-order
    are the source's. Raises ValueError if the weight does not fit `format` with these parameters.
    """
    fmt = formats.get(format)
    return _convert_weight(
        p,
        fmt,
        params,
        lambda guess: fmt.complete({"the weight": p.shape}, {**dict(guess), **params}),
    )


def _convert_weight(
    p: PackedWeight,
    fmt: Format,
    params: dict[str, Any],
    completed: Callable[[Guess], dict[str, Any]],
) -> tuple[PackedWeight, str, str]:
    """`convert_weight` with `completed`: a guess -> all parameters that rounding needs.

    `completed` gives `params` precedence over the guess.
    """
    format = fmt.name
    if fmt.dense:
        return quantize(p.dequantize(), format, **params), DEQUANTIZED, ""
    reason = ""
    if format == p.format:
        resolved = fmt.resolve(p.shape, {**p.params, **params})
        if resolved == p.params:
            return p, KEPT, ""
        try:  # maybe only parameters of activations or tensor names differ
            names = zip(fmt.specs(p.shape, p.params), fmt.specs(p.shape, resolved), strict=True)
            tensors = p.tensors
            renamed = {new: tensors[old] for old, new in names if old in tensors}
            repacked = pack(format, renamed, p.shape, **resolved)
            if torch.equal(repacked.dequantize(), p.dequantize()):
                return repacked, EXACT, ""
        except ValueError as error:
            reason = str(error)
    grid = formats.get(p.format).to_grid(p.tensors, p.shape, p.params)
    if grid is not None:
        exact = _carry(p, grid, fmt, params)
        if isinstance(exact, PackedWeight):
            return exact, EXACT, ""
        reason = exact
    carried = {
        key: p.params[key] for key in _GRID_PARAMS if key in fmt.defaults and key in p.params
    }
    without_bits = {key: value for key, value in carried.items() if key != "bits"}
    for guess in (carried, without_bits, {}):
        try:
            resolved = fmt.resolve(p.shape, completed(tuple(guess.items())))
            break
        except ValueError:
            if not guess:
                raise
    return (
        quantize(p.dequantize(), format, **resolved),
        REQUANTIZED,
        reason or f"{p.format} is no integer grid",
    )


def _carry(p: PackedWeight, grid: Grid, fmt: Format, params: dict[str, Any]) -> PackedWeight | str:
    """`grid` packed in `fmt`, checked to be the same grid; or the reason why it does not fit."""
    bits = p.params.get("bits", 8)
    needed = max(int(grid.codes.max()), int(grid.zero.max())).bit_length()
    reason = ""
    # Codes also fit a format with more bits.
    for width in [bits, *(w for w in (4, 8) if w != bits and w >= needed)]:
        grid_params = {
            "bits": width,
            "group_size": grid.group_size,
            "act_order": not grid.in_order(grid.group_size),
            "symmetric": bool((grid.zero == 1 << (width - 1)).all()),
        }
        try:
            kept_params = {key: grid_params[key] for key in grid_params if key in fmt.defaults}
            resolved = fmt.resolve(p.shape, {**kept_params, **params})
            if needed > resolved.get("bits", 8):
                return f"codes of {needed} bits do not fit {resolved['bits']}"
            packed = pack(fmt.name, fmt.from_grid(grid, resolved), p.shape, **resolved)
        except NotImplementedError:
            return f"{fmt.name} is no integer grid"
        except ValueError as error:
            reason = reason or str(error)
            continue
        packed_grid = fmt.to_grid(packed.tensors, packed.shape, packed.params)
        if packed_grid is not None and _same(packed_grid, grid):
            return packed
        reason = "its scales round to other numbers there"
    return reason


def _same(a: Grid, b: Grid) -> bool:
    """Whether each weight has the same scale and the same code - zero, bit for bit."""
    return (
        a.scale.shape == b.scale.shape
        and torch.equal(a.group_index(), b.group_index())
        and torch.equal(a.scale.float(), b.scale.float())
        and torch.equal(_steps(a), _steps(b))
    )


def _steps(grid: Grid) -> torch.Tensor:
    """code - zero of each weight, int16 (N, K)."""
    return grid.codes.to(torch.int16) - grid.zero.to(torch.int16)[:, grid.group_index().long()]


def convert_model(
    model: nn.Module, format: str, progress: Callable[[int, int], None] | None = None, **params: Any
) -> list[Conversion]:
    """Convert every QuantLinear and QuantExperts of `model` in place; other layers stay.

    With a 16-bit format a QuantLinear becomes nn.Linear, and QuantExperts stay QuantExperts with
    16-bit weights. `progress` is called with (layers done, layers). Raises ValueError naming a
    layer that does not fit; the layers before it are converted then.
    """
    kinds = (QuantLinear, QuantExperts)
    if isinstance(model, kinds):
        raise ValueError(
            "model: expected a module with quantized layers in it, which are replaced there, got a "
            f"bare {type(model).__name__}; convert_weight converts one's weight"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not layers:
        raise ValueError(
            "model: expected quantized layers to convert, got none; quantize_model makes some"
        )
    fmt = formats.get(format)
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        parts: Sequence[PackedWeight | PackedExperts]
        parts = [layer.packed] if isinstance(layer, QuantLinear) else layer.parts.stacks
        shapes |= {
            name if len(parts) == 1 else f"{name}[{i}]": part.shape for i, part in enumerate(parts)
        }

    @cache  # so that all layers get the same choice, with one warning
    def completed(guess: Guess) -> dict[str, Any]:
        return fmt.complete(shapes, {**dict(guess), **params})

    def converted(name: str, old: PackedWeight) -> tuple[PackedWeight, Conversion]:
        try:
            new, how, reason = _convert_weight(old, fmt, params, completed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        change = 0.0 if how in (EXACT, KEPT) else _relative_error(old, new)
        return new, Conversion(name, old.format, format, how, reason, change)

    done: list[Conversion] = []
    for i, (name, layer) in enumerate(layers.items()):
        if isinstance(layer, QuantExperts):
            done += _convert_experts(model, name, layer, converted)
        else:
            new, conversion = converted(name, layer.packed)
            done.append(conversion)
            if conversion.how != KEPT:
                model.set_submodule(name, _layer(new, layer))
        if progress is not None:
            progress(i + 1, len(layers))
    return done


def _convert_experts(
    model: nn.Module,
    name: str,
    old: QuantExperts,
    converted: Callable[[str, PackedWeight], tuple[PackedWeight, Conversion]],
) -> list[Conversion]:
    """Convert each expert's gate, up and down, and stack them again."""
    done: list[Conversion] = []
    stacks: dict[str, list[PackedWeight]] = {role: [] for role in ROLES}
    for e in range(old.parts.count):
        for role, packed in old.parts.expert(e).items():
            new, conversion = converted(f"{name}.{e}.{old.leaves[role]}", packed)
            stacks[role].append(new)
            done.append(conversion)
    if any(conversion.how != KEPT for conversion in done):
        gate, up, down = stacks[GATE], stacks[UP], stacks[DOWN]
        try:
            experts = QuantExperts.from_experts(gate, up, down, old.activation)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        experts.leaves, experts.backend = old.leaves, old.backend
        experts.batch_invariant = old.batch_invariant
        model.set_submodule(name, experts.train(old.training))
    return done


def _layer(packed: PackedWeight, old: QuantLinear) -> nn.Module:
    """The layer that replaces `old`: nn.Linear for a 16-bit format, QuantLinear otherwise."""
    if not formats.get(packed.format).dense:
        return QuantLinear(packed, old.bias, old.backend, old.batch_invariant, old.dtype).train(
            old.training
        )
    linear = nn.Linear(packed.shape[1], packed.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(packed.tensors["weight"], requires_grad=False)
    linear.bias = (
        None if old.bias is None else nn.Parameter(old.bias.to(linear.weight.dtype), False)
    )
    return linear.train(old.training)


def _relative_error(old: PackedWeight, new: PackedWeight) -> float:
    """norm(new - old) / norm(old) of the dequantized weights; norm(new) if the old one is 0."""
    before, after = old.dequantize(), new.dequantize()
    norm = float(before.norm())
    return float((after - before).norm()) / norm if norm else float(after.norm())
