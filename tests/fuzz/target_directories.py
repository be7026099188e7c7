"""Hugging Face directories: headers and bytes of safetensors, the index, and every config."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

import qkernels as qk
from qkernels.checkpoints import load_tokenizer
from qkernels.checkpoints.hf import reader as huggingface
from qkernels.checkpoints.tensor_files import TensorFiles

from ..tiny import VOCABULARY, tiny_model, tiny_tokenizer
from . import documents
from .documents import Tree
from .oracle import Finding, attempt
from .work import forward, place

_SIZES: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
_SEEDS: dict[str, tuple[str | None, dict[str, Any], int]] = {
    "plain": (None, {}, 10**9),
    "sharded": (None, {}, 20_000),
    "gptq": ("gptq", {"group_size": 32, "act_order": True}, 10**9),
    "awq": ("awq", {"group_size": 32}, 10**9),
    "nf4": ("nf4", {"double_quant": True}, 10**9),
    "int8": ("int8", {}, 10**9),
    "compressed-tensors": ("pack_quantized", {"group_size": 32}, 10**9),
    "w8a8": ("w8a8", {}, 10**9),
    "fp8": ("fp8", {"granularity": "block", "block_rows": 32, "block_columns": 32}, 10**9),
    "own": ("q4_0", {}, 10**9),
}
#: fields that change what is built, beside those that seeds and our own source name
WORDS = [
    "sliding_window", "use_sliding_window", "layer_types", "max_window_layers", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "attn_implementation", "_attn_implementation",
    "auto_map", "architectures", "num_labels", "id2label", "label2id", "pruned_heads",
    "problem_type", "output_attentions", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "pretraining_tp", "hidden_act", "silu", "gelu", "attention_dropout",
    "pad_token_id", "text_config", "vision_config", "encoder", "decoder", "tie_word_embeddings",
    "torch_dtype", "dtype", "transformers_version", "num_nextn_predict_layers",
    "LlamaForSequenceClassification", "LlamaModel", "BertForMaskedLM", "gpt2", "qwen2", "qwen3_moe",
    "gemma3", "mixtral", "deepseek_v3", "t5", "mamba", "yarn", "longrope", "dynamic", "llama3",
    "linear", "short_factor", "long_factor", "max_new_tokens", "num_beams", "watermarking_config",
    "compile_config", "cache_implementation", "stop_strings", "constraints", "force_words_ids",
    "added_tokens_decoder", "tokenizer_class", "chat_template", "model_max_length",
    "extra_special_tokens", "Precompiled", "Sequence", "normalizers",
]  # fmt: skip


def seeds(scratch: Path) -> dict[str, Tree]:
    """A directory of each kind."""
    found = {}
    for name, (format, params, shard) in _SEEDS.items():
        model = tiny_model(**_SIZES)
        if format is not None:
            qk.quantize_model(model, format, progress=False, **params)
        found[name] = _seed(scratch / name, model, shard)
    model = qk.quantize_model(_mixtral(), "gptq", experts=True, group_size=32, progress=False)
    found["mixture"] = _seed(scratch / "mixture", model, 10**9)
    return found


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
            num_experts_per_tok=1, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


def _seed(folder: Path, model: Any, shard: int) -> Tree:
    huggingface.save(model, folder, tokenizer=tiny_tokenizer(), max_shard_bytes=shard)
    tree: Tree = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", content[:8])
            tree[path.name] = {
                "header": json.loads(content[8:][:length]),
                "data": content[8 + length :],
            }
        else:
            tree[path.name] = json.loads(content)
    return tree


def run(tree: Tree, edits: list[list[Any]], folder: Path) -> None:
    """Read the tensors, load the model and run it; load the tokenizer if an edit concerns it."""
    place(folder, documents.files_of(tree, edits))
    names = (str(folder),)
    attempt("TensorFiles", names, lambda: _read_all(folder))
    model = attempt("load_model", names, lambda: qk.load_model(folder))
    if model is not None:
        forward(model)
    if any("tokenizer" in str(edit[1:2]) for edit in edits):
        tokenizer = attempt("load_tokenizer", names, lambda: load_tokenizer(folder))
        if tokenizer is not None:
            tokenizer.decode(tokenizer("he a").input_ids)


def _read_all(folder: Path) -> bool:
    with TensorFiles(folder) as files:
        for name, info in files.infos.items():
            if info.nbytes > info.file.stat().st_size:
                raise Finding("TensorFiles: a tensor larger than its file", f"{name}: {info}")
            tensor = attempt("TensorFiles.read", (str(folder),), lambda name=name: files.read(name))
            if tensor is not None:
                tensor.view(-1)[-1:].clone()
    return True
