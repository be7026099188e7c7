"""The block types of GGUF files (ggml): q8_0, q4_k, iq4_nl, ...; each is a format.

types.py     the table of types: fields of a block, planes of codes, meaning of the scales
base.py      GgufFormat: reads, writes, checks and quantizes any type in the table
search.py    how scales are searched for when a weight is quantized
recipes.py   q4_k_m and q5_k_m: llama.cpp's mixtures, which type each layer gets
"""

from __future__ import annotations

from .base import GgufFormat
from .types import TYPES

__all__ = ["TYPES", "GgufFormat"]
