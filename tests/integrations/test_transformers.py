"""qkernels as transformers' quantization backend: quantize, load checkpoints, save, errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import qkernels as qk
from qkernels.checkpoints.hf import reader as huggingface
from qkernels.integrations.transformers import QKernelsConfig, checkpoint_config

from ..moe_checkpoint import save_moe
from ..tiny import ids, save_tiny, tiny_model

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {"block_size": 32, "double_quant": True}),
    ("gptq", {"group_size": 32}),
    ("awq", {"group_size": 32}),
    ("pack_quantized", {"group_size": 32, "symmetric": False}),
    ("mxfp4", {}),
    ("int8", {}),
    ("w8a8", {}),
    ("fp8", {"granularity": "block", "activation": "dynamic"}),
]


def _quantized_layers(model: nn.Module) -> dict[str, qk.QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, qk.QuantLinear)}


@pytest.mark.parametrize(("name", "params"), KINDS, ids=str)
def test_quantize_on_load_save_and_load_again(
    name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    """The layers are those of quantize_model, and every reader reads the saved files."""
    save_tiny(tmp_path / "m", attention_bias=True)
    config = QKernelsConfig(name, **params)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config)
    want = qk.quantize_model(tiny_model(attention_bias=True), name, progress=False, **params)
    assert _quantized_layers(model).keys() == _quantized_layers(want).keys()
    x = ids(20)[None]
    assert torch.equal(model(x).logits, want(x).logits)

    model.save_pretrained(tmp_path / "s", max_shard_size="20KB")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    written = json.loads((tmp_path / "s/config.json").read_text())["quantization_config"]
    huggingface.save(want, tmp_path / "w")
    assert written == json.loads((tmp_path / "w/config.json").read_text())["quantization_config"]
    assert torch.equal(qk.load_model(tmp_path / "s")(x).logits, want(x).logits)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "s", config=checkpoint_config(tmp_path / "s")
    )
    assert torch.equal(again(x).logits, want(x).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    again.save_pretrained(tmp_path / "t")
    assert torch.equal(qk.load_model(tmp_path / "t")(x).logits, want(x).logits)


def test_loading_reports_nothing_missing_or_unexpected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    huggingface.save(qk.quantize_model(tiny_model(), "nf4", progress=False), tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", config=checkpoint_config(tmp_path / "m"), output_loading_info=True
        )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "LOAD REPORT" not in caplog.text
    assert not any(p.requires_grad for p in model.parameters())


def test_skip_and_dtype(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        dtype=torch.bfloat16,
        quantization_config=QKernelsConfig("fp8", skip=["*.down_proj"]),
    )
    plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert plain == {"lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model(ids(9)[None]).logits.dtype == torch.bfloat16


def test_quantized_lm_head_of_a_checkpoint(tmp_path: Path) -> None:
    want = qk.quantize_model(
        tiny_model(tie_word_embeddings=False), "gptq", group_size=32, progress=False
    )
    want.lm_head = qk.QuantLinear.from_linear(want.lm_head, "gptq", group_size=32)
    huggingface.save(want, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", config=checkpoint_config(tmp_path / "m")
    )
    assert isinstance(model.lm_head, qk.QuantLinear)
    assert torch.equal(model(ids(9)[None]).logits, want(ids(9)[None]).logits)


def test_generate(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m")
    config = QKernelsConfig("gptq", group_size=32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=config, device_map="auto"
    )
    out = model.generate(ids(5)[None].to(model.device), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 9)


@pytest.mark.parametrize(("arguments", "params", "message"), [
    ([], {}, "format: expected one of fp16, .* got None"),
    (["hqq"], {}, "format: expected one of fp16, .* got 'hqq'"),
    (["nf4"], {"bits": 3}, "nf4: unknown parameter 'bits'; expected one of: block_size"),
    (["nf4"], {"checkpoint": {}}, "format: expected one of"),
])  # fmt: skip
def test_bad_arguments(arguments: list[str], params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QKernelsConfig(*arguments, **params)


def test_bad_use(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m")
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(
        ValueError, match="_proj: awq: group_size: expected -1 or a divisor of K=64, .* got 48"
    ):
        load(tmp_path / "m", quantization_config=QKernelsConfig("awq", group_size=48))
    with pytest.raises(ValueError, match="device_map: expected one device for the whole model"):
        load(
            tmp_path / "m",
            quantization_config=QKernelsConfig("nf4"),
            device_map={"model": "cpu", "lm_head": "meta"},
        )
    with pytest.raises(ValueError, match="expected a quantized checkpoint"):
        checkpoint_config(tmp_path / "m")
    huggingface.save(qk.quantize_model(tiny_model(), "nf4", progress=False), tmp_path / "q")
    config = checkpoint_config(tmp_path / "q")
    config.quantization_config["checkpoint"]["llm_int8_skip_modules"] = ["up_proj"]
    with pytest.raises(
        ValueError, match="expected a plain weight, because quantization_config leaves"
    ):
        load(tmp_path / "q", config=config)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("name", "params"),
    [("gptq", {"group_size": 64}), ("nf4", {}), ("fp8", {}), ("int8", {}), ("q8_0", {})],
)
def test_a_mixture_of_experts(kind: str, name: str, params: dict[str, Any], tmp_path: Path) -> None:
    """The tensors of all experts become one stack, and are saved as separate tensors again."""
    save_moe(kind, name, params, tmp_path / "q", tmp_path / "p")
    config = checkpoint_config(tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", config=config, dtype=torch.float32)
    assert sum(isinstance(module, qk.QuantExperts) for module in model.modules()) == 2
    tokens = ids(9)[None]
    with torch.no_grad():
        want = qk.load_model(tmp_path / "q")(tokens).logits
        assert torch.equal(model(tokens).logits, want)
        if name == "q8_0":
            with pytest.raises(
                ValueError, match=r"got q8_0; qkernels.save_model\(model, path\) saves them"
            ):
                model.save_pretrained(tmp_path / "again")
            qk.save_model(model, tmp_path / "again")
        else:
            model.save_pretrained(tmp_path / "again")
        assert torch.equal(qk.load_model(tmp_path / "again")(tokens).logits, want)
    old, new = (load_file(tmp_path / d / "model.safetensors") for d in ("q", "again"))
    assert old.keys() == new.keys()
