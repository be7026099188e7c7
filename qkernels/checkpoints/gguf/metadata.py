"""A GGUF file's metadata as a transformers config, with every key checked.

A table (RULES) says which value each `<architecture>.` key may have and which config field it
becomes. Sizes are compared with the tensors in the file before any module is built. Two kinds of
keys are errors: keys that change what the model computes and that transformers cannot express, and
keys that this file does not know. Source: ggml's docs/gguf.md; defaults and the meaning of scaling
keys as in llama.cpp's model loader.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .header import GgufHeader, GgufTensor

#: general.architecture -> whether rows of query and key weights are permuted
ARCHITECTURES = {
    "llama": True,
    "qwen2": False,
    "qwen3": False,
    "qwen2moe": False,
    "qwen3moe": False,
}
ROPE_TABLE = "rope_freqs.weight"
_MOST = 2**31 - 1


class Rule(NamedTuple):
    """The type of a key's value, its least and greatest value, and the config field it becomes."""

    kind: type
    least: float = 0
    most: float = _MOST
    field: str | None = None
    required: bool = False


class Mixture(NamedTuple):
    """An architecture with experts.

    model_type: transformers' type of model.
    number: its config field for the number of experts.
    fields: config fields for what llama.cpp always computes, whatever the metadata says.
    """

    model_type: str
    number: str
    fields: dict[str, Any]


_ALL_SPARSE: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
MIXTURES = {
    "llama": Mixture("mixtral", "num_local_experts", {}),
    "qwen2moe": Mixture("qwen2_moe", "num_experts", {"norm_topk_prob": False, **_ALL_SPARSE}),
    "qwen3moe": Mixture("qwen3_moe", "num_experts", {"norm_topk_prob": True, **_ALL_SPARSE}),
}

#: keys that we read, without `<architecture>.` -> their rules
RULES = {
    "context_length": Rule(int, 1, 2**26, "max_position_embeddings", True),
    "embedding_length": Rule(int, 1, _MOST, "hidden_size", True),
    "block_count": Rule(int, 1, _MOST, "num_hidden_layers", True),
    "feed_forward_length": Rule(int, 1, _MOST, "intermediate_size", True),
    "attention.head_count": Rule(int, 1, _MOST, "num_attention_heads", True),
    "attention.head_count_kv": Rule(int, 1, _MOST, "num_key_value_heads"),
    "attention.key_length": Rule(int, 2, _MOST, "head_dim"),
    "attention.value_length": Rule(int, 2),
    "attention.layer_norm_rms_epsilon": Rule(float, 0, 1, "rms_norm_eps", True),
    "vocab_size": Rule(int, 1, _MOST, "vocab_size"),
    "rope.dimension_count": Rule(int, 2),
    "rope.freq_base": Rule(float, 1, 1e12),
    "rope.scaling.type": Rule(str),
    "rope.scaling.factor": Rule(float, 0, 1e6),
    "rope.scale_linear": Rule(float, 0, 1e6),
    "rope.scaling.original_context_length": Rule(int, 1, 2**26),
    "rope.scaling.yarn_beta_fast": Rule(float, 1e-3, 1e6),
    "rope.scaling.yarn_beta_slow": Rule(float, 1e-3, 1e6),
}
#: additional keys of files with experts
EXPERT_RULES = {
    "expert_count": Rule(int, 1, _MOST, None, True),
    "expert_used_count": Rule(int, 1, _MOST, "num_experts_per_tok", True),
    "expert_feed_forward_length": Rule(int, 1),
    "expert_shared_feed_forward_length": Rule(int, 1),
}
#: keys that do not change what the model computes
_INFORMATION = {"rope.scaling.finetuned", "expert_used_count"}
#: keys that change what the model computes -> the values with which they do not
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_gating_func": (1,),  # a softmax
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
#: name endings of sizes, in any architecture: none can exceed what the tensors in the file allow
_SIZE_NAMES = ("_count", "_length", "_size", "count_kv", "count_swa")


def architecture_of(path: Path, header: GgufHeader) -> str:
    """`general.architecture` of the file. ValueError if there is none."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ValueError(f"{path}: general.architecture: expected a name, got {architecture!r:.60}")
    return architecture


def check_any_architecture(path: Path, header: GgufHeader) -> None:
    """ValueError for counts that no model in this file can have, in any architecture.

    It also serves architectures that have no rules here.
    """
    prefix = architecture_of(path, header) + "."
    weights = sum(math.prod(tensor.shape) for tensor in header.tensors)
    for key, given in header.metadata.items():
        if not key.startswith(prefix) or not key.endswith(_SIZE_NAMES):
            continue
        most = len(header.tensors) if key == f"{prefix}block_count" else max(weights, 2**26)
        for value in given if isinstance(given, list) else [given]:
            if type(value) is not int or not 0 <= value <= most:
                raise ValueError(
                    f"{path}: {key}: expected an integer of 0 to {most}, because the file has "
                    f"{len(header.tensors)} tensors with {weights} weights; got {value!r:.60}"
                )


def read_config(path: Path, header: GgufHeader) -> Any:
    """The transformers config of a file whose architecture is one of ARCHITECTURES.

    Raises ValueError naming the file, the key or tensor, what was expected and found.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    architecture = architecture_of(path, header)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    mixture = _mixture(architecture, header)
    rules = RULES if mixture is None else RULES | EXPERT_RULES
    entries = _checked_entries(path, header, architecture, rules)
    fields: dict[str | None, Any] = {
        rule.field: entries[key] for key, rule in rules.items() if rule.field and key in entries
    }
    if mixture is not None:
        fields |= {mixture.number: entries["expert_count"]}
        fields.update(mixture.fields)
        fields |= _check_experts(path, architecture, entries, tensors)
    size, heads = _check_sizes(path, architecture, entries, tensors, mixture is not None)
    fields |= {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "num_key_value_heads": heads,
        "head_dim": size,
        "rope_parameters": _rope(path, architecture, entries, tensors, size),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and (type(token) is not int or not 0 <= token < fields["vocab_size"]):
            raise ValueError(
                f"{path}: tokenizer.ggml.{key}_token_id: expected an integer of 0 to "
                f"{fields['vocab_size'] - 1}, got {token!r:.60}"
            )
        fields[f"{name}_token_id"] = token
    config_class = CONFIG_MAPPING[architecture if mixture is None else mixture.model_type]
    try:
        return config_class(**{name: value for name, value in fields.items() if name is not None})
    except Exception as error:  # its checks raise various errors, not only ValueErrors
        raise ValueError(
            f"{path}: expected metadata of a valid {architecture} model, got: {error!r:.300}"
        ) from error


def _mixture(architecture: str, header: GgufHeader) -> Mixture | None:
    """How to read the experts of a file; None if it has none."""
    count = header.metadata.get(f"{architecture}.expert_count")
    has_experts = (type(count) is int and count > 0) or architecture in ("qwen2moe", "qwen3moe")
    return MIXTURES.get(architecture) if has_experts else None


def _checked_entries(
    path: Path, header: GgufHeader, architecture: str, rules: dict[str, Rule]
) -> dict[str, Any]:
    """The values of the rules' keys, each of its type and range.

    ValueError for other keys that change what the model computes.
    """
    prefix = architecture + "."
    given = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}
    for key, rule in rules.items():
        value = given.get(key)
        if value is None and not rule.required:
            continue
        good = type(value) is rule.kind
        if good and rule.kind is not str:
            good = rule.least <= value <= rule.most  # type: ignore[operator]  # False for NaN
        if not good:
            what = "text" if rule.kind is str else f"{rule.least:g} to {rule.most:g}"
            raise ValueError(
                f"{path}: {prefix}{key}: expected {rule.kind.__name__}, {what}; got {value!r:.60}"
            )
    for key, value in given.items():
        window = key == "attention.sliding_window" and type(value) is int
        if window and (value == 0 or value >= given["context_length"]):
            continue  # wider than any context
        neutral = _NEUTRAL.get(key, ())
        is_neutral = any(
            value == neutral_value and (type(value) is bool) == (type(neutral_value) is bool)
            for neutral_value in neutral
        )
        if key in rules or key in _INFORMATION or is_neutral:
            continue
        expected = f"none or {neutral[0]!r}" if neutral else "no such key"
        raise ValueError(
            f"{path}: {prefix}{key}: expected {expected}, because it changes what the model "
            f"computes in a way that is not known here; got {value!r:.60}"
        )
    return {key: given[key] for key in rules if key in given}


def _shape(path: Path, tensors: dict[str, GgufTensor], name: str, form: str) -> tuple[int, ...]:
    """A tensor's shape, which must have as many dimensions as `form`."""
    tensor = tensors.get(name)
    if tensor is None or len(tensor.shape) != form.count(",") + 1:
        got = "none" if tensor is None else f"{tensor.shape}"
        raise ValueError(f"{path}: {name}: expected a tensor of shape {form}, found {got}")
    return tuple(tensor.shape)


def _check_experts(
    path: Path, architecture: str, entries: dict[str, Any], tensors: dict[str, GgufTensor]
) -> dict[str | None, int]:
    """The config fields for sizes of experts. ValueError if a size is not that of the tensors."""
    name, shared_name = "blk.0.ffn_up_exps.weight", "blk.0.ffn_up_shexp.weight"
    count, inner, _ = _shape(path, tensors, name, "(E, N, K)")
    inner_size_key = (
        "feed_forward_length" if architecture == "llama" else "expert_feed_forward_length"
    )
    sizes = {"expert_count": count, inner_size_key: inner}
    if shared_name in tensors:
        sizes["expert_shared_feed_forward_length"] = _shape(path, tensors, shared_name, "(N, K)")[0]
    for key, expected in sizes.items():
        if entries.get(key, expected) != expected:
            raise ValueError(
                f"{path}: {architecture}.{key}: expected {expected}, as the tensors have it; got "
                f"{entries[key]}"
            )
    if entries["expert_used_count"] > count:
        raise ValueError(
            f"{path}: {architecture}.expert_used_count: expected at most the {count} experts, got "
            f"{entries['expert_used_count']}"
        )
    fields: dict[str | None, int] = (
        {"moe_intermediate_size": inner} if architecture != "llama" else {}
    )
    if shared_name in tensors:
        fields["shared_expert_intermediate_size"] = sizes["expert_shared_feed_forward_length"]
    return fields


def _check_sizes(
    path: Path,
    architecture: str,
    entries: dict[str, Any],
    tensors: dict[str, GgufTensor],
    experts: bool,
) -> tuple[int, int]:
    """(size of a head, number of key-value heads). ValueError if a size is not the tensors'."""

    def shape(name: str) -> tuple[int, ...]:
        return _shape(path, tensors, name, "(N, K)")

    def check_equal(key: str, expected: int, what: str) -> None:
        if key in entries and entries[key] != expected:
            raise ValueError(
                f"{path}: {architecture}.{key}: expected {expected}, {what}; got {entries[key]}"
            )

    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if entries["block_count"] > len(blocks):
        check_equal("block_count", len(blocks), "as the tensors' names have it")
    vocabulary, hidden = shape("token_embd.weight")
    check_equal("vocab_size", vocabulary, "the rows of token_embd.weight")
    check_equal("embedding_length", hidden, "the columns of token_embd.weight")
    if not experts:
        check_equal(
            "feed_forward_length",
            shape("blk.0.ffn_up.weight")[0],
            "the rows of blk.0.ffn_up.weight",
        )
    heads = entries["attention.head_count"]
    kv_heads = entries.get("attention.head_count_kv", heads)
    size = entries.get("attention.key_length", hidden // heads)
    for name, count, key in (
        ("attn_q", heads, "head_count"),
        ("attn_k", kv_heads, "head_count_kv"),
    ):
        rows = shape(f"blk.0.{name}.weight")[0]
        if count * size != rows:
            raise ValueError(
                f"{path}: {architecture}.attention.{key}: expected heads of {size} that make the "
                f"{rows} rows of blk.0.{name}.weight, got {count}"
            )
    if heads % kv_heads or size % 2:
        raise ValueError(
            f"{path}: {architecture}.attention.head_count: expected a multiple of the {kv_heads} "
            f"key-value heads, and heads of an even size; got {heads} of {size}"
        )
    check_equal("attention.value_length", size, "the size of a key")
    check_equal("rope.dimension_count", size, "the size of a key")
    return size, kv_heads


# ---------------------------------------------------------------------- rotary embedding
def _rope(
    path: Path,
    architecture: str,
    entries: dict[str, Any],
    tensors: dict[str, GgufTensor],
    size: int,
) -> dict[str, Any]:
    """The config's `rope_parameters`.

    As in llama.cpp, a factor without a type means linear scaling, and a factor of 0 means none.
    """
    theta = entries.get("rope.freq_base", 10000.0)
    factor = entries.get("rope.scaling.factor", entries.get("rope.scale_linear", 0.0)) or 1.0
    key = "rope.scaling.factor" if "rope.scaling.factor" in entries else "rope.scale_linear"
    scaling = entries.get("rope.scaling.type", "linear")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{path}: {architecture}.rope.scaling.type: expected none, linear or yarn, got "
            f"{scaling!r:.60}"
        )
    if factor < 1:
        raise ValueError(f"{path}: {architecture}.{key}: expected 0 or at least 1, got {factor}")
    if scaling == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    if scaling == "yarn":
        original = entries.get("rope.scaling.original_context_length", entries["context_length"])
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
        for name in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{name}" in entries:
                rope[name] = entries[f"rope.scaling.yarn_{name}"]
    if ROPE_TABLE in tensors:
        table = _read_table(path, tensors[ROPE_TABLE], size)
        if bool((table != 1).any()):
            if rope["rope_type"] != "default":
                raise ValueError(
                    f"{path}: {ROPE_TABLE}: expected none beside {scaling} scaling, got one"
                )
            rope |= _llama3(path, table, theta)
    return rope


def _read_table(path: Path, tensor: GgufTensor, size: int) -> torch.Tensor:
    """The table of rotary frequency factors, float32 (size / 2)."""
    if tensor.type != "F32" or tensor.shape != (size // 2,):
        raise ValueError(
            f"{path}: {ROPE_TABLE}: expected F32 of shape {(size // 2,)}, got {tensor.type} of "
            f"{tensor.shape}"
        )
    return torch.from_numpy(np.fromfile(path, np.float32, size // 2, offset=tensor.offset))


def rope_table(rope: dict[str, Any], size: int) -> torch.Tensor:
    """The divisors of the rotary frequencies for transformers' "llama3", float32 (size / 2).

    llama.cpp reads them from this table.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    turns = (
        rope["original_max_position_embeddings"] * rope["rope_theta"] ** -exponents / (2 * math.pi)
    )
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def _llama3(path: Path, table: torch.Tensor, theta: float) -> dict[str, Any]:
    """The parameters of Llama 3.1's scaling that make this table. ValueError if none do."""
    rope: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": float(table.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    matches = bool(torch.isfinite(table).all()) and rope["factor"] >= 1
    if matches:
        expected = rope_table({**rope, "rope_theta": theta}, 2 * table.numel())
        matches = bool(((table - expected).abs() <= 1e-5 * expected).all())
    if not matches:
        raise ValueError(
            f"{path}: {ROPE_TABLE}: expected the table of Llama 3.1's scaling (low 1, high 4, 8192 "
            f"positions), got another, from {table[0].item():g} to {table[-1].item():g}"
        )
    return rope
