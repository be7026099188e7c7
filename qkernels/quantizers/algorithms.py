"""The algorithms that `quantize_model` runs with calibration data, one decoder block at a time."""

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
    """Quantizes linear layers of one block at a time.

    It may also change norms and other weights of the block, as AWQ and SmoothQuant do.
    """

    name: ClassVar[str]
    #: option -> default; quantize_model takes options beside the format's parameters
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self, model: nn.Module, fmt: Format, params: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self.model, self.fmt, self.params = model, fmt, params
        self.settings = {**self.options, **options}
        #: full name -> format of a layer, where recipes.py chose one instead of `fmt`
        self.formats: dict[str, str] = {}

    @abstractmethod
    def run(
        self, block: nn.Module, linears: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        """The packed weight of each layer in `linears` (name within `block` -> layer).

        inputs: the inputs of `block`.
        """

    def rounded(self, weight: Tensor, name: str | None = None, **more: Any) -> PackedWeight:
        """`weight` rounded to nearest, in the format of the layer with this full name."""
        format = self.formats.get(name, self.fmt.name) if name else self.fmt.name
        return quantize(weight, format, **{**self.params, **more})


class Gptq(Algorithm):
    """GPTQ in order of execution, so that each layer sees the rounded layers before it.

    Layers that share an input are rounded together.
    """

    name = "gptq"
    options = {"damp": 0.01, "static_groups": False, "clip_search": False}

    def run(
        self, block: nn.Module, linears: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        packed = {}
        for names in inputs.groups(block, linears):
            first = {names[0]: linears[names[0]]}
            hessian = inputs.collect(block, first, hessian=True, stop=True)[names[0]].hessian
            weights = [linears[name].weight.detach().float() for name in names]
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
                linears[name].weight.copy_(packed[name].dequantize())
        return packed


class Awq(Algorithm):
    """AWQ: searches scales of input features for each rule of the architecture, then clips."""

    name = "awq"
    options = {"clip": True}

    def run(
        self, block: nn.Module, linears: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        statistics = inputs.collect(block, linears, hessian=True, stop=False)
        for rule in architectures.of(self.model).rules:
            names = [name for name in rule.layers if name in linears]
            if len(names) < len(rule.layers):
                # Another layer with the same input is not quantized, so the input cannot be scaled.
                continue
            layers = [linears[name] for name in names]
            stacked = torch.cat([layer.weight.detach().float() for layer in layers])
            shared = statistics[names[0]]
            scale, _, _ = awq.search_scale(
                stacked, shared.hessian, shared.mean_abs, self._round_trip
            )
            if architectures.fold(block.get_submodule(rule.before), scale, layers):
                for name in names:
                    statistics[name].rescale(scale)
        packed = {}
        for name, layer in linears.items():
            weight = layer.weight.detach().float()
            # Clipping harms the product of queries and keys more than these errors show.
            if self.settings["clip"] and not name.endswith(("q_proj", "k_proj")):
                params = {**self.fmt.defaults, **self.params}
                size = params.get("group_size", params.get("block_size", -1))
                weight = awq.search_clip(weight, statistics[name].hessian, size, self._round_trip)
            packed[name] = self.rounded(weight)
            layer.weight.copy_(packed[name].dequantize())
        return packed

    def _round_trip(self, weight: Tensor) -> Tensor:
        """`weight`, quantized and dequantized."""
        return self.rounded(weight).dequantize()


class SmoothQuant(Algorithm):
    """Smooths layers that a norm feeds, as the paper's code does, then rounds to nearest.

    With activation "static" it also sets the input scales.
    """

    name = "smoothquant"
    options = {"alpha": 0.5}
    smooth = True

    def run(
        self, block: nn.Module, linears: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        statistics = inputs.collect(block, linears, hessian=False, stop=False)
        for rule in architectures.of(self.model).rules if self.smooth else ():
            before = block.get_submodule(rule.before)
            if isinstance(before, nn.Linear) or any(name not in linears for name in rule.layers):
                continue
            layers = [linears[name] for name in rule.layers]
            weights = [layer.weight.detach() for layer in layers]
            scale = smoothquant.smoothing_scale(
                statistics[rule.layers[0]].max_abs, weights, self.settings["alpha"]
            )
            if architectures.fold(before, scale, layers):
                for name in rule.layers:
                    statistics[name].rescale(scale)
        packed = {}
        for name, layer in linears.items():
            more: dict[str, Any] = {}
            if self.params.get("activation") == "static" and "input_scale" not in self.params:
                largest = float(statistics[name].max_abs.max())
                more["input_scale"] = max(largest, 1e-12) / self.fmt.activation_top
            packed[name] = self.rounded(layer.weight, **more)
        return packed


class Ranges(SmoothQuant):
    """Static activation scales from the largest |x|; weights are rounded to nearest."""

    name = "ranges"
    options = {}
    smooth = False


class Imatrix(Algorithm):
    """llama.cpp's importance matrix: squared errors weighted by the input feature's mean square."""

    name = "imatrix"

    def run(
        self, block: nn.Module, linears: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        statistics = inputs.collect(block, linears, hessian=False, stop=False)
        full_names = {id(module): name for name, module in self.model.named_modules()}
        packed = {}
        for name, layer in linears.items():
            full_name = full_names[id(layer)]
            fmt = formats.get(self.formats.get(full_name, self.fmt.name))
            weighted = "importance" in fmt.quantize_only
            more = {"importance": statistics[name].mean_square} if weighted else {}
            packed[name] = self.rounded(layer.weight.detach(), full_name, **more)
        return packed


class Spqr(Algorithm):
    """SpQR, as GPTQ, but layers one by one, because a group of rows must not span two layers."""

    name = "spqr"
    options = {"damp": 0.01, "threshold": 0.2}

    def run(
        self, block: nn.Module, linears: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        assert isinstance(self.fmt, SpqrFormat)
        packed = {}
        for names in inputs.groups(block, linears):
            first = {names[0]: linears[names[0]]}
            hessian = inputs.collect(block, first, hessian=True, stop=True)[names[0]].hessian
            for name in names:
                weight = linears[name].weight.detach().float()
                shape = (weight.shape[0], weight.shape[1])
                params = self.fmt.resolve(shape, self.params)
                options = {
                    key: params[key] for key in ("bits", "group_size", "row_group", "act_order")
                }
                grid = spqr_search.spqr(weight, hessian, **options, **self.settings)
                tensors = self.fmt.from_spqr(grid, shape, params)
                self.fmt.validate(tensors, shape, params)
                packed[name] = PackedWeight(self.fmt.name, shape, tensors, params)
                linears[name].weight.copy_(packed[name].dequantize())
        return packed


class Ldlq(Algorithm):
    """LDLQ, the rounding of QuIP and QuIP#; each layer sees the rounded layers before it."""

    name = "ldlq"

    def run(
        self, block: nn.Module, linears: dict[str, nn.Linear], inputs: BlockInputs
    ) -> dict[str, PackedWeight]:
        packed = {}
        for names in inputs.groups(block, linears):
            first = {names[0]: linears[names[0]]}
            hessian = inputs.collect(block, first, hessian=True, stop=True)[names[0]].hessian
            for name in names:
                packed[name] = self.rounded(linears[name].weight, hessian=hessian)
                linears[name].weight.copy_(packed[name].dequantize())
        return packed


_ALL = (Gptq, Awq, SmoothQuant, Ranges, Imatrix, Spqr, Ldlq)
BY_NAME: dict[str, type[Algorithm]] = {a.name: a for a in _ALL}


def choose(fmt: Format, name: str | None) -> type[Algorithm]:
    """The algorithm `name`, or the format's first. Raises ValueError if the format lacks it."""
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
