"""The algorithms `quantize_model` runs when it is given calibration data, one decoder block at a
time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import formats
from ..formats import spqr_search
from ..formats.base import Format
from ..formats.spqr import Spqr as SpqrFormat
from ..weights.packed import PackedWeight, quantize
from . import architectures, awq, gptq, smoothquant
from .calibration import BlockInputs


class Algorithm(ABC):
    """Quantizes the wanted linear layers of a block; may change norms and linears of the block,
    too.
    """

    name: ClassVar[str]
    #: option -> default; given to quantize_model beside the format's parameters
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self, model: nn.Module, fmt: Format, params: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self.model, self.fmt, self.params = model, fmt, params
        self.settings = {**self.options, **options}
        #: formats of single layers, by name, where they are not all `fmt` (recipes.py)
        self.formats: dict[str, str] = {}

    @abstractmethod
    def run(
        self, block: nn.Module, wanted: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        """`inputs` are the block's. Returns the packed weight of each wanted layer."""

    def rounded(self, weight: Tensor, name: str | None = None, **more: Any) -> PackedWeight:
        """`weight`, of the layer of this full name, rounded to nearest."""
        format = self.formats.get(name, self.fmt.name) if name else self.fmt.name
        return quantize(weight, format, **{**self.params, **more})


class Gptq(Algorithm):
    """Layers that share an input together, in order of execution, each seeing the rounded ones
    before it.
    """

    name = "gptq"
    options = {"damp": 0.01, "static_groups": False, "clip_search": False}

    def run(
        self, block: nn.Module, wanted: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        packed = {}
        for names in inputs.groups(block, wanted):
            first = {names[0]: wanted[names[0]]}
            hessian = inputs.collect(block, first, hessian=True, stop=True)[names[0]].hessian
            weights = [wanted[name].weight.detach().float() for name in names]
            resolved = [self.fmt.resolve((w.shape[0], w.shape[1]), self.params) for w in weights]
            grid = gptq.gptq(
                torch.cat(weights),
                hessian,
                bits=resolved[0]["bits"],
                group_size=resolved[0]["group_size"],
                symmetric=resolved[0]["symmetric"],
                act_order=resolved[0].get("act_order", False),
                **self.settings,
            )
            begin = 0
            for name, weight, params in zip(names, weights, resolved, strict=True):
                end = begin + weight.shape[0]
                part = grid._replace(
                    codes=grid.codes[begin:end],
                    scale=grid.scale[begin:end],
                    zero=grid.zero[begin:end],
                )
                begin = end
                shape = (weight.shape[0], weight.shape[1])
                tensors = self.fmt.from_grid(part, params)
                self.fmt.validate(tensors, shape, params)
                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)
                wanted[name].weight.copy_(packed[name].dequantize())
        return packed


class Awq(Algorithm):
    name = "awq"
    options = {"clip": True}

    def run(
        self, block: nn.Module, wanted: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        found = inputs.collect(block, wanted, hessian=True, stop=False)
        for rule in architectures.of(self.model).rules:
            names = [name for name in rule.layers if name in wanted]
            if len(names) < len(rule.layers):
                # another reader of the same output stays as it is, and must not be scaled alone
                continue
            layers = [wanted[name] for name in names]
            stacked = torch.cat([layer.weight.detach().float() for layer in layers])
            seen = found[names[0]]
            scale, _, _ = awq.search_scale(stacked, seen.hessian, seen.mean_abs, self._round_trip)
            if architectures.fold(block.get_submodule(rule.before), scale, layers):
                for name in names:
                    found[name].rescale(scale)
        packed = {}
        for name, layer in wanted.items():
            weight = layer.weight.detach().float()
            # The product of queries and keys feels clipping more than these errors tell.
            if self.settings["clip"] and not name.endswith(("q_proj", "k_proj")):
                size = self.params.get("group_size", self.params.get("block_size", -1))
                default = self.fmt.defaults.get(
                    "group_size", self.fmt.defaults.get("block_size", -1)
                )
                size = (
                    size if "group_size" in self.params or "block_size" in self.params else default
                )
                weight = awq.search_clip(weight, found[name].hessian, size, self._round_trip)
            packed[name] = self.rounded(weight)
            layer.weight.copy_(packed[name].dequantize())
        return packed

    def _round_trip(self, weight: Tensor) -> Tensor:
        return self.rounded(weight).dequantize()


class SmoothQuant(Algorithm):
    """Smooths what norms feed, as the paper's code does; then rounds, with static scales if asked
    for.
    """

    name = "smoothquant"
    options = {"alpha": 0.5}
    smooth = True

    def run(
        self, block: nn.Module, wanted: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        found = inputs.collect(block, wanted, hessian=False, stop=False)
        for rule in architectures.of(self.model).rules if self.smooth else ():
            before = block.get_submodule(rule.before)
            if isinstance(before, nn.Linear) or any(name not in wanted for name in rule.layers):
                continue
            layers = [wanted[name] for name in rule.layers]
            weights = [layer.weight.detach() for layer in layers]
            scale = smoothquant.smoothing_scale(
                found[rule.layers[0]].max_abs, weights, self.settings["alpha"]
            )
            if architectures.fold(before, scale, layers):
                for name in rule.layers:
                    found[name].rescale(scale)
        packed = {}
        for name, layer in wanted.items():
            more: dict[str, Any] = {}
            if self.params.get("activation") == "static" and "input_scale" not in self.params:
                largest = float(found[name].max_abs.max())
                more["input_scale"] = max(largest, 1e-12) / self.fmt.activation_top
            packed[name] = self.rounded(layer.weight, **more)
        return packed


class Ranges(SmoothQuant):
    """Static activation scales from the largest |x| seen, nothing else."""

    name = "ranges"
    options = {}
    smooth = False


class Imatrix(Algorithm):
    """llama.cpp's importance matrix: each error's square counts by the mean square of its input
    feature.
    """

    name = "imatrix"

    def run(
        self, block: nn.Module, wanted: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        found = inputs.collect(block, wanted, hessian=False, stop=False)
        full = {id(module): name for name, module in self.model.named_modules()}
        packed = {}
        for name, layer in wanted.items():
            own = full[id(layer)]
            weighted = (
                "importance" in formats.get(self.formats.get(own, self.fmt.name)).quantize_only
            )
            more = {"importance": found[name].mean_square} if weighted else {}
            packed[name] = self.rounded(layer.weight.detach(), own, **more)
        return packed


class Spqr(Algorithm):
    """As GPTQ; layers with the same input one by one, because groups of rows must not span two."""

    name = "spqr"
    options = {"damp": 0.01, "threshold": 0.2}

    def run(
        self, block: nn.Module, wanted: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        assert isinstance(self.fmt, SpqrFormat)
        packed = {}
        for names in inputs.groups(block, wanted):
            first = {names[0]: wanted[names[0]]}
            hessian = inputs.collect(block, first, hessian=True, stop=True)[names[0]].hessian
            for name in names:
                weight = wanted[name].weight.detach().float()
                shape = (weight.shape[0], weight.shape[1])
                params = self.fmt.resolve(shape, self.params)
                own = {k: params[k] for k in ("bits", "group_size", "row_group", "act_order")}
                grid = spqr_search.spqr(weight, hessian, **own, **self.settings)
                tensors = self.fmt.from_spqr(grid, shape, params)
                self.fmt.validate(tensors, shape, params)
                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)
                wanted[name].weight.copy_(packed[name].dequantize())
        return packed


class Ldlq(Algorithm):
    """QuIP's rounding; layers that share an input together, each seeing the rounded ones before it."""

    name = "ldlq"

    def run(
        self, block: nn.Module, wanted: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        packed = {}
        for names in inputs.groups(block, wanted):
            first = {names[0]: wanted[names[0]]}
            hessian = inputs.collect(block, first, hessian=True, stop=True)[names[0]].hessian
            for name in names:
                packed[name] = self.rounded(wanted[name].weight, hessian=hessian)
                wanted[name].weight.copy_(packed[name].dequantize())
        return packed


_ALL = (Gptq, Awq, SmoothQuant, Ranges, Imatrix, Spqr, Ldlq)
BY_NAME: dict[str, type[Algorithm]] = {a.name: a for a in _ALL}


def choose(fmt: Format, name: str | None) -> type[Algorithm]:
    """The algorithm of that name, or the format's first. ValueError if the format has no such one."""
    if not fmt.algorithms:
        raise ValueError(
            f"calibration: expected None, because {fmt.name} is made by rounding to nearest only, "
            "which takes no calibration data"
        )
    name = fmt.algorithms[0] if name is None else name
    if name not in fmt.algorithms:
        raise ValueError(
            f"algorithm: expected one of {', '.join(fmt.algorithms)} for {fmt.name}, got {name!r}"
        )
    return BY_NAME[name]
