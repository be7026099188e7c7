"""torchao: int8 and fp8 with dynamic activations, under torch.compile as its documentation says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels.benchmark.race import Layer

from . import EIGHT_BIT, Peer, layer


class TorchAO(Peer):
    """config: class in torchao.quantization. arguments: of it; a string names a class there."""

    name, module = "torchao", "torchao"

    def __init__(self, group: str, config: str, arguments: dict[str, Any], kind: str) -> None:
        self.group, self.config, self.arguments, self.kind = group, config, arguments, kind

    def prepare(self, weight: Tensor) -> Layer:
        import torchao.quantization as ao

        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
        model = torch.nn.Sequential(linear.to(weight.device).requires_grad_(False))
        model[0].weight.copy_(weight)
        arguments = {
            k: getattr(ao, v)() if isinstance(v, str) else v for k, v in self.arguments.items()
        }
        ao.quantize_(model, getattr(ao, self.config)(**arguments))
        return layer(torch.compile(model), weight.numel(), weight, EIGHT_BIT, self.kind)


CONTESTANTS = [
    TorchAO("w8a8", "Int8DynamicActivationInt8WeightConfig", {}, "int8"),
    TorchAO(
        "fp8:activation=dynamic",
        "Float8DynamicActivationFloat8WeightConfig",
        {"granularity": "PerRow"},
        "fp8",
    ),
]
