"""qkernels: one layer class and one matmul for LLMs with quantized weights, whatever the format."""

from __future__ import annotations

from . import formats, fused
from .dispatch import explain
from .experts import PackedExperts, quantize_experts
from .fuse import fuse_norms
from .grouped import fused_moe, grouped_matmul
from .linear import QuantLinear
from .model import load_model, quantize_model, save_model
from .moe import QuantExperts
from .ops import matmul
from .packed import PackedWeight, pack, quantize
from .quantizers import ImportanceMatrix, calibration_ids

__version__ = "0.1.0.dev0"

__all__ = [
    "ImportanceMatrix",
    "PackedExperts",
    "PackedWeight",
    "QuantExperts",
    "QuantLinear",
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
