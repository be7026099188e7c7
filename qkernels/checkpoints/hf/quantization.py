"""The `quantization_config` of a whole model: which layer is in which format, read and written.

`Format.from_hf_config` reads a config that gives all linear layers one format. Most methods also
allow exceptions, each in a different syntax. This file splits a config with exceptions into uniform
configs and a rule that picks one of them by the layer's name:

    gptq, awq, bitsandbytes, fp8    lists of modules to skip; entries match as in transformers
    gptq, awq (GPTQModel)           `dynamic`: "-:regex" skips, "+:regex" overrides fields; the
                                    first match counts
    compressed-tensors              `config_groups` with `targets`, and `ignore`; "re:" marks a
                                    regex. Exact names go before regexes, regexes before classes.
    qkernels                        `groups`, each with `format`, `params` and the full names of
                                    its `modules`: our own method, for what no other method's
                                    config can say (GGUF's types, embeddings)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from ... import formats
from ...formats import compressed_tensors
from ...formats.base import Format
from ...nn.embedding import QuantEmbedding
from ...weights.packed import PackedWeight
from .patterns import Patterns, Rules, Skipped

FIELD = "quantization_config"
Config = Mapping[str, Any]
#: names of a module's class and its base classes
Kinds = Collection[str]
#: (module name, kinds) -> index of the uniform config that applies, None if the module is skipped
Pick = Callable[[str, Kinds], int | None]
LINEAR: Kinds = ("Linear", "Module")
EMBEDDING: Kinds = ("Embedding", "Module")

_SKIP_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers")
_METHODS = (
    "gptq, awq, bitsandbytes (4 or 8 bits), compressed-tensors (pack-quantized integers, int8, "
    "float8 or MXFP4) or fp8"
)
#: the `quant_method` of the config that only qkernels writes and reads
OWN_METHOD = formats.base.OWN_METHOD
#: methods whose readers put packed layers in place of GPT-2's Conv1D. Other readers keep Conv1D,
#: with random weights.
_TRANSPOSED = ("gptq", "bitsandbytes", OWN_METHOD)


class Scheme(NamedTuple):
    """A storage format and its parameters."""

    format: str
    params: dict[str, Any]


class Plan:
    """What a `quantization_config` says of each layer of a model."""

    def __init__(self, where: str, config: Config | None) -> None:
        """`where` starts every error message, as the file that holds the config.

        Raises ValueError for a config that no format reads, or for a bad rule.
        """
        self.config = config
        self._where = where
        self.schemes: list[Scheme] = []
        self._pick: Pick = lambda name, kinds: None
        if config is None:
            return
        try:
            split = _SPLIT.get(_method(config), _split_plain)
            variants, self._pick = split(config)
            self.schemes = [_parse(variant) for variant in variants]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def scheme(self, name: str, kinds: Kinds = LINEAR) -> Scheme | None:
        """Format and parameters of the module called `name`; None if it is skipped.

        kinds: the names that `targets` and `ignore` may use for the module, from `kinds_of`. Raises
        ValueError if matching patterns takes too long.
        """
        try:
            index = self._pick(name, kinds)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}") from None
        return None if index is None else self.schemes[index]


def kinds_of(module: nn.Module) -> Kinds:
    """Names of a module's classes, as compressed-tensors matches them.

    compressed-tensors packs linear layers and embeddings only. A packed module that is neither (a
    router in today's transformers) was an nn.Linear when it was packed, so it matches as "Linear".
    """
    names = {kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module)}
    embedding = isinstance(module, (nn.Embedding, QuantEmbedding))
    return names | set(EMBEDDING if embedding else LINEAR)


def _method(config: Config) -> str:
    method = config.get("quant_method")
    return method if isinstance(method, str) else ""


def _parse(config: Config) -> Scheme:
    if _method(config) == OWN_METHOD:
        return _parse_own(config)
    for name in formats.names():
        params = type(formats.get(name)).from_hf_config(config)
        if params is not None:
            return Scheme(name, params)
    method = config.get("quant_method")
    if isinstance(config.get("config_groups"), Mapping):
        raise ValueError(
            f"{FIELD}.config_groups: expected {_METHODS}; got {config['config_groups']!r:.200}"
        )
    raise ValueError(f"{FIELD}.quant_method: expected {_METHODS}; got {method!r:.60}")


# ---------------------------------------------------------------------- rules of each method
def _split_plain(config: Config) -> tuple[list[Config], Pick]:
    """The config itself, and the rule of its skip lists."""
    skipped = _skip_rule(config, Patterns())
    return [config], lambda name, kinds: None if skipped(name) else 0


def _split_dynamic(config: Config) -> tuple[list[Config], Pick]:
    """GPTQModel's `dynamic`: one config for each override."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ValueError(f"{FIELD}.dynamic: expected an object, got {dynamic!r:.60}")
    patterns = Patterns()
    skipped = _skip_rule(config, patterns)
    variants: list[Config] = [config]
    rules = Rules(patterns)
    choices: list[int | None] = []
    for key, overrides in dynamic.items():
        text = key.removeprefix("-:").removeprefix("+:")
        rules.add_pattern(f"{FIELD}.dynamic", text, len(choices))
        if key.startswith("-:"):
            choices.append(None)
            continue
        if not isinstance(overrides, Mapping):
            raise ValueError(
                f"{FIELD}.dynamic[{key!r:.60}]: expected an object, got {overrides!r:.60}"
            )
        choices.append(len(variants))
        variants.append({**config, **overrides, "quant_method": config["quant_method"]})

    def pick(name: str, kinds: Kinds) -> int | None:
        rule = rules.first(name)
        if rule is not None:
            return choices[rule]
        return None if skipped(name) else 0

    return variants, pick


def _split_groups(config: Config) -> tuple[list[Config], Pick]:
    """compressed-tensors: one config for each entry of `config_groups`."""
    compressed_tensors.check_dense(config)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{FIELD}.config_groups: expected a non-empty object, got {groups!r:.60}")
    patterns = Patterns()
    ignored, ignored_kinds = Rules(patterns), set(_strings("ignore", config.get("ignore")))
    for entry in sorted(ignored_kinds):
        _add_entry(ignored, f"{FIELD}.ignore", entry, 0)
    variants: list[Config] = []
    groups_of: dict[str, tuple[str, int]] = {}  # entry -> (field, group); the later group wins
    for name, group in groups.items():
        if isinstance(group, Mapping) and "weights" in group and group["weights"] is None:
            continue  # e.g. rounds activations of attention, which we keep in 16 bits
        variants.append({**config, "config_groups": {name: group}})
        entries = group.get("targets") if isinstance(group, Mapping) else None
        field = f"config_groups.{name}.targets"
        groups_of |= {entry: (field, len(variants) - 1) for entry in _strings(field, entries)}
    if not variants:
        raise ValueError(f"{FIELD}.config_groups: expected a group with weights, got none")
    # The order in which compressed-tensors prefers matches: names, then regexes, then classes, each
    # sorted.
    order = sorted(groups_of, key=lambda entry: (entry.startswith("re:"), entry))
    targets = Rules(patterns)
    for place, entry in enumerate(order):
        _add_entry(targets, f"{FIELD}.{groups_of[entry][0]}", entry, place)

    def pick(name: str, kinds: Kinds) -> int | None:
        if ignored.first(name) is not None or not ignored_kinds.isdisjoint(kinds):
            return None
        place = targets.first(name)
        if place is not None:
            return groups_of[order[place]][1]
        return next((groups_of[kind][1] for kind in sorted(kinds) if kind in groups_of), None)

    return variants, pick


def _add_entry(rules: Rules, field: str, entry: str, place: int) -> None:
    """Add an entry of `targets` or `ignore`: "re:" and a regex of names, or a name or class."""
    if entry.startswith("re:"):
        rules.add_pattern(field, entry.removeprefix("re:"), place)
    else:
        rules.add_name(entry, place)


def _split_own(config: Config) -> tuple[list[Config], Pick]:
    """Our own config: one config for each group."""
    groups = config.get("groups")
    if not isinstance(groups, list) or not groups:
        raise ValueError(f"{FIELD}.groups: expected a non-empty list, got {groups!r:.60}")
    variants: list[Config] = []
    group_of: dict[str, int] = {}
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise ValueError(f"{FIELD}.groups[{i}]: expected an object, got {group!r:.60}")
        variants.append({**group, "quant_method": OWN_METHOD})
        for name in _strings(f"groups[{i}].modules", group.get("modules")):
            if name in group_of:
                raise ValueError(
                    f"{FIELD}.groups[{i}].modules: {name}: expected in one group, got it in two"
                )
            group_of[name] = i
    return variants, lambda name, kinds: group_of.get(name)


def _parse_own(group: Config) -> Scheme:
    format, params = group.get("format"), group.get("params", {})
    if not isinstance(format, str) or format not in formats.names():
        raise ValueError(
            f"{FIELD}.groups: format: expected one of {formats.names()}, got {format!r:.60}"
        )
    if not isinstance(params, Mapping):
        raise ValueError(f"{FIELD}.groups: params: expected an object, got {params!r:.60}")
    unknown = sorted(set(params) - set(formats.get(format).defaults))
    if unknown:
        raise ValueError(f"{FIELD}.groups: params: {format}: unknown parameter {unknown[0]!r:.60}")
    return Scheme(format, dict(params))


def _skip_rule(config: Config, patterns: Patterns) -> Skipped:
    """The rule that tells whether a layer is on one of the lists of modules to skip."""
    entries = [entry for field in _SKIP_LISTS for entry in _strings(field, config.get(field))]
    return Skipped(patterns, f"{FIELD}.modules_to_not_convert", entries)


def _strings(field: str, value: Any) -> list[str]:
    value = [] if value is None else value
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(entry, str) and entry for entry in value
    ):
        raise ValueError(f"{FIELD}.{field}: expected a list of names, got {value!r:.60}")
    return list(value)


_SPLIT = {
    "gptq": _split_dynamic,
    "awq": _split_dynamic,
    "compressed-tensors": _split_groups,
    OWN_METHOD: _split_own,
}


# ---------------------------------------------------------------------- writing
def describe(
    layers: Mapping[str, PackedWeight],
    skipped: list[str],
    embeddings: Collection[str] = (),
    transposed: Collection[str] = (),
) -> dict[str, Any] | None:
    """The `quantization_config` of a model; None if no layer is quantized.

    Args:
        layers: module name -> packed weight.
        skipped: names of the unquantized linear layers.
        embeddings: those of `layers` that are embeddings.
        transposed: those of `layers` that the model's class creates as Conv1D.

    Raises ValueError if layers differ in a way that no method's config can say.
    """
    packed = {n: p for n, p in layers.items() if not formats.get(p.format).dense}
    skipped = skipped + [n for n in layers if n not in packed]
    if not packed:
        return None
    # Compare configs, not parameters: parameters that each weight's tensors state may differ.
    configs = {
        n: formats.get(p.format).to_hf_config(p.params, skipped) or {} for n, p in packed.items()
    }
    if any(
        name in transposed and _method(config) not in _TRANSPOSED
        for name, config in configs.items()
    ):
        configs = {
            n: Format.to_hf_config(formats.get(p.format), p.params, skipped) or {}
            for n, p in packed.items()
        }
    variants: list[dict[str, Any]] = []
    names: list[list[str]] = []
    for name, config in configs.items():
        if config not in variants:
            variants.append(config)
            names.append([])
        names[variants.index(config)].append(name)
    if not set(embeddings).isdisjoint(packed) and _method(variants[0]) not in _EMBEDDINGS:
        raise ValueError(
            f"{_method(variants[0])}: expected packed linear layers only, got {min(embeddings)}"
        )
    if (
        len(variants) == 1
        and _method(variants[0]) != OWN_METHOD
        and set(embeddings).isdisjoint(packed)
    ):
        return variants[0]
    join = _JOIN.get(_method(variants[0]))
    joined = None
    if join is not None and all(_method(v) == _method(variants[0]) for v in variants):
        joined = join(variants, names)
    if joined is None:
        first, other = packed[names[0][0]], packed[names[1][0]]
        raise ValueError(
            f"{names[1][0]}: expected {first.format} with {first.params} like {names[0][0]}, "
            f"because no quantization_config can say both; got {other.format} with {other.params}"
        )
    return joined


def _join_gptq(variants: list[dict[str, Any]], names: list[list[str]]) -> dict[str, Any] | None:
    """The most common config, with the overrides of all others in `dynamic`."""
    most_common = Counter({i: len(n) for i, n in enumerate(names)}).most_common(1)[0][0]
    base = variants[most_common]
    dynamic: dict[str, Any] = dict(base.get("dynamic") or {})
    for variant, members in zip(variants, names, strict=True):
        changed = {key: value for key, value in variant.items() if value != base[key]}
        if not set(changed) <= {"bits", "group_size", "sym", "desc_act"}:
            return None
        if changed:
            dynamic |= {f"+:^{re.escape(name)}$": changed for name in members}
    return {**base, "dynamic": dynamic}


def _join_groups(variants: list[dict[str, Any]], names: list[list[str]]) -> dict[str, Any]:
    """One config with a `config_groups` entry for each variant."""
    groups = {}
    for i, (variant, members) in enumerate(zip(variants, names, strict=True)):
        groups[f"group_{i}"] = {**variant["config_groups"]["group_0"], "targets": members}
    storages = {variant["format"] for variant in variants}
    storage = storages.pop() if len(storages) == 1 else "mixed-precision"
    return {**variants[0], "format": storage, "config_groups": groups}


def _join_own(variants: list[dict[str, Any]], names: list[list[str]]) -> dict[str, Any]:
    """Our own config, with a group for each variant."""
    groups = [
        {"format": variant["format"], "params": variant["params"], "modules": members}
        for variant, members in zip(variants, names, strict=True)
    ]
    return {"quant_method": OWN_METHOD, "groups": groups}


#: methods whose config can name a packed embedding
_EMBEDDINGS = (OWN_METHOD, "compressed-tensors")
_JOIN = {"gptq": _join_gptq, "compressed-tensors": _join_groups, OWN_METHOD: _join_own}
