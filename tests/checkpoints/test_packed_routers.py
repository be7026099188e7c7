"""Packed weights of modules that are no linear layers (routers, embeddings) are dequantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkernels as qk
from qkernels.checkpoints.hf import quantization

from ..moe_checkpoint import SIZES, edit, save_moe, tiny_moe
from ..tiny import ids

#: with tensors of names of their own, with `weight` among them, and with points in their names
FORMATS = [
    ("gptq", {"group_size": 32}), ("pack_quantized", {"group_size": 32}), ("fp8", {}), ("nf4", {}),
    ("fp8", {"granularity": "block", "activation": "dynamic"}), ("q8_0", {}),
]  # fmt: skip
NOTE = (
    "2 modules are stored packed but need a plain weight.* dequantized: model.layers.0.mlp.gate, "
)


def _pack_routers(name: str, params: dict[str, Any], packed: Path, plain: Path) -> None:
    """Quantize the routers, too: tensors and config in `packed`, values in `plain`."""
    stored, values = load_file(packed / "model.safetensors"), load_file(plain / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    layers: dict[str, qk.PackedWeight] = {}
    for key in [key for key in values if key.endswith("gate.weight")]:
        module = key.removesuffix(".weight")
        layers[module] = qk.quantize(values[key], name, **params)
        values[key] = layers[module].dequantize().contiguous()
        del stored[key]
        stored |= {f"{module}.{own}": tensor for own, tensor in layers[module].tensors.items()}
    old = config["quantization_config"]
    if old["quant_method"] == "qkernels":
        old["groups"][0]["modules"] += list(layers)
    else:
        config["quantization_config"] = quantization.describe(layers, ["lm_head"])
    (packed / "config.json").write_text(json.dumps(config))
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    save_file(values, plain / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("name", "params"), FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_packed_routers(kind: str, name: str, params: dict[str, Any], tmp_path: Path) -> None:
    """Routers route by their values; the rest of the model is a second load of the same bytes."""
    save_moe(kind, name, params, tmp_path / "q", tmp_path / "p")
    with_plain = qk.load_model(tmp_path / "q")
    _pack_routers(name, params, tmp_path / "q", tmp_path / "p")
    with pytest.warns(UserWarning, match=NOTE):
        ours = qk.load_model(tmp_path / "q")
    values = {
        k: v
        for k, v in load_file(tmp_path / "p/model.safetensors").items()
        if k.endswith("gate.weight")
    }
    assert len(values) == 2
    for i, value in enumerate(values[key] for key in sorted(values)):
        assert torch.equal(ours.model.layers[i].mlp.gate.weight, value)
        with_plain.model.layers[i].mlp.gate.weight.data.copy_(value)
    with torch.no_grad():
        want = with_plain(ids(20)[None]).logits
        assert torch.equal(ours(ids(20)[None]).logits, want)
        qk.save_model(ours, tmp_path / "s")
        again = load_file(tmp_path / "s/model.safetensors")
        assert all(torch.equal(again[key], value) for key, value in values.items())
        assert torch.equal(qk.load_model(tmp_path / "s")(ids(20)[None]).logits, want)
    assert type(ours.model.layers[0].mlp.gate) is type(tiny_moe(kind).model.layers[0].mlp.gate)


def test_the_dtype_is_that_of_what_comes_in(tmp_path: Path) -> None:
    save_moe("qwen3_moe", "gptq", {"group_size": 32}, tmp_path / "q", tmp_path / "p")
    _pack_routers("gptq", {"group_size": 32}, tmp_path / "q", tmp_path / "p")
    with pytest.warns(UserWarning, match=NOTE):
        model = qk.load_model(tmp_path / "q", dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    model(ids(5)[None])


def test_a_packed_router_that_the_config_leaves_alone(tmp_path: Path) -> None:
    save_moe("qwen3_moe", "gptq", {"group_size": 32}, tmp_path / "q", tmp_path / "p")
    left = (tmp_path / "q/config.json").read_text()
    _pack_routers("gptq", {"group_size": 32}, tmp_path / "q", tmp_path / "p")
    (tmp_path / "q/config.json").write_text(left)
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.gate: expected a plain weight, because .* got g_idx"
    ):
        qk.load_model(tmp_path / "q")


def test_a_packed_router_of_another_shape(tmp_path: Path) -> None:
    save_moe("qwen3_moe", "gptq", {"group_size": 32}, tmp_path / "q", tmp_path / "p")
    _pack_routers("gptq", {"group_size": 32}, tmp_path / "q", tmp_path / "p")
    tensors = load_file(tmp_path / "q/model.safetensors")
    tensors["model.layers.1.mlp.gate.scales"] = tensors["model.layers.1.mlp.gate.scales"][
        :-1
    ].clone()
    save_file(tensors, tmp_path / "q/model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"model.safetensors: model.layers.1.mlp.gate: gptq: scales: expected shape",
    ):
        qk.load_model(tmp_path / "q")


def test_a_scaled_embedding(tmp_path: Path) -> None:
    """Gemma's embedding multiplies its rows by a number, which packed rows would leave out."""
    pytest.importorskip("compressed_tensors")
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from .test_compressed_tensors import weights, write

    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
    )).eval()  # fmt: skip
    groups = {"a": {"targets": ["Embedding"], "weights": weights()}}
    rounded, logits = write(tmp_path / "q", groups, model=model)
    with pytest.warns(
        UserWarning, match="1 modules are stored packed .* dequantized: model.embed_tokens"
    ):
        ours = qk.load_model(tmp_path / "q")
    assert torch.equal(ours.model.embed_tokens.weight, rounded["model.embed_tokens"])
    with torch.no_grad():
        assert torch.equal(ours(ids(20)[None]).logits, logits)


def test_a_linear_that_computes_in_a_way_of_its_own(tmp_path: Path) -> None:
    """Phi's router is a linear layer, but its forward is more than the product."""
    from transformers import AutoModelForCausalLM, PhimoeConfig

    model = AutoModelForCausalLM.from_config(
        PhimoeConfig(**SIZES, intermediate_size=128, num_local_experts=4)
    )
    qk.quantize_model(model, "q8_0", experts=True, progress=False)
    qk.save_model(model, tmp_path / "m")
    old, router = "model.layers.1.block_sparse_moe.gate", "model.layers.1.mlp.router"
    value = torch.randn(4, 256)
    packed = qk.quantize(value, "q8_0")
    edit(tmp_path / "m", drop=f"{old}.weight", **{f"{router}.data": packed.tensors["data"]})
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["groups"][0]["modules"].append(router)
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=rf"1 modules are stored packed .* dequantized: {router}"):
        ours = qk.load_model(tmp_path / "m").get_submodule(router)
    assert type(ours) is type(model.get_submodule(router))
    assert torch.equal(ours.weight, packed.dequantize(ours.weight.dtype))
