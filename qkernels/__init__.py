"""qkernels: one layer class and one matmul for LLMs with quantized weights, whatever the format."""

from __future__ import annotations

from . import formats, fused
from .dispatch import explain
from .fuse import fuse_norms
from .linear import QuantLinear
from .model import load_model, quantize_model, save_model
from .ops import matmul
from .packed import PackedWeight, pack, quantize
from .quantizers import ImportanceMatrix, calibration_ids

__version__ = "0.1.0.dev0"

__all__ = [
    "ImportanceMatrix",
    "PackedWeight",
    "QuantLinear",
    "calibration_ids",
    "explain",
    "formats",
    "fuse_norms",
    "fused",
    "load_model",
    "matmul",
    "pack",
    "quantize",
    "quantize_model",
    "save_model",
]
