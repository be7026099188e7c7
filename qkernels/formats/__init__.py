"""Storage formats: how checkpoints store quantized weights, with a pure-torch reference of each.

`names()` lists the formats, `get(name)` returns one. Each is one class in one file, registered in
registry.py:

    dense.py               fp16, bf16: no quantization
    gptq.py awq.py pack_quantized.py   gptq, awq, pack_quantized: integers in groups (grid.py)
    bitsandbytes4.py       nf4, fp4: 16-entry tables with an absmax per block
    mxfp4.py               mxfp4: 4-bit floats in blocks with power-of-two scales (e2m1.py)
    int8.py w8a8.py        int8 (LLM.int8()), w8a8 (SmoothQuant)
    fp8.py                 fp8: E4M3 or E5M2
    gguf/                  q8_0, q4_k, iq4_nl, ...: GGUF's block types, and llama.cpp's mixtures
    spqr.py                spqr: small groups with quantized scales, and sparse outliers
    quip.py quip_sharp.py  quip, quip_sharp: codes between two orthogonal transforms

Shared by several formats:

    base.py types.py       Format, the interface; TensorSpec, which one stored tensor must match
    registry.py            the list of formats
    bits.py                codes of any width packed into int32 words
    grid.py grouped.py     integer grids, scale * (code - zero) in groups; formats with group_size
    eightbit.py            int8 products and activation scales (int8, w8a8)
    e2m1.py                4-bit floats and their power-of-two scales (mxfp4, gguf_mxfp4)
    compressed_tensors.py  its quantization_config (pack_quantized, mxfp4, w8a8, fp8)
    incoherent.py transforms.py ldlq.py   base class, transforms and rounding of quip and quip_sharp
    e8p.py                 the lattice codebook of quip_sharp
    spqr_grid.py spqr_search.py   a weight in SpQR's terms; how SpQR chooses it
    hessian.py             the factored inverse Hessian of GPTQ and SpQR
"""

from __future__ import annotations

from .base import Format, TensorSpec
from .gguf import TYPES as GGUF_TYPES
from .gguf import GgufFormat
from .registry import get, names, register

__all__ = ["GGUF_TYPES", "Format", "GgufFormat", "TensorSpec", "get", "names", "register"]
