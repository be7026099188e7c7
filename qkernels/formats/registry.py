"""The list of formats. A new format is a new file in this folder and one line here."""

from __future__ import annotations

import reprlib

from .awq import Awq
from .base import Format
from .bitsandbytes4 import Fp4, Nf4
from .dense import Bf16, Fp16
from .fp8 import Fp8
from .gguf import TYPES as GGUF_TYPES
from .gptq import Gptq
from .int8 import Int8
from .mxfp4 import Mxfp4
from .pack_quantized import PackQuantized
from .quip import Quip
from .quip_sharp import QuipSharp
from .spqr import Spqr
from .w8a8 import W8A8

_FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> None:
    """Add a format under its `name`. Raises ValueError if the name is taken."""
    if fmt.name in _FORMATS:
        raise ValueError(f"format {fmt.name!r} is registered already")
    _FORMATS[fmt.name] = fmt


def names() -> list[str]:
    """Names of all storage formats, in the order of tables."""
    return list(_FORMATS)


def get(name: str) -> Format:
    """The format called `name`. Raises ValueError listing the known names."""
    try:
        return _FORMATS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"format: expected one of {', '.join(_FORMATS)}; got {reprlib.repr(name)}"
        ) from None


_BUILT_IN = (
    Fp16(),
    Bf16(),
    Gptq(),
    Awq(),
    PackQuantized(),
    Nf4(),
    Fp4(),
    Mxfp4(),
    Int8(),
    W8A8(),
    Fp8(),
    Spqr(),
    Quip(),
    QuipSharp(),
)
for _format in (*_BUILT_IN, *GGUF_TYPES):
    register(_format)
