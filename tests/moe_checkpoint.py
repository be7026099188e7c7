"""Checkpoints of mixtures of experts in the ecosystem's form: names for each expert's tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import qkernels as qk
from qkernels.checkpoints.hf import quantization

from .tiny import VOCABULARY, tiny_tokenizer

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip


def tiny_moe(kind: str, seed: int = 0) -> torch.nn.Module:
    """Mixtral or Qwen3-MoE of two layers and four experts; all random weights affect the logits."""
    config: Any
    if kind == "mixtral":
        config = MixtralConfig(**SIZES, intermediate_size=128, num_local_experts=4)
    else:
        config = Qwen3MoeConfig(
            **SIZES,
            moe_intermediate_size=128,
            intermediate_size=256,
            num_experts=4,
            norm_topk_prob=True,
        )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3 if "embed" in name else 0.2)
    return model


def save_moe(
    kind: str,
    format: str,
    params: dict[str, Any],
    packed: Path,
    plain: Path,
    down: str | None = None,
) -> int:
    """Write the quantized model to `packed`, and a model with its dequantized values to `plain`.

    Linears of attention and experts are quantized; routers, embeddings and the head stay. down: the
    format of the experts' down projections if it is another. Returns the bytes of all of the packed
    model's weights.
    """
    tiny_moe(kind).save_pretrained(plain)
    values = load_file(plain / "model.safetensors")
    stored, skipped = dict(values), []
    layers: dict[str, qk.PackedWeight] = {}
    for key, value in values.items():
        name = key.removesuffix(".weight")
        if value.dim() != 2 or "embed" in name:
            continue
        if name.endswith(("gate", "lm_head")):
            skipped.append(name)
            continue
        is_down = name.endswith(("w2", "down_proj"))
        p = (
            qk.quantize(value, down, **{})
            if down and is_down
            else qk.quantize(value, format, **params)
        )
        layers[name] = p
        values[key] = p.dequantize().contiguous()
        del stored[key]
        for own, tensor in p.tensors.items():
            stored[f"{name}.{own}"] = tensor.contiguous().clone()
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = quantization.describe(layers, skipped)
    tiny_tokenizer().save_pretrained(packed)
    (packed / "config.json").write_text(json.dumps(config))
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in stored.values())


def edit(directory: Path, drop: str = "", **changes: Any) -> None:
    """Drop a tensor of a checkpoint and set others."""
    path = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file({**tensors, **changes}, path, metadata={"format": "pt"})


def stacks_of(model: torch.nn.Module) -> list[qk.QuantExperts]:
    return [module for module in model.modules() if isinstance(module, qk.QuantExperts)]
