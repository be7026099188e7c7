"""The block types of GGUF files (ggml), one row of a table each; `base` is the mechanism."""

from __future__ import annotations

from .base import GgufFormat
from .types import TYPES

__all__ = ["TYPES", "GgufFormat"]
