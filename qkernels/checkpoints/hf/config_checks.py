"""Limits for the values in config.json, checked as JSON before transformers uses them.

A config class makes a list with an item for each layer and two dictionaries with an item for each
label; a model class makes buffers with a row for each position. So this file bounds the numbers
that count something; model_config bounds the buffers when it builds the model. config.json may also
name an attention implementation, which would choose the code that runs, even code from a repository
of the hub. A file must not choose code, so we drop or refuse such names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: items of all objects and lists together, without quantization_config. A classifier has two items
#: for each label, and some have 22,000 labels.
MAX_ITEMS = 262_144
#: largest value of a number that counts layers, labels, heads, experts, ...
MAX_COUNT = 131_072
#: names of numbers that count something
_COUNTS = re.compile(
    r"(?:^|_)(?:num|n|layers?|labels?|blocks?|heads?|experts?|depths?|stages?|repeats?|levels?"
    r"|groups?|count)(?:_|$)"
)
#: names of numbers that may be large, because they cost nothing before the model is built
_SIZES = re.compile(
    r"position|ctx|vocab|word|embd|token|pixel|param|floor|_id|ids?$|theta|length|hidden_size"
    r"|step|sample|train|epoch"
)
#: fields that choose the code that computes; transformers sets them when it reads the config
_IMPLEMENTATIONS = {
    f"{prefix}{kind}_implementation{suffix}"
    for kind in ("attn", "experts")
    for prefix in ("", "_")
    for suffix in ("", "_internal")
}
#: whether a model returns tuples, which none of our code reads
_OUTPUTS = "return_dict"
_BACKBONE = "backbone"
#: Types of the fields that transformers' shared code reads from any config. A class that does not
#: declare such a field does not check it.
_SHARED: dict[str, tuple[type, ...]] = {
    "sliding_window": (int, type(None)),
    "attention_chunk_size": (int, type(None)),
    "head_dim": (int, type(None)),
    "is_causal": (bool, type(None)),
    "use_cache": (bool, type(None)),
    "output_attentions": (bool, type(None)),
    "output_hidden_states": (bool, type(None)),
    "use_bidirectional_attention": (bool, type(None), str),
    "chunk_size_feed_forward": (int, type(None)),
    "torch_dtype": (str, dict, type(None)),
    "unpadded_vocab_size": (int, type(None)),
    "partial_rotary_factor": (int, float, type(None)),
    "gradient_checkpointing": (bool, type(None)),
    "kv_sharing_modes": (type(None),),
}


def check_values(path: Path, values: Mapping[str, Any]) -> None:
    """ValueError for a number or a length in the JSON object `values` that no model has."""
    items = 0
    for key, where, value in _walk(values):
        if isinstance(value, (dict, list)):
            items += len(value)
        if items > MAX_ITEMS:
            raise ValueError(
                f"{path}: {where:.200}: expected at most {MAX_ITEMS} items in all, got more"
            )
        counts = _COUNTS.search(key) and not _SIZES.search(key)
        if counts and isinstance(value, (int, float)) and not abs(value) <= MAX_COUNT:
            raise ValueError(
                f"{path}: {where:.200}: expected a number of at most {MAX_COUNT}, got {value!r:.60}"
            )


def _walk(values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(key, path, value) of everything in `values`; items of a list have the list's key."""
    waiting: list[tuple[str, str, Any]] = [("", "", values)]
    while waiting:
        key, where, value = waiting.pop()
        if value is not values:
            yield key, where, value
        if isinstance(value, Mapping):
            above = f"{where[:200]}." if where else ""
            waiting += [(inner_key, above + inner_key, item) for inner_key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(key, where, item) for item in value]


def without_implementations(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without the names of attention and expert implementations, nested configs included.

    A plain name ("flash_attention_2") is dropped, so that transformers chooses an implementation
    for this machine. Raises ValueError for the name of a repository, from which transformers would
    download code.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key in _IMPLEMENTATIONS:
            for _, _, name in _walk({key: value}):
                if isinstance(name, str) and "/" in name:
                    raise ValueError(
                        f"{path}: {key}: expected none, or a name like 'sdpa', because a file does "
                        f"not choose code that is downloaded and run; got the repository "
                        f"{name!r:.100}"
                    )
            continue
        if key != _OUTPUTS:
            result[key] = _clean(path, value)
    name = values.get(_BACKBONE)
    if isinstance(name, str) and "/" in name and values.get("backbone_config") is None:
        raise ValueError(
            f"{path}: {_BACKBONE}: expected a backbone_config, because nothing is downloaded; got "
            f"the repository {name!r:.100}"
        )
    return result


def _clean(path: Path, value: Any) -> Any:
    """`without_implementations` of every object inside `value`."""
    if isinstance(value, dict):
        return without_implementations(path, value)
    return [_clean(path, item) for item in value] if isinstance(value, list) else value


def check_fields(path: Path, config_class: type, values: Mapping[str, Any]) -> None:
    """ValueError for a value that `config_class` accepts but later code fails on.

    transformers checks the types of the fields that a class declares, but not of the fields that
    all classes share. An undeclared field becomes an attribute, which shared code may read, or
    which may hide a method.
    """
    from transformers import PreTrainedConfig

    declared, common = _declared(config_class), _declared(PreTrainedConfig)
    for key, value in values.items():
        shared = key in _SHARED and key not in declared - common
        if shared and type(value) not in _SHARED[key]:
            names = " or ".join("null" if t is type(None) else t.__name__ for t in _SHARED[key])
            raise ValueError(f"{path}: {key}: expected {names}, got {value!r:.60}")
        if (shared or key in declared) and type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"{path}: {key}: expected an integer of 64 bits, got {value!r:.60}")
        if key in declared:
            continue
        if callable(getattr(config_class, key, None)):
            raise ValueError(
                f"{path}: {key}: expected a field of {config_class.__name__}, got the name of a "
                "method"
            )
    for key, part in getattr(config_class, "sub_configs", {}).items():
        nested = values.get(key)
        if isinstance(nested, dict):
            check_fields(path, _config_class(part, nested), nested)


def _declared(config_class: type) -> set[str]:
    """Names of the fields that a config class declares."""
    return (
        {field.name for field in dataclasses.fields(config_class)}
        if dataclasses.is_dataclass(config_class)
        else set()
    )


def _config_class(default: Any, values: Mapping[str, Any]) -> Any:
    """The class of a nested config, by its `model_type` if any class may be there."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = values.get("model_type")
    return (
        CONFIG_MAPPING[model_type]
        if isinstance(model_type, str) and model_type in CONFIG_MAPPING
        else default
    )
