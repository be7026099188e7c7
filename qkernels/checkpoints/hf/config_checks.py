"""What config.json may say, checked as JSON before transformers builds anything from it.

A config class makes a list of as many items as there are layers, and two dictionaries of as many as
there are labels; a model class, a buffer of as many rows as there are positions. So numbers that
count are bounded here, and buffers where the model is built (model_config). A name of an attention
implementation would choose the code that runs, from a repository of the hub even: the file has no
say in that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: of all objects and lists together, without quantization_config. A classifier has two per label,
#: and there are
#: some of 22,000.
MAX_ITEMS = 262_144
#: of a number that counts: layers, labels, heads, experts, ...
MAX_COUNT = 131_072
_COUNTS = re.compile(
    r"(?:^|_)(?:num|n|layers?|labels?|blocks?|heads?|experts?|depths?|stages?|repeats?|levels?|groups?|count)(?:_|$)"
)
#: of what may be many without costing anything before the model is built
_SIZES = re.compile(
    r"position|ctx|vocab|word|embd|token|pixel|param|floor|_id|ids?$|theta|length|hidden_size|step|sample|train|epoch"
)
#: set by transformers when it reads the config; what chooses the code that computes
_IMPLEMENTATIONS = {
    f"{prefix}{kind}_implementation{suffix}"
    for kind in ("attn", "experts")
    for prefix in ("", "_")
    for suffix in ("", "_internal")
}
#: whether a model gives tuples, which nobody here reads
_OUTPUTS = "return_dict"
_BACKBONE = "backbone"
#: what transformers' shared code reads of any config. A class that does not declare it does not
#: check it.
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
    """(key, its path, value) of all that is in `values`; items of a list go by the list's key."""
    waiting: list[tuple[str, str, Any]] = [("", "", values)]
    while waiting:
        key, where, value = waiting.pop()
        if value is not values:
            yield key, where, value
        if isinstance(value, Mapping):
            above = f"{where[:200]}." if where else ""
            waiting += [(own, above + own, item) for own, item in value.items()]
        elif isinstance(value, list):
            waiting += [(key, where, item) for item in value]


def without_implementations(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without the names of implementations of attention and experts, of nested configs,
    too.

    What is plain ("flash_attention_2") is left out, so that transformers takes what suits this
    machine. ValueError for a repository, which would be asked for code.
    """
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if key in _IMPLEMENTATIONS:
            for _, _, name in _walk({key: value}):
                if isinstance(name, str) and "/" in name:
                    raise ValueError(
                        f"{path}: {key}: expected none, or a name like 'sdpa', because a file does not choose "
                        f"code that is downloaded and run; got the repository {name!r:.100}"
                    )
            continue
        if key != _OUTPUTS:
            kept[key] = _each(path, value)
    name = values.get(_BACKBONE)
    if isinstance(name, str) and "/" in name and values.get("backbone_config") is None:
        raise ValueError(
            f"{path}: {_BACKBONE}: expected a backbone_config, because nothing is downloaded; got the repository "
            f"{name!r:.100}"
        )
    return kept


def _each(path: Path, value: Any) -> Any:
    if isinstance(value, dict):
        return without_implementations(path, value)
    return [_each(path, item) for item in value] if isinstance(value, list) else value


def check_fields(path: Path, kind: type, values: Mapping[str, Any]) -> None:
    """ValueError for a value that the config class `kind` would take as it is, and that code fails
    with later.

    transformers checks the types of the fields that a class declares, but not of those that all
    have. What is not declared becomes an attribute, which shared code reads, or in whose way a
    method is.
    """
    from transformers import PreTrainedConfig

    declared, common = _declared(kind), _declared(PreTrainedConfig)
    for key, value in values.items():
        shared = key in _SHARED and key not in declared - common
        if shared and type(value) not in _SHARED[key]:
            names = " or ".join("null" if t is type(None) else t.__name__ for t in _SHARED[key])
            raise ValueError(f"{path}: {key}: expected {names}, got {value!r:.60}")
        if (shared or key in declared) and type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"{path}: {key}: expected an integer of 64 bits, got {value!r:.60}")
        if key in declared:
            continue
        if callable(getattr(kind, key, None)):
            raise ValueError(
                f"{path}: {key}: expected a field of {kind.__name__}, got the name of a method"
            )
    for key, part in getattr(kind, "sub_configs", {}).items():
        nested = values.get(key)
        if isinstance(nested, dict):
            check_fields(path, _config_class(part, nested), nested)


def _declared(kind: type) -> set[str]:
    return (
        {field.name for field in dataclasses.fields(kind)}
        if dataclasses.is_dataclass(kind)
        else set()
    )


def _config_class(kind: Any, values: Mapping[str, Any]) -> Any:
    """The class of a nested config; where any may be there, the one that its `model_type` names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = values.get("model_type")
    return CONFIG_MAPPING[name] if isinstance(name, str) and name in CONFIG_MAPPING else kind
