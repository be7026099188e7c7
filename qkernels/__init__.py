"""qkernels: one layer class and one matmul for LLMs with quantized weights, whatever the format."""

from __future__ import annotations

from . import formats
from .backends.explain import explain
from .models.fuse import fuse_norms
from .models.quantize import load_model, quantize_model, save_model
from .nn import fused
from .nn.experts import QuantExperts
from .nn.linear import QuantLinear
from .ops.matmul import matmul
from .ops.moe import fused_moe, grouped_matmul
from .quantizers import ImportanceMatrix, calibration_ids
from .version import __version__
from .weights.experts import PackedExperts, quantize_experts
from .weights.packed import PackedWeight, pack, quantize

__all__ = [
    "ImportanceMatrix",
    "PackedExperts",
    "PackedWeight",
    "QuantExperts",
    "QuantLinear",
    "__version__",
    "calibration_ids",
    "explain",
    "formats",
    "fuse_norms",
    "fused",
    "fused_moe",
    "grouped_matmul",
    "load_model",
    "matmul",
    "pack",
    "quantize",
    "quantize_experts",
    "quantize_model",
    "save_model",
]
