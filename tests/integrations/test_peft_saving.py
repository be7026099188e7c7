"""A model with merged adapters is saved; our loader and transformers read the same function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels as qk

from ..tiny import ids, save_tiny

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from qkernels.integrations.peft import with_quant_linear  # noqa: E402
from qkernels.integrations.transformers import QKernelsConfig, checkpoint_config  # noqa: E402

X = ids(18).view(2, 9)
FORMAT = "nf4"
PARAMS = {"block_size": 64}
SOURCES = ["quantize_model", "load_model", "from_pretrained", "checkpoint_config"]
# bitsandbytes takes no 96
CHANGES = {
    "attention_bias": True,
    "mlp_bias": True,
    "intermediate_size": 128,
}


def quantized(source: str, folder: Path, dtype: torch.dtype) -> Any:
    """The same quantized model, by each of the ways to make one."""
    auto = transformers.AutoModelForCausalLM
    save_tiny(folder / "plain", **CHANGES)
    if source == "from_pretrained":
        config = QKernelsConfig(FORMAT, **PARAMS)
        return auto.from_pretrained(folder / "plain", dtype=dtype, quantization_config=config)
    model = qk.quantize_model(
        auto.from_pretrained(folder / "plain", dtype=dtype), FORMAT, progress=False, **PARAMS
    )
    if source == "quantize_model":
        return model
    qk.save_model(model, folder / "packed")
    if source == "load_model":
        return qk.load_model(folder / "packed")
    config = checkpoint_config(folder / "packed")
    return auto.from_pretrained(folder / "packed", config=config, dtype=dtype)


def tuned(model: Any, told: bool = True, **options: Any) -> Any:
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "lora_bias": True, **options}
    )
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, with_quant_linear(config, model if told else None)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return wrapped


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X).logits


def save(model: Any, how: str, path: Path) -> dict[str, Any]:
    """Save the model. Returns the parsed config.json."""
    if how == "save_model":
        qk.save_model(model, path)
    else:
        model.save_pretrained(path)
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("how", ["save_model", "save_pretrained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_a_merged_model_is_saved_as_an_ordinary_one(
    source: str, dtype: torch.dtype, how: str, tmp_path: Path
) -> None:
    wrapped = tuned(quantized(source, tmp_path, dtype))
    beside = logits(wrapped)
    merged = wrapped.merge_and_unload()
    expected = logits(merged)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert (expected - beside).norm() <= tolerance * beside.norm()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert getattr(merged, "hf_quantizer", None) is None
    assert not getattr(merged, "is_quantized", False)
    assert not hasattr(merged, "quantization_method")
    assert not hasattr(merged.config, "quantization_config")
    written = save(merged, how, tmp_path / "merged")
    assert "quantization_config" not in written
    assert written["dtype"] == str(dtype).removeprefix("torch.")
    for loaded in (
        qk.load_model(tmp_path / "merged"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    ):
        assert torch.equal(logits(loaded), expected)
        assert not [m for m in loaded.modules() if isinstance(m, qk.QuantLinear)]
    # transformers refuses it to quantized ones
    assert torch.equal(logits(merged.float()), logits(loaded.float()))


@pytest.mark.parametrize("how", ["save_model", "save_pretrained"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("unmerged", [["q_proj"], ["q_proj", "down_proj"]], ids=str)
def test_a_partly_merged_model_is_saved_with_its_packed_layers(
    source: str, how: str, unmerged: list[str], tmp_path: Path
) -> None:
    merged = tuned(
        quantized(source, tmp_path, torch.float32), target_modules=unmerged
    ).merge_and_unload()
    expected = logits(merged)
    plain = {n for n, m in merged.named_modules() if type(m) is torch.nn.Linear} - {"lm_head"}
    assert {name.rpartition(".")[2] for name in plain} == set(unmerged)
    written = save(merged, how, tmp_path / "merged")["quantization_config"]
    assert written["quant_method"] == "bitsandbytes"
    assert plain <= set(written["llm_int8_skip_modules"])
    auto = transformers.AutoModelForCausalLM
    ours = auto.from_pretrained(tmp_path / "merged", config=checkpoint_config(tmp_path / "merged"))
    for loaded in (qk.load_model(tmp_path / "merged"), ours):
        layers = {n: m for n, m in loaded.named_modules() if isinstance(m, qk.QuantLinear)}
        assert len(layers) == 14 - len(plain)
        assert not plain & layers.keys()
        assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("source", SOURCES)
def test_bitsandbytes_reads_a_partly_merged_model(source: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    wrapped = tuned(quantized(source, tmp_path, torch.float32), target_modules=["q_proj"])
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    packed = 0
    for name, layer in loaded.named_modules():
        if type(layer).__name__ == "Linear4bit":
            state = layer.weight.quant_state  # of bfloat16, as our files say
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).float()
            ours = merged.get_submodule(name).packed.dequantize()
            assert ((weight - ours).abs() <= 2**-8 * ours.abs()).all(), name
            packed += 1
        elif isinstance(layer, torch.nn.Linear):
            assert torch.equal(layer.weight, merged.get_submodule(name).weight), name
    assert packed == 12
    expected = logits(merged)
    assert (logits(loaded) - expected).norm() <= 3e-2 * expected.norm()


@pytest.mark.parametrize("source", SOURCES)
def test_adapters_that_are_taken_off_leave_the_quantized_model(source: str, tmp_path: Path) -> None:
    model = quantized(source, tmp_path, torch.float32)
    before, marked = logits(model), getattr(model, "is_quantized", False)
    wrapped = tuned(model)
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    again = wrapped.unload()
    assert torch.equal(logits(again), before)
    assert getattr(again, "is_quantized", False) == marked
    assert (
        save(again, "save_model", tmp_path / "again")["quantization_config"]["bnb_4bit_quant_type"]
        == "nf4"
    )
    assert torch.equal(logits(qk.load_model(tmp_path / "again")), before)
    if marked:
        assert "quantization_config" in save(again, "save_pretrained", tmp_path / "by transformers")
        assert torch.equal(logits(qk.load_model(tmp_path / "by transformers")), before)


@pytest.mark.parametrize("how", ["save_model", "save_pretrained"])
@pytest.mark.parametrize("source", SOURCES)
def test_layers_that_were_not_told_their_model_are_saved_as_plain_ones(
    source: str, how: str, tmp_path: Path
) -> None:
    """They merge into QuantLinear of format fp16, which files store as plain weights."""
    wrapped = tuned(
        quantized(source, tmp_path, torch.float32),
        told=False,
        target_modules=r".*\.(q|k|v|o|gate|up|down)_proj",
    )
    merged = wrapped.merge_and_unload()
    expected = logits(merged)
    assert "quantization_config" not in save(merged, how, tmp_path / "merged")
    for loaded in (
        qk.load_model(tmp_path / "merged"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    ):
        assert (logits(loaded) - expected).norm() <= 1e-5 * expected.norm()
