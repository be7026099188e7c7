"""Writes a model as a GGUF file that llama.cpp reads: metadata, tokenizer and packed tensors.

The package `gguf` writes the container (`pip install qkernels[gguf]`). Rows of Llama's queries and
keys are put in ggml's order, in packed weights, too.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import formats
from ...nn.embedding import QuantEmbedding
from ...nn.linear import QuantLinear
from ..atomic import replacing_file
from . import tokenizer as gguf_tokenizer
from .metadata import ARCHITECTURES, ROPE_TABLE, rope_table
from .model import row_order

#: config.model_type -> general.architecture
_KINDS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def save(model: nn.Module, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Write `model` to a .gguf file, as a whole or not at all.

    Linear layers may be in GGUF's types or unquantized; norms and biases become float32, other
    unquantized tensors keep 16 bits.
    Raises ValueError naming a layer in another format (`qkernels convert` changes it), or an
    architecture or a tokenizer that cannot be written.
    """
    import gguf

    path = Path(path)
    config: Any = getattr(model, "config", None)
    architecture = kind_of(model)
    check(model, tokenizer)
    with replacing_file(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), architecture)
        tensors = _tensors(model, architecture)
        _describe(writer, config, path.stem, [kind for _, _, kind in tensors])
        gguf_tokenizer.write(writer, tokenizer, config.vocab_size)
        for name, tensor, ggml_type in tensors:
            raw = None if ggml_type is None else gguf.GGMLQuantizationType[ggml_type]
            writer.add_tensor(name, tensor.contiguous().cpu().numpy(), raw_dtype=raw)
        write_out(writer)


def write_out(writer: Any) -> None:
    """Write the contents of a gguf.GGUFWriter to its file, and close it in any case."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def check(model: nn.Module, tokenizer: Any, format: str | None = None) -> None:
    """ValueError if `save` would refuse this model with its linear layers in `format`.

    Nothing is written.
    """
    import gguf

    from ...formats.gguf.recipes import RECIPES

    architecture = kind_of(model)
    if format is not None and format not in RECIPES:
        fmt = formats.get(format)
        if not fmt.dense and getattr(fmt, "ggml_type", None) is None:
            raise ValueError(
                f"{format}: expected one of GGUF's types for a .gguf file, got another format"
            )
    if tokenizer is None:
        raise ValueError(
            "tokenizer: expected one, since a GGUF file holds model and tokenizer, got none"
        )
    config: Any = model.config
    writer = gguf.GGUFWriter(os.devnull, architecture)
    _describe(writer, config, "", [])
    gguf_tokenizer.write(writer, tokenizer, config.vocab_size)


def kind_of(model: nn.Module) -> str:
    """`general.architecture` for the model. ValueError if its type has none here."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _KINDS:
        raise ValueError(
            f"model: expected one of the types {', '.join(_KINDS)} for a GGUF file, got "
            f"{model_type!r}"
        )
    return _KINDS[model_type]


# ---------------------------------------------------------------------- tensors
def _tensors(model: nn.Module, architecture: str) -> list[tuple[str, Tensor, str | None]]:
    """(name in the file, values or packed bytes, ggml type of packed bytes) of every tensor."""
    import gguf

    config: Any = model.config
    kinds = {str(name): kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    tensors: list[tuple[str, Tensor, str | None]] = []

    def add(module: str, leaf: str, tensor: Tensor, ggml_type: str | None) -> None:
        stored = names.get_name(module)
        if stored is None:
            raise ValueError(
                f"{module}.{leaf}: expected a tensor that {architecture} has in GGUF, got another"
            )
        order = row_order(module, tensor.shape[0], config) if ARCHITECTURES[architecture] else None
        if order is not None:
            tensor = tensor[order.argsort().to(tensor.device)]
        tensors.append((f"{stored}.{leaf}", tensor, ggml_type))

    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        tensors.append((ROPE_TABLE, rope_table(rope, size), None))
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is head and _tied(head, embedding):
            continue
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            tensor, ggml_type = _packed(name, module)
            add(name, "weight", tensor, ggml_type)
            bias = getattr(module, "bias", None)
            if bias is not None:
                add(name, "bias", bias.detach().float(), None)
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            value = parameter.detach()
            if value.dim() < 2 or value.dtype not in (torch.float16, torch.bfloat16):
                add(name, leaf, value.float(), None)
            elif value.dtype == torch.bfloat16:
                add(name, leaf, value.view(torch.uint8), "BF16")
            else:
                add(name, leaf, value, None)
    return tensors


def _packed(name: str, module: QuantLinear | QuantEmbedding) -> tuple[Tensor, str | None]:
    """(values or packed bytes, ggml type) of a layer's weight. ValueError for other formats."""
    packed = module.packed
    fmt = formats.get(packed.format)
    if fmt.dense:
        weight = packed.tensors["weight"]
        return (
            (weight.view(torch.uint8), "BF16") if weight.dtype == torch.bfloat16 else (weight, None)
        )
    ggml_type = getattr(fmt, "ggml_type", None)
    if ggml_type is None:
        raise ValueError(
            f"{name}: expected a layer in one of GGUF's types, got {packed.format}; `qkernels "
            "convert` changes it"
        )
    return packed.tensors["data"], str(ggml_type)


def _tied(head: Any, embedding: Any) -> bool:
    """Whether the output projection is the same matrix as the embedding."""
    if isinstance(head, QuantLinear) and isinstance(embedding, QuantEmbedding):
        head_weight, embedding_weight = head.packed, embedding.packed
        return head_weight.format == embedding_weight.format and all(
            torch.equal(tensor, embedding_weight.tensors[name])
            for name, tensor in head_weight.tensors.items()
        )
    head_tensor, embedding_tensor = (
        getattr(head, "weight", None),
        getattr(embedding, "weight", None),
    )
    return (
        isinstance(head_tensor, Tensor)
        and isinstance(embedding_tensor, Tensor)
        and head_tensor.data_ptr() == embedding_tensor.data_ptr()
    )


# ---------------------------------------------------------------------- metadata
def _describe(writer: Any, config: Any, name: str, types: list[str | None]) -> None:
    """Add the metadata of the model's config; `types` are the ggml types of its tensors."""
    import gguf

    rope = getattr(config, "rope_parameters", None) or {}
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"config: sliding_window: expected none below the {config.max_position_embeddings} "
            f"positions, because {writer.arch} has none in GGUF, got {window}"
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ValueError(f"config: hidden_act: expected 'silu', got {config.hidden_act!r}")
    _add_rope_scaling(writer, config, rope)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    most_common_type = Counter(kind for kind in types if kind is not None).most_common(1)
    labels = (
        [f"MOSTLY_{most_common_type[0][0]}{suffix}" for suffix in ("", "_M", "_S", "_MOE")]
        if most_common_type
        else ["MOSTLY_F16"]
    )
    for label in labels:
        if label in gguf.LlamaFileType.__members__:
            writer.add_file_type(gguf.LlamaFileType[label])
            break


#: rope_type -> the parameters that it may have; all others must be None
_ROPE_PARAMETERS = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}


def _add_rope_scaling(writer: Any, config: Any, rope: dict[str, Any]) -> None:
    """Add the scaling of positions, except llama3's, which is a tensor.

    Raises ValueError for a scaling that GGUF does not have.
    """
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_PARAMETERS:
        raise ValueError(
            f"config: rope_type: expected one of {', '.join(_ROPE_PARAMETERS)}, got {rope_type!r}"
        )
    allowed = {"rope_type", "type", "rope_theta"} | _ROPE_PARAMETERS[rope_type]
    neutral = {"partial_rotary_factor": (1, None), "truncate": (True, None)}
    for key, value in rope.items():
        if key not in allowed and value not in neutral.get(key, (None,)):
            raise ValueError(
                f"config: rope_parameters: {key}: expected none for {rope_type} in GGUF, got "
                f"{value!r}"
            )
    if rope_type not in ("linear", "yarn"):
        return
    prefix = f"{writer.arch}.rope.scaling"
    writer.add_string(f"{prefix}.type", rope_type)
    writer.add_float32(f"{prefix}.factor", float(rope["factor"]))
    if rope_type == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_uint32(f"{prefix}.original_context_length", original)
    for name in ("beta_fast", "beta_slow"):
        if rope.get(name) is not None:
            writer.add_float32(f"{prefix}.yarn_{name}", float(rope[name]))
