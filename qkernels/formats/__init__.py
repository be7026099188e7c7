"""Storage formats, one file each. `names()` lists them, `get(name)` returns one."""

from __future__ import annotations

from .base import Format, TensorSpec
from .gguf import TYPES as GGUF_TYPES
from .gguf import GgufFormat
from .registry import get, names, register

__all__ = ["GGUF_TYPES", "Format", "GgufFormat", "TensorSpec", "get", "names", "register"]
