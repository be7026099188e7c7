"""Format specs as text."""

from __future__ import annotations

import pytest

import qkernels as qk
from qkernels.quantizers.specs import LISTS, LOW_BIT, PRESETS, FormatSpec, parse_params, parse_specs


def test_presets_are_valid_for_real_sizes_and_parse_back() -> None:
    for spec in PRESETS:
        qk.formats.get(spec.name).resolve((576, 1536), spec.params)
        assert parse_specs(str(spec)) == [spec]
    assert parse_specs("all") == list(PRESETS)
    everywhere = {name for name in qk.formats.names() if qk.formats.get(name).k_multiple < 256}
    assert {spec.name for spec in PRESETS} == everywhere


def test_low_bit_is_the_table_of_its_results() -> None:
    """One command prints the whole table, row by row."""
    from pathlib import Path

    for spec in LOW_BIT:
        assert parse_specs(str(spec)) == [spec]
    assert parse_specs("low-bit") == list(LISTS["low-bit"])
    text = (Path(__file__).parents[2] / "bench/results/low-bit.md").read_text()
    rows = [
        line.split("|")[1:4]
        for line in text.splitlines()
        if line.startswith("| ") and ":bits=" in line
    ]
    rows += [["nf4", "", ""]]
    named = []
    for spec in LOW_BIT:
        label = {key: spec.params[key] for key in ("bits", "group_size") if key in spec.params}
        named.append((str(FormatSpec(spec.name, label)), "algorithm" in spec.params))
    shown = [(row[0].strip(), "nearest" not in row[1] and row[0] != "nf4") for row in rows]
    assert sorted(named) == sorted(shown)


def test_lists_of_specs() -> None:
    assert parse_specs("nf4, gptq:bits=3,symmetric=false,group_size=-1,int8:threshold=5.5") == [
        FormatSpec("nf4"),
        FormatSpec("gptq", {"bits": 3, "symmetric": False, "group_size": -1}),
        FormatSpec("int8", {"threshold": 5.5}),
    ]


@pytest.mark.parametrize(("text", "message"), [
    ("", "formats: expected 'all' or names"),
    (",,", "formats: expected 'all' or names"),
    ("nf5", "format: expected one of .* got 'nf5'"),
    ("bits=3", "format: expected one of .* got 'bits=3'"),
    ("gptq:bits", "gptq: parameter: expected key=value, got 'bits'"),
    ("gptq:bits=", "gptq: parameter: expected key=value, got 'bits='"),
    ("gptq:bots=3", "gptq: unknown parameter 'bots'; expected one of: bits"),
    ("gptq:bits=3,bits=4", "gptq: bits: expected once, got it twice"),
    ("fp16:x=1", "fp16: unknown parameter 'x'; expected one of: none"),
])  # fmt: skip
def test_bad_specs(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_specs(text)


def test_quantize_only_parameters_are_known() -> None:
    assert parse_params("w8a8", ["activation=static", "input_scale=0.5"]) == {
        "activation": "static",
        "input_scale": 0.5,
    }
