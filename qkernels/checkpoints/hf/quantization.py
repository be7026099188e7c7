"""`quantization_config` of a whole model: which linear is in which format, read and written.

A format reads a config that says one thing of all linears (`Format.from_hf_config`). Most methods
add exceptions in a way of their own; here each is taken apart into such uniform configs and a rule
that picks one by the linear's name:

    gptq, awq, bitsandbytes, fp8    lists of modules left alone; entries match as in transformers
    gptq, awq (GPTQModel)           `dynamic`: "-:regex" leaves alone, "+:regex" overrides fields; first match
    compressed-tensors              `config_groups` with `targets`, and `ignore`; "re:" marks a regex, an exact
                                    name goes before a regex, and a regex before a class of the
                                    module
    qkernels                        `groups`, each with `format`, `params` and the full names of its `modules`: our own,
                                    for what no other method's config can say (GGUF's types,
                                    embeddings)
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
#: names of a module's class and of those it is derived from
Kinds = Collection[str]
#: a module's name and kinds -> number of the uniform config that holds for it, None if it is left
#: alone
Pick = Callable[[str, Kinds], int | None]
LINEAR: Kinds = ("Linear", "Module")
EMBEDDING: Kinds = ("Embedding", "Module")

_SKIP_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers")
_METHODS = "gptq, awq, bitsandbytes (4 or 8 bits), compressed-tensors (pack-quantized integers, int8 or float8) or fp8"
#: the `quant_method` of our own config
OWN = formats.base.OWN_METHOD
#: methods whose readers put packed layers in the place of GPT-2's Conv1D; others leave it, on
#: random weights
_TRANSPOSED = ("gptq", "bitsandbytes", OWN)


class Scheme(NamedTuple):
    """A storage format and its parameters."""

    format: str
    params: dict[str, Any]


class Plan:
    """What a `quantization_config` says of each linear of a model."""

    def __init__(self, where: str, config: Config | None) -> None:
        """`where` goes before error messages. ValueError for a config no format reads, or a bad
        rule.
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
        """Format and parameters of the module called `name`; None if it is left unquantized.

        kinds: what config_groups may call it by, `kinds_of` the module. ValueError if that takes
        too long.
        """
        try:
            index = self._pick(name, kinds)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}") from None
        return None if index is None else self.schemes[index]


def kinds_of(module: nn.Module) -> Kinds:
    """Names of a module's classes, as compressed-tensors matches them.

    It packs linears and embeddings alone. What is packed and neither, a router of today's
    transformers, was a linear when it was packed, and goes by that name.
    """
    names = {kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module)}
    embedding = isinstance(module, (nn.Embedding, QuantEmbedding))
    return names | set(EMBEDDING if embedding else LINEAR)


def _method(config: Config) -> str:
    method = config.get("quant_method")
    return method if isinstance(method, str) else ""


def _parse(config: Config) -> Scheme:
    if _method(config) == OWN:
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
    skipped = _skip_rule(config, Patterns())
    return [config], lambda name, kinds: None if skipped(name) else 0


def _split_dynamic(config: Config) -> tuple[list[Config], Pick]:
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ValueError(f"{FIELD}.dynamic: expected an object, got {dynamic!r:.60}")
    patterns = Patterns()
    skipped = _skip_rule(config, patterns)
    variants: list[Config] = [config]
    rules = Rules(patterns)
    places: list[int | None] = []
    for key, overrides in dynamic.items():
        text = key.removeprefix("-:").removeprefix("+:")
        rules.add_pattern(f"{FIELD}.dynamic", text, len(places))
        if key.startswith("-:"):
            places.append(None)
            continue
        if not isinstance(overrides, Mapping):
            raise ValueError(
                f"{FIELD}.dynamic[{key!r:.60}]: expected an object, got {overrides!r:.60}"
            )
        places.append(len(variants))
        variants.append({**config, **overrides, "quant_method": config["quant_method"]})

    def pick(name: str, kinds: Kinds) -> int | None:
        rule = rules.first(name)
        if rule is not None:
            return places[rule]
        return None if skipped(name) else 0

    return variants, pick


def _split_groups(config: Config) -> tuple[list[Config], Pick]:
    compressed_tensors.check_dense(config)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{FIELD}.config_groups: expected a non-empty object, got {groups!r:.60}")
    patterns = Patterns()
    ignored, ignored_kinds = Rules(patterns), set(_strings("ignore", config.get("ignore")))
    for entry in sorted(ignored_kinds):
        _add(ignored, f"{FIELD}.ignore", entry, 0)
    variants: list[Config] = []
    places: dict[str, tuple[str, int]] = {}  # what two groups target is the later one's
    for name, group in groups.items():
        if isinstance(group, Mapping) and "weights" in group and group["weights"] is None:
            continue  # rounds activations of attention, say; ours keep 16 bits
        variants.append({**config, "config_groups": {name: group}})
        entries = group.get("targets") if isinstance(group, Mapping) else None
        field = f"config_groups.{name}.targets"
        places |= {entry: (field, len(variants) - 1) for entry in _strings(field, entries)}
    if not variants:
        raise ValueError(f"{FIELD}.config_groups: expected a group with weights, got none")
    # compressed-tensors' own order of those that match: names, then regexes, then classes, each
    # sorted
    order = sorted(places, key=lambda entry: (entry.startswith("re:"), entry))
    targets = Rules(patterns)
    for place, entry in enumerate(order):
        _add(targets, f"{FIELD}.{places[entry][0]}", entry, place)

    def pick(name: str, kinds: Kinds) -> int | None:
        if ignored.first(name) is not None or not ignored_kinds.isdisjoint(kinds):
            return None
        place = targets.first(name)
        if place is not None:
            return places[order[place]][1]
        return next((places[kind][1] for kind in sorted(kinds) if kind in places), None)

    return variants, pick


def _add(rules: Rules, field: str, entry: str, place: int) -> None:
    """Add an entry of `targets` or `ignore`: a regex of names, or a name or class."""
    if entry.startswith("re:"):
        rules.add_pattern(field, entry.removeprefix("re:"), place)
    else:
        rules.add_name(entry, place)


def _split_own(config: Config) -> tuple[list[Config], Pick]:
    groups = config.get("groups")
    if not isinstance(groups, list) or not groups:
        raise ValueError(f"{FIELD}.groups: expected a non-empty list, got {groups!r:.60}")
    variants: list[Config] = []
    place: dict[str, int] = {}
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise ValueError(f"{FIELD}.groups[{i}]: expected an object, got {group!r:.60}")
        variants.append({**group, "quant_method": OWN})
        for name in _strings(f"groups[{i}].modules", group.get("modules")):
            if name in place:
                raise ValueError(
                    f"{FIELD}.groups[{i}].modules: {name}: expected in one group, got it in two"
                )
            place[name] = i
    return variants, lambda name, kinds: place.get(name)


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
    """Whether a linear is on one of the lists of modules left alone."""
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
    OWN: _split_own,
}


# ---------------------------------------------------------------------- writing
def describe(
    layers: Mapping[str, PackedWeight],
    skipped: list[str],
    embeddings: Collection[str] = (),
    transposed: Collection[str] = (),
) -> dict[str, Any] | None:
    """The `quantization_config` of a model whose quantized layers are `layers`; None if there are
    none.

    `skipped` are its plain linears. Of `layers`, `embeddings` are no linears, and `transposed` are
    those that the model's class makes as Conv1D. Raises ValueError if layers differ in a way that
    no quantization method's config can say.
    """
    packed = {n: p for n, p in layers.items() if not formats.get(p.format).dense}
    skipped = skipped + [n for n in layers if n not in packed]
    if not packed:
        return None
    # Configs are compared, not parameters: what each weight's own tensors state may differ.
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
            f"{_method(variants[0])}: expected linears alone, got {min(embeddings)}, too"
        )
    if len(variants) == 1 and _method(variants[0]) != OWN and set(embeddings).isdisjoint(packed):
        return variants[0]
    join = _JOIN.get(_method(variants[0]))
    joined = None
    if join is not None and all(_method(v) == _method(variants[0]) for v in variants):
        joined = join(variants, names)
    if joined is None:
        first, other = packed[names[0][0]], packed[names[1][0]]
        raise ValueError(
            f"{names[1][0]}: expected {first.format} with {first.params} like {names[0][0]}, because no "
            f"quantization_config can say both; got {other.format} with {other.params}"
        )
    return joined


def _join_gptq(variants: list[dict[str, Any]], names: list[list[str]]) -> dict[str, Any] | None:
    """The commonest config, with what differs from it in `dynamic`."""
    common = Counter({i: len(n) for i, n in enumerate(names)}).most_common(1)[0][0]
    base = variants[common]
    dynamic: dict[str, Any] = dict(base.get("dynamic") or {})
    for variant, members in zip(variants, names, strict=True):
        changed = {key: value for key, value in variant.items() if value != base[key]}
        if not set(changed) <= {"bits", "group_size", "sym", "desc_act"}:
            return None
        if changed:
            dynamic |= {f"+:^{re.escape(name)}$": changed for name in members}
    return {**base, "dynamic": dynamic}


def _join_groups(variants: list[dict[str, Any]], names: list[list[str]]) -> dict[str, Any]:
    groups = {}
    for i, (variant, members) in enumerate(zip(variants, names, strict=True)):
        groups[f"group_{i}"] = {**variant["config_groups"]["group_0"], "targets": members}
    storages = {variant["format"] for variant in variants}
    storage = storages.pop() if len(storages) == 1 else "mixed-precision"
    return {**variants[0], "format": storage, "config_groups": groups}


def _join_own(variants: list[dict[str, Any]], names: list[list[str]]) -> dict[str, Any]:
    groups = [
        {"format": variant["format"], "params": variant["params"], "modules": members}
        for variant, members in zip(variants, names, strict=True)
    ]
    return {"quant_method": OWN, "groups": groups}


#: methods whose config can say that an embedding is packed
_EMBEDDINGS = (OWN, "compressed-tensors")
_JOIN = {"gptq": _join_gptq, "compressed-tensors": _join_groups, OWN: _join_own}
