"""Formats with their usual parameters, and the text form of one: "gptq:bits=3,group_size=32"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .. import formats


@dataclass(frozen=True)
class FormatSpec:
    """A format and the parameters to quantize with. `parse_specs` reads its `str()` back."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ",".join(f"{key}={_text(value)}" for key, value in self.params.items())
        return f"{self.name}:{shown}" if shown else self.name


_CHOSEN = (
    FormatSpec("fp16"),
    FormatSpec("bf16"),
    FormatSpec("gptq", {"bits": 8, "group_size": 64}),
    FormatSpec("gptq", {"bits": 4, "group_size": 64}),
    FormatSpec("gptq", {"bits": 4, "group_size": 64, "symmetric": False}),
    FormatSpec("gptq", {"bits": 4, "group_size": 64, "act_order": True}),
    FormatSpec("gptq", {"bits": 3, "group_size": 64, "symmetric": False}),
    FormatSpec("gptq", {"bits": 2, "group_size": 32, "symmetric": False}),
    FormatSpec("awq", {"group_size": 64}),
    FormatSpec("pack_quantized", {"group_size": 64}),
    FormatSpec("nf4", {"block_size": 64}),
    FormatSpec("nf4", {"block_size": 64, "double_quant": True}),
    FormatSpec("fp4", {"block_size": 64}),
    FormatSpec("spqr", {"bits": 3}),
    FormatSpec("spqr", {"bits": 4}),
    *(FormatSpec("quip", {"bits": bits}) for bits in (2, 3, 4)),
    *(FormatSpec("quip_sharp", {"bits": bits}) for bits in (2, 3, 4)),
    FormatSpec("int8"),
    FormatSpec("w8a8"),
    FormatSpec("fp8", {"granularity": "channel", "float_format": "e4m3"}),
    FormatSpec("fp8", {"granularity": "channel", "float_format": "e5m2"}),
    FormatSpec("fp8", {"granularity": "tensor"}),
    FormatSpec("fp8", {"granularity": "block"}),
    FormatSpec("fp8", {"granularity": "channel", "activation": "dynamic"}),
)
#: `qkernels eval --formats all`: every format, those above with these parameters. Groups have 64
#: features, because not every model's sizes are multiples of 128. GGUF's blocks of 256 are left out
#: for the same reason; recipes (q4_k_m) use them where they fit.
PRESETS = (
    *_CHOSEN,
    *(
        FormatSpec(name)
        for name in formats.names()
        if formats.get(name).k_multiple < 256 and name not in {spec.name for spec in _CHOSEN}
    ),
)


_GPTQ = {"symmetric": False, "act_order": True, "clip_search": True, "algorithm": "gptq"}
_SPQR = {"act_order": True, "damp": 1, "threshold": 0.4, "algorithm": "spqr"}
#: `--formats low-bit`: the table of bench/results/low-bit.md, in its order; it needs a calibration
#: text
LOW_BIT = (
    FormatSpec("quip_sharp", {"bits": 2, "algorithm": "ldlq"}),
    FormatSpec("quip", {"bits": 2, "algorithm": "ldlq"}),
    FormatSpec("gptq", {"bits": 2, "group_size": 64, **_GPTQ}),
    FormatSpec("gptq", {"bits": 2, "group_size": 64, "symmetric": False}),
    FormatSpec("quip_sharp", {"bits": 3, "algorithm": "ldlq"}),
    FormatSpec("quip", {"bits": 3, "algorithm": "ldlq"}),
    FormatSpec("gptq", {"bits": 3, "group_size": 64, **_GPTQ}),
    FormatSpec("gptq", {"bits": 3, "group_size": 64, "symmetric": False}),
    FormatSpec("spqr", {"bits": 3, "group_size": 64, **_SPQR}),
    FormatSpec("gptq", {"bits": 3, "group_size": 32, **_GPTQ}),
    FormatSpec("quip_sharp", {"bits": 4, "algorithm": "ldlq"}),
    FormatSpec("quip", {"bits": 4, "algorithm": "ldlq"}),
    FormatSpec("gptq", {"bits": 4, "group_size": 64, "symmetric": False}),
    FormatSpec("nf4"),
    FormatSpec("spqr", {"bits": 4, "group_size": 32, **_SPQR}),
    FormatSpec("gptq", {"bits": 4, "group_size": 32, **_GPTQ}),
)
#: name -> list of specs
LISTS = {"all": PRESETS, "low-bit": LOW_BIT}


def parse_specs(text: str) -> list[FormatSpec]:
    """ "all", "low-bit", or specs separated by commas: "nf4,gptq:bits=3,group_size=32,awq".

    A piece with "=" and no ":" adds a parameter to the spec before it. Raises ValueError for an
    unknown format or parameter, or a text that is no spec.
    """
    if text.strip() in LISTS:
        return list(LISTS[text.strip()])
    specs: list[tuple[str, list[str]]] = []
    for piece in (p.strip() for p in text.split(",")):
        head, colon, rest = piece.partition(":")
        if not colon and "=" in head and specs:
            specs[-1][1].append(head)
        elif piece:
            specs.append((head, [rest] if rest else []))
    if not specs:
        raise ValueError(
            f"formats: expected 'all' or names such as 'nf4,gptq:bits=3', got {text!r}"
        )
    return [FormatSpec(name, parse_params(name, params)) for name, params in specs]


def parse_params(format: str, pairs: Iterable[str]) -> dict[str, Any]:
    """["bits=3", "symmetric=false"] -> {"bits": 3, "symmetric": False}.

    Parameters are those of `format`, the options of its algorithms, and "algorithm". Raises
    ValueError for a pair without "=", an unknown parameter, or one given twice.
    """
    from ..formats.gguf.recipes import RECIPES
    from .algorithms import BY_NAME

    fmt = formats.get(RECIPES.get(format, format))
    allowed = {**fmt.defaults, **fmt.quantize_only}
    if fmt.algorithms:
        allowed["algorithm"] = fmt.algorithms[0]
        for algorithm in fmt.algorithms:
            allowed |= BY_NAME[algorithm].options
    params: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"{format}: parameter: expected key=value, got {pair!r}")
        if key not in allowed:
            names = ", ".join(allowed) or "none"
            raise ValueError(f"{format}: unknown parameter {key!r}; expected one of: {names}")
        if key in params:
            raise ValueError(f"{format}: {key}: expected once, got it twice")
        params[key] = _value(value)
    return params


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
