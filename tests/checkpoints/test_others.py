"""Checkpoints of other libraries, read here: logits equal theirs within rounding."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qkernels as qk

from ..tiny import ids, save_tiny, tiny_model

GOLDEN = Path(__file__).parent.parent / "golden"


def _close(ours: torch.Tensor, theirs: torch.Tensor, roundoff: float) -> None:
    """Assert the error of two layers with about ten roundings each, of this unit roundoff."""
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert error <= 10 * roundoff, f"{error:.2e} > {10 * roundoff:.2e}"


@pytest.mark.parametrize("name", ["gptq-act-order", "gptq-8bit-mixed", "awq"])
def test_gptqmodel(name: str) -> None:
    """tests/golden/make_gptqmodel.py made them; GPTQModel's logits are in float16."""
    path = GOLDEN / f"gptqmodel-{name}"
    model = qk.load_model(path, dtype=torch.float16)
    layers = {n: m.packed for n, m in model.named_modules() if isinstance(m, qk.QuantLinear)}
    if name == "gptq-8bit-mixed":
        assert {n: p.params["bits"] for n, p in layers.items() if n.endswith("down_proj")} == {
            f"model.layers.{i}.mlp.down_proj": 8 for i in range(2)
        }
        assert "model.layers.1.mlp.up_proj" not in layers
        assert "model.layers.0.mlp.up_proj" in layers
    if name == "gptq-act-order":
        g_idx = layers["model.layers.0.mlp.down_proj"].tensors["g_idx"]
        assert not torch.equal(g_idx, g_idx.sort().values)
    _close(model(ids(20)[None]).logits, load_file(path / "logits.golden")["logits"], 2.0**-11)


def test_a_golden_checkpoint_survives_saving_bit_for_bit(tmp_path: Path) -> None:
    for source in sorted(GOLDEN.glob("gptqmodel-*")):
        qk.save_model(qk.load_model(source), tmp_path / source.name)
        before = load_file(source / "model.safetensors")
        after = load_file(tmp_path / source.name / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
        )


@pytest.mark.parametrize("options", [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    {"load_in_8bit": True},
], ids=str)  # fmt: skip
def test_bitsandbytes(options: dict[str, Any], tmp_path: Path) -> None:
    """transformers and bitsandbytes quantize on the CPU and save; 4 bits multiply in bfloat16."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # bitsandbytes' CPU kernel wants blocks of 64 that divide K
    save_tiny(tmp_path / "m", intermediate_size=128)
    if "load_in_4bit" in options:
        options = {**options, "bnb_4bit_compute_dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        quantization_config=BitsAndBytesConfig(**options),
        device_map="cpu",
        dtype=torch.float32,
    )
    theirs.save_pretrained(tmp_path / "q", max_shard_size="30KB")
    ours = qk.load_model(tmp_path / "q")
    layers = [m for m in ours.modules() if isinstance(m, qk.QuantLinear)]
    assert len(layers) == 14
    with torch.no_grad():
        a, b = ours(ids(20)[None]).logits, theirs(ids(20)[None]).logits
    # LLM.int8() rounds activations to 8 bits: one that falls on the other side of a half is a step
    # off.
    _close(a, b, 2.0**-7 if "load_in_8bit" in options else 2.0**-8)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fine_grained_fp8(scale_fmt: str, tmp_path: Path) -> None:
    """transformers' own FP8 of DeepSeek's kind.

    It runs on GPUs only, but its quantization runs here.
    """
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = FineGrainedFP8Config(scale_fmt=scale_fmt, modules_to_not_convert=["lm_head"])
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=config))
    model = save_tiny(tmp_path / "m", hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    tensors = load_file(tmp_path / "m/model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        tensors |= quantize.convert({name: tensors[name]})
    save_file(tensors, tmp_path / "m/model.safetensors")
    path = tmp_path / "m/config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": config.to_dict()})
    )
    ours = qk.load_model(tmp_path / "m")
    for name, layer in ours.named_modules():
        if isinstance(layer, qk.QuantLinear):
            assert layer.packed.params["activation"] == "dynamic"
            scale = tensors[f"{name}.weight_scale_inv"].float()
            assert (scale.log2() == scale.log2().round()).all() == (scale_fmt == "ue8m0")
            want = tensors[f"{name}.weight"].float() * scale.repeat_interleave(
                128, 0
            ).repeat_interleave(128, 1)
            assert torch.equal(layer.packed.dequantize(), want)
            # E4M3 has 3 bits behind its point: half a step is 2^-4, and scales that are powers of
            # two are no worse
            weight = model.get_submodule(name).weight
            assert (want - weight).norm() < 2**-4 * weight.norm()
            restored = layer.packed.prepack_("eight_bit").tensors["weight_scale_inv"]
            assert torch.equal(restored.float(), scale)
            assert restored.dtype == tensors[f"{name}.weight_scale_inv"].dtype
    assert sum(isinstance(m, qk.QuantLinear) for m in ours.modules()) == 14
    qk.save_model(ours, tmp_path / "s")
    after = load_file(tmp_path / "s/model.safetensors")
    assert all(
        torch.equal(after[n].view(torch.uint8), t.view(torch.uint8))
        for n, t in tensors.items()
        if t.dim() == 2
    )


def _ct_scheme(kind: str) -> dict[str, Any]:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    return {
        "int4": quantization.preset_name_to_scheme("W4A16", ["Linear"]),
        "int4-asymmetric": quantization.preset_name_to_scheme("W4A16_ASYM", ["Linear"]),
        "int8": quantization.preset_name_to_scheme("W8A8", ["Linear"]),
        "fp8": quantization.preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]),
        "fp8-block": quantization.preset_name_to_scheme("FP8_BLOCK", ["Linear"]),
    }[kind]


@pytest.mark.parametrize("kind", ["int4", "int4-asymmetric", "int8", "fp8", "fp8-block"])
def test_compressed_tensors(kind: str, tmp_path: Path) -> None:
    """compressed-tensors' compressor, on a model whose scales its own functions chose."""
    scheme = _ct_scheme(kind)
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        fake_quantize,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    if scheme.weights.group_size:
        scheme.weights.group_size = 32
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    model = tiny_model()
    reference = tiny_model()
    apply_quantization_config(model, config, show_progress=False)
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        weight, args = module.weight.detach(), scheme.weights
        n, k = weight.shape
        if kind == "fp8-block":
            padded = torch.nn.functional.pad(weight, (0, -k % 128, 0, -n % 128))
            grouped = padded.view(-(-n // 128), 128, -1, 128).transpose(1, 2).flatten(2)
        else:
            grouped = weight.view(n, -1, args.group_size or k)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
        rounded = fake_quantize(
            weight, module.weight_scale, getattr(module, "weight_zero_point", None), args
        )
        reference.get_submodule(name).weight.data.copy_(rounded)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "q", save_original_format=False)
    compressor.update_config(tmp_path / "q")
    ours = qk.load_model(tmp_path / "q")
    for name, layer in ours.named_modules():
        if isinstance(layer, qk.QuantLinear):
            assert torch.equal(layer.packed.dequantize(), reference.get_submodule(name).weight), (
                name
            )
    assert sum(isinstance(m, qk.QuantLinear) for m in ours.modules()) == 14
    if scheme.input_activations is None:
        with torch.no_grad():
            _close(ours(ids(20)[None]).logits, reference(ids(20)[None]).logits, 2.0**-21)
