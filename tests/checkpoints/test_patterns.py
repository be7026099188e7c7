"""Patterns in a `quantization_config` take bounded time and have other libraries' meaning."""

from __future__ import annotations

import json
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest

import qkernels as qk
from qkernels.checkpoints.hf import patterns
from qkernels.checkpoints.hf.quantization import Plan

from ..tiny import tiny_model
from .hostile import quick, said_by

# ---------------------------------------------------------------------- patterns
_NAME = "model.layers.11.self_attn.q_proj"
#: the first is one that `regex` sees through and `re` does not
_ENDLESS = [
    "(?:[a-z0-9_.]+)+!",
    r"(?:\w|[a-z]|\.)+[!?]",
    r"(?:.|[a-z])+(?=x).",
    r"(?:(\w|[a-z]|.)+)+(?<!.)",
]


def _with(field: str, pattern: str) -> dict[str, Any]:
    if field == "dynamic":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "dynamic": {f"-:{pattern}": {}},
        }
    if field == "modules_to_not_convert":
        return {"quant_method": "gptq", "bits": 4, "group_size": 32, field: [pattern]}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True,
                                                "strategy": "group", "group_size": 32}}  # fmt: skip
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": group},
    }
    if field == "ignore":
        return {**config, "ignore": [f"re:{pattern}"]}
    return {**config, "config_groups": {"g": {**group, "targets": [f"re:{pattern}"]}}}


@pytest.mark.parametrize(
    "field", ["ignore", "config_groups.g.targets", "dynamic", "modules_to_not_convert"]
)
@pytest.mark.parametrize("pattern", _ENDLESS, ids=range(len(_ENDLESS)))
def test_patterns_that_backtrack(field: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All names of a model together stay within the limit; the error names field and pattern."""
    monkeypatch.setattr(patterns.Patterns.__init__, "__defaults__", (0.2,))
    plan = Plan("here", _with(field, pattern))

    def all_names() -> None:
        for layer in range(2000):
            plan.scheme(_NAME.replace("11", str(layer)) + ".a" * 30)

    with quick(1.5):
        said = said_by(all_names)
    expected = (
        rf"here: quantization_config.{field}: expected patterns that take at most 0.2 s in all, "
        "got more at '"
    )
    assert said is None or re.match(expected, said)
    assert said is not None or pattern == _ENDLESS[0]


def test_a_model_s_patterns_that_backtrack(tmp_path: Path) -> None:
    path = tmp_path / "m"
    qk.save_model(qk.quantize_model(tiny_model(), "gptq", group_size=32, progress=False), path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {f"-:{_ENDLESS[3]}": {}}
    (path / "config.json").write_text(json.dumps(config))
    expected = "config.json: quantization_config.dynamic: expected patterns that take at most 2 s"
    with quick(5), pytest.raises(ValueError, match=expected):
        qk.load_model(path)


@pytest.mark.parametrize("pattern", [
    "((a{1000}){1000}){1000}", "(((((a{100}){100}){100}){100}){100}){100}",
    "(?:[ab][cd]){1000000000}", "(" * 100 + "a" + "){9}" * 100,
    "[a-z]{65535}" * 70, "a{,99999999999999999999}",
])  # fmt: skip
def test_patterns_that_are_huge_once_compiled(pattern: str) -> None:
    with (
        quick(1),
        pytest.raises(
            ValueError, match="here: quantization_config.dynamic: expected counts of at most 20000"
        ),
    ):
        Plan("here", _with("dynamic", pattern))


@pytest.mark.parametrize("pattern", ["a{e<=1}", "(?:foo){i}", "[[:alpha:]]", "x{"])
def test_patterns_that_re_and_regex_read_otherwise(pattern: str) -> None:
    with pytest.raises(ValueError, match="expected no braces except counts and no"):
        Plan("here", _with("dynamic", pattern))


_PIECES = [r"model", r"layers", r"\.", ".", r"\d", r"\d+", r"[0-9]+", ".*", ".+?", "(?!.*mlp)",
 "(?=.*q_proj)", "(?:q|k|v)_proj",
           "(self_attn|mlp)", "$", "^", r"\b", "[^.]*", "(?<=layers.)", "(?<!x)", r"(\w+)", r"\1",
           "{1,2}", "?", "*", "+",
           "{2}", "|", "_proj", "1[0-5]", "(?P<n>1)", "(?P=n)", "(?i:MLP)", r"\w+", r"\Z",
           r"\S"]  # fmt: skip
_NAMES = [
    f"model.layers.{i}.{m}"
    for i in (0, 1, 11, 111)
    for m in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "mlp.up_proj",
        "mlp.gate",
        "block_sparse_moe.experts.3.w1",
        "input_layernorm",
    )
]
_NAMES += ["lm_head", "model.embed_tokens", "model", ""]


def test_regex_agrees_with_re() -> None:
    """Random patterns from the parts that people use, and GPTQModel's own examples."""
    generator = random.Random(1)
    texts = [
        r"-:.*\.mlp\.(?!down).*"[2:],
        r"^model\.layers\.\d+\.mlp$",
        r"(?!.*(?:mlp|attn)).*",
        r".*(?:(?<!gate)_proj)$",
    ]
    texts += ["".join(generator.choices(_PIECES, k=generator.randint(1, 6))) for _ in range(3000)]
    compared = 0
    for text in texts:
        try:
            judge = re.compile(text)
        except re.error:
            with pytest.raises(ValueError, match="expected"):
                patterns.Patterns().compile("f", text)
            continue
        (rules := patterns.Rules(patterns.Patterns())).add_pattern("f", text, 0)
        assert [rules.first(name) is not None for name in _NAMES] == [
            judge.match(name) is not None for name in _NAMES
        ], text
        compared += 1
    assert compared > 500


def test_patterns_tried_together_agree_with_each_by_itself() -> None:
    """Some have groups, references, flags and names, whose meaning changes in a joined pattern."""
    generator = random.Random(3)
    more = [
        r"(?i)MODEL.*",
        r"(a|m)(o).*\2",
        r"(?P<n>m).*(?P=n)",
        r"(?:.*)(?<!x)mlp",
        r"(x)?(?(1)y|model.*gate)",
        "a|lm_",
    ]
    for _ in range(40):
        texts = ["".join(generator.choices(_PIECES, k=generator.randint(1, 4))) for _ in range(200)]
        texts += generator.sample(more, generator.randint(0, 3))
        generator.shuffle(texts)
        judges, rules = [], patterns.Rules(patterns.Patterns())
        for text in texts:
            try:
                rules.add_pattern("f", text, len(judges))
            except ValueError:
                continue
            judges.append(re.compile(text))
        for name in _NAMES:
            first = next((i for i, judge in enumerate(judges) if judge.match(name)), None)
            assert rules.first(name) == first, name


def test_many_patterns_of_a_large_mixture() -> None:
    """DeepSeek-V3's 45,000 names with a pattern for each of 58 layers, once refused as too slow."""
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{w}_proj"
        for i in range(58)
        for e in range(256)
        for w in ("up", "gate", "down")
    ]
    dynamic = {rf"-:.*model\.layers\.{i}\.mlp\.gate.*": {} for i in range(58)}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": dynamic}
    with quick(20):
        plan = Plan("here", config)
        assert all(plan.scheme(name) is not None for name in names)
    assert plan.scheme("model.layers.57.mlp.gate") is None


def test_counts_that_follow_each_other_only_add_up() -> None:
    patterns.Patterns().compile("f", r"\.".join([r"\d{1,3}"] * 10))
    with pytest.raises(ValueError, match="expected counts of at most 20000 together"):
        patterns.Patterns().compile("f", r"(?:(?:a{30}){30}){30}")


def test_lists_agree_with_transformers_s_matcher() -> None:
    """Names and patterns in skip lists, dots, wildcards and ends, against a plain function."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    generator = random.Random(2)
    pieces = [
        "model",
        ".",
        "layers",
        "1",
        "11",
        "mlp",
        "_",
        "up_proj",
        "proj",
        "lm_head",
        "q",
        "experts.3",
    ]
    names = [name for name in _NAMES if name] + ["modelXlayers.1.mlp", "model.layers.1"]
    for _ in range(300):
        count = generator.randint(1, 4)
        entries = [
            "".join(generator.choices(pieces, k=generator.randint(1, 5))) for _ in range(count)
        ]
        skipped = patterns.Skipped(patterns.Patterns(), "f", entries)
        assert [not skipped(name) for name in names] == [
            should_convert_module(n, entries) for n in names
        ], entries


def test_long_lists_of_names_are_quick() -> None:
    """18,000 modules, half of them skipped: a mixture in which only some experts are packed."""
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{w}_proj"
        for i in range(60)
        for e in range(100)
        for w in ("up", "gate", "down")
    ]
    half = names[::2]
    for config in (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "modules_to_not_convert": half},
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "dynamic": {f"-:^{re.escape(n)}$": {} for n in half},
        },
        {**_with("ignore", "x"), "ignore": half},
    ):
        with quick(10):
            plan = Plan("here", config)
            assert [plan.scheme(name) is None for name in names] == [
                i % 2 == 0 for i in range(len(names))
            ]


def test_rules_keep_their_order() -> None:
    """An exact name does not overtake an earlier pattern that matches, nor the other way round."""
    rules = patterns.Rules(patterns.Patterns())
    for place, text in enumerate([r".*\.1\..*", r"^a\.1\.b$", r"^a\.2\.b$", r".*\.2\..*"]):
        rules.add_pattern("f", text, place)
    assert [rules.first(name) for name in ("a.1.b", "a.2.b", "x.2.y", "x")] == [0, 2, 3, None]
    letters = string.ascii_lowercase
    assert all(patterns._literal(f"^{re.escape(c)}x$") == f"{c}x" for c in letters + "._-+*")
