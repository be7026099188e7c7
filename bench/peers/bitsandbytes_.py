"""bitsandbytes: NF4 with and without double quantization, LLM.int8()."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from qkernels.benchmark import race
from qkernels.benchmark.race import Layer

from . import EIGHT_BIT, FOUR_BIT, Peer, layer


class Nf4(Peer):
    module, compiles = "bitsandbytes", False

    def __init__(self, double_quant: bool) -> None:
        self.double_quant = double_quant
        self.name = "bitsandbytes"
        self.group = "nf4:double_quant=true" if double_quant else "nf4"

    def prepare(self, weight: Tensor) -> Layer:
        import bitsandbytes as bnb

        n, k = weight.shape
        linear = bnb.nn.Linear4bit(
            k, n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=self.double_quant,
            quant_type="nf4",
        )  # fmt: skip
        linear.load_state_dict({"weight": weight.bfloat16().cpu()})
        nbytes = n * k // 2 + n * k // 64 * (1 if self.double_quant else 4)
        return layer(linear.to(weight.device), nbytes, weight, FOUR_BIT)


class Int8(Peer):
    """LLM.int8().

    The host waits for the GPU to find the outlier columns, so no CUDA graph can capture it.
    """

    name, group, module, compiles = "bitsandbytes", "int8", "bitsandbytes", False
    graphs, outliers = False, race.OUTLIERS

    def prepare(self, weight: Tensor) -> Layer:
        import bitsandbytes as bnb

        # bitsandbytes warns at each call that it casts bfloat16 to float16, and the warning takes
        # longer than the product.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        n, k = weight.shape
        linear = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        linear.load_state_dict({"weight": weight.half().cpu()})
        return layer(linear.to(weight.device).eval(), n * k + 4 * n, weight, EIGHT_BIT, "int8")


CONTESTANTS = [Nf4(False), Nf4(True), Int8()]
