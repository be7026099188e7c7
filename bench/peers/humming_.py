"""Humming (vllm-project/humming): compiles a kernel with nvcc for each layer's shape and type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels.benchmark.race import Layer

from . import EIGHT_BIT, FOUR_BIT, Peer, layer


class Humming(Peer):
    name, module = "humming", "humming"

    def __init__(
        self,
        group: str,
        weights: dict[str, Any],
        inputs: dict[str, Any] | None,
        bits: float,
        kind: str = "bf16",
    ) -> None:
        self.group, self.weights, self.inputs, self.bits, self.kind = group, weights, inputs, bits, kind

    def prepare(self, weight: Tensor) -> Layer:
        from humming.layer import HummingLayer

        n, k = weight.shape
        made = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config=dict(self.weights),
            input_config=None if self.inputs is None else dict(self.inputs),
            torch_dtype=torch.bfloat16,
        ).to(weight.device)
        made.load_from_unquantized(weight.bfloat16())
        made.transform()
        tolerance = FOUR_BIT if self.bits < 8 else EIGHT_BIT
        return layer(made, int(n * k * self.bits / 8), weight, tolerance, self.kind)


CONTESTANTS = [
    Humming("int4 g128", {"dtype": "int4", "group_size": 128}, None, 4.125),
    Humming("int8 g128", {"dtype": "int8", "group_size": 128}, None, 8.125),
    Humming("fp8", {"dtype": "float8e4m3"}, None, 8.0),
    Humming("w8a8", {"dtype": "int8"}, {"dtype": "int8"}, 8.0, "int8"),
]
