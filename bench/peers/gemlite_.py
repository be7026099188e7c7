"""GemLite: int4 in groups of 128, int8 and fp8 with dynamic activations."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qkernels.benchmark.race import Layer

from . import EIGHT_BIT, FOUR_BIT, Peer, layer

GROUP = 128


class GemLite(Peer):
    """GemLite with its tuned configurations, which it looks up by the GPU's name.

    It has none for an H200, and a search takes minutes a shape. So an H200 gets those of the H100,
    which is the same processor.
    """

    name, module = "gemlite", "gemlite"

    def _configure(self) -> None:
        import gemlite
        from gemlite.core import GemLiteLinear, get_default_cache_config

        if get_default_cache_config() is None and torch.cuda.get_device_capability() == (9, 0):
            GemLiteLinear.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))


class Int4(GemLite):
    group = "int4 g128"

    def prepare(self, weight: Tensor) -> Layer:
        from gemlite.helper import A16W4_HQQ_INT

        self._configure()
        n, k = weight.shape
        grouped = weight.view(-1, GROUP)
        low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
        scales = ((high - low) / 15).clamp(min=1e-6)
        zeros = (-low / scales).round()
        codes = ((grouped / scales).round() + zeros).clamp(0, 15).to(torch.uint8).view(n, k)
        linear = A16W4_HQQ_INT(device=str(weight.device), dtype=torch.bfloat16).from_weights(
            codes, scales.bfloat16(), zeros.bfloat16()
        )
        return layer(linear, n * k // 2 + n * k // GROUP * 4, weight, FOUR_BIT)


class Dynamic(GemLite):
    """fp8 or int8 with a scale for each row of x."""

    def __init__(self, maker: str, group: str, kind: str) -> None:
        self.maker, self.group, self.kind = maker, group, kind

    def prepare(self, weight: Tensor) -> Layer:
        import gemlite.helper

        self._configure()
        maker = getattr(gemlite.helper, self.maker)(device=str(weight.device), dtype=torch.bfloat16)
        return layer(
            maker.from_weights(weight.bfloat16()), weight.numel(), weight, EIGHT_BIT, self.kind
        )


CONTESTANTS = [
    Int4(),
    Dynamic("A8W8_int8_dynamic", "w8a8", "int8"),
    Dynamic("A8W8_fp8_dynamic", "fp8:activation=dynamic", "fp8"),
]
