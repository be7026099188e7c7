"""Which linear layer is quantized how: the exceptions of each method, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.checkpoints.hf import reader as huggingface
from qkernels.checkpoints.hf.quantization import Plan

from ..tiny import ids, tiny_model

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def _group(bits: int, targets: list[str], **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, **more}


def _ct(groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
    }
    return {**config, "config_groups": groups, **more}


# ---------------------------------------------------------------------- reading the rules
@pytest.mark.parametrize(("entry", "skipped", "kept"), [
    ("lm_head", ["lm_head"], ["model.lm_head_2"]),
    ("model.layers.1", ["model.layers.1.mlp.up_proj"], ["model.layers.11.mlp.up_proj"]),
    ("mlp.gate", ["model.layers.1.mlp.gate"], ["model.layers.1.mlp.gate_proj"]),
    (r"model\.layers\.\d+\.mlp", ["model.layers.12.mlp.up_proj"],
     ["model.layers.12.self_attn.q_proj"]),
])  # fmt: skip
@pytest.mark.parametrize("base", [
    {**GPTQ, "?": "modules_to_not_convert"},
    {"quant_method": "awq", "bits": 4, "?": "modules_to_not_convert"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True, "?": "llm_int8_skip_modules"},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "?": "ignored_layers"},
], ids=lambda base: base["quant_method"])  # fmt: skip
def test_lists_of_modules_left_alone(
    base: dict[str, Any], entry: str, skipped: list[str], kept: list[str]
) -> None:
    config = {k: v for k, v in base.items() if k != "?"}
    plan = Plan("here", {**config, base["?"]: [entry]})
    assert all(plan.scheme(name) is None for name in skipped)
    assert all(plan.scheme(name) == plan.schemes[0] for name in kept)


def test_our_skip_rule_is_transformers_s() -> None:
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    names = [n for n, _ in tiny_model(num_hidden_layers=12).named_modules() if n]
    for entry in [
        "lm_head",
        "layers.1",
        "model.layers.1",
        "mlp",
        "up_proj",
        r"model.*\.q_proj",
        "model.layers.*",
        "a|lm_head",
    ]:
        plan = Plan("here", {**GPTQ, "modules_to_not_convert": [entry]})
        theirs = [utils.should_convert_module(n, [entry]) for n in names]
        assert [plan.scheme(n) is not None for n in names] == theirs, entry


def test_gptq_dynamic_rules_first_match_wins() -> None:
    plan = Plan("here", {**GPTQ, "dynamic": {
        "-:.*up_proj": {}, r"+:model\.layers\.1\..*": {"bits": 8, "group_size": -1},
        ".*down_proj": {"bits": 2},
    }})  # fmt: skip
    assert plan.scheme("model.layers.1.mlp.up_proj") is None
    scheme = plan.scheme("model.layers.1.mlp.down_proj")
    assert scheme is not None
    assert (scheme.params["bits"], scheme.params["group_size"]) == (8, -1)
    assert plan.scheme("model.layers.0.mlp.down_proj").params["bits"] == 2
    assert plan.scheme("model.layers.0.mlp.gate_proj").params["bits"] == 4


def test_config_groups_most_specific_target_wins() -> None:
    plan = Plan("here", _ct({
        "a": _group(4, ["Linear"]), "b": _group(8, [r"re:.*down_proj$"]),
        "c": _group(3, ["model.layers.1.mlp.down_proj"]),
    }, ignore=["lm_head", r"re:.*layers\.0\.self_attn.*"]))  # fmt: skip
    bits = {n: s and s.params["bits"] for n in (
        "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj",
    ) for s in [plan.scheme(n)]}  # fmt: skip
    assert list(bits.values()) == [None, None, 4, 8, 3]


def test_config_groups_agree_with_compressed_tensors() -> None:
    """compressed-tensors' own matcher gives each module of the same model the same scheme."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = _ct({
        "a": _group(4, [r"re:.*self_attn.*"]),
        "b": _group(8, [r"re:.*down_proj$", "model.layers.0.mlp.up_proj"]),
        "c": _group(2, ["Linear"]), "d": {"targets": ["LlamaAttention"], "weights": None},
    }, ignore=[r"re:.*k_proj", "lm_head", "model.layers.1.mlp.gate_proj"])  # fmt: skip
    model = tiny_model()
    theirs = quantization.QuantizationConfig.model_validate(config)
    quantization.apply_quantization_config(model, theirs, show_progress=False)
    plan = Plan("here", config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            applied = getattr(module, "quantization_scheme", None)
            ours = plan.scheme(name)
            assert (ours and ours.params["bits"]) == (applied and applied.weights.num_bits), name


@pytest.mark.parametrize(("config", "message"), [
    ({**GPTQ, "modules_to_not_convert": "lm_head"},
     "modules_to_not_convert: expected a list of names, got 'lm_head'"),
    ({**GPTQ, "modules_to_not_convert": ["("]},
     "modules_to_not_convert: expected a regular expression"),
    ({**GPTQ, "dynamic": ["-:x"]}, r"dynamic: expected an object, got \['-:x'\]"),
    ({**GPTQ, "dynamic": {"+:[": {}}}, "dynamic: expected a regular expression, got '\\['"),
    ({**GPTQ, "dynamic": {"+:x": 4}}, r"dynamic\['\+:x'\]: expected an object, got 4"),
    (_ct({}), "config_groups: expected a non-empty object"),
    (_ct({"a": 3}), "config_groups.a: expected an object, got 3"),
    (_ct({"a": {"targets": ["Linear"]}}), "config_groups.a.weights: expected an object, got None"),
    (_ct({"a": {"targets": ["Linear"], "weights": None}}),
     "config_groups: expected a group with weights, got none"),
    (_ct({"a": _group(4, "Linear")}),
     "config_groups.a.targets: expected a list of names, got 'Linear'"),
    (_ct({"a": _group(4, ["re:*"])}),
     r"config_groups.a.targets: expected a regular expression, got '\*'"),
    (_ct({"a": _group(4, ["Linear"], format="marlin-24")}), "config_groups: expected gptq, awq"),
    (_ct({"a": _group(4, ["Linear"], input_activations={"num_bits": 8})}),
     "input_activations: expected null with pack-quantized"),
    (_ct({"a": _group(4, ["Linear"], output_activations={})}),
     "output_activations: expected null, got {}"),
    (_ct({"a": _group(4, ["Linear"])}, sparsity_config={"format": "sparse-24-bitmask"}),
     "sparsity_config.format: expected 'dense'"),
    (_ct({"a": _group(4, ["Linear"])}, format=None),
     "quantization_config.format: expected a string, got None"),
    ({"quant_method": "fp8", "weight_block_size": [64]},
     r"weight_block_size: expected two positive integers, got \[64\]"),
    ({"quant_method": ["gptq"]}, r"quant_method: expected gptq, .*; got \['gptq'\]"),
    ({"quant_method": "bitsandbytes"}, "quant_method: expected .*bitsandbytes .4 or 8 bits"),
])  # fmt: skip
def test_rules_that_are_none(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        Plan("here", config)


# ------------------------------------------------------------------- models with layers that differ
def _mixed(*kinds: tuple[str, dict[str, Any], list[str]]) -> nn.Module:
    """Quantize with each (format, parameters, patterns of layers to leave for the next)."""
    model = tiny_model()
    for format, params, skip in kinds:
        qk.quantize_model(model, format, skip=skip, progress=False, **params)
    return model


def _assert_reads_back(model: nn.Module, path: Path) -> dict[str, Any]:
    huggingface.save(model, path)
    again = huggingface.load(path)
    for name, layer in model.named_modules():
        if isinstance(layer, qk.QuantLinear):
            other = again.get_submodule(name)
            assert (other.packed.format, other.packed.params) == (
                layer.packed.format,
                layer.packed.params,
            ), name
    assert torch.equal(model(ids(20)[None]).logits, again(ids(20)[None]).logits)
    return json.loads((path / "config.json").read_text())["quantization_config"]


def test_gptq_of_several_widths_goes_into_dynamic(tmp_path: Path) -> None:
    model = _mixed(("gptq", {"group_size": 32}, ["*.down_proj", "*.0.mlp.up_proj"]),
                   ("gptq", {"group_size": -1, "bits": 8}, ["*.0.mlp.up_proj"]))  # fmt: skip
    config = _assert_reads_back(model, tmp_path / "m")
    assert config["bits"] == 4
    assert config["dynamic"] == {
        r"-:^model\.layers\.0\.mlp\.up_proj$": {},
        **{
            rf"+:^model\.layers\.{i}\.mlp\.down_proj$": {"bits": 8, "group_size": -1}
            for i in range(2)
        },
    }


def test_compressed_tensors_formats_mix(tmp_path: Path) -> None:
    attention = ["*.self_attn.*"]
    model = _mixed(("pack_quantized", {"group_size": 32}, [*attention, "*.down_proj"]),
                   ("fp8", {"activation": "dynamic"}, attention),
                   ("w8a8", {}, []))  # fmt: skip
    config = _assert_reads_back(model, tmp_path / "m")
    assert config["format"] == "mixed-precision"
    assert len(config["config_groups"]) == 3
    assert config["ignore"] == ["lm_head"]


def test_transformers_reads_our_mixed_file(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = _mixed(("pack_quantized", {"group_size": 32}, ["*.down_proj", "*.o_proj"]),
                   ("fp8", {"activation": "dynamic"}, ["*.o_proj"]))  # fmt: skip
    huggingface.save(model, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", device_map="cpu", dtype=torch.float32
    )
    theirs(ids(4)[None])  # it decompresses on first use
    for name, layer in model.named_modules():
        if isinstance(layer, qk.QuantLinear):
            assert torch.equal(theirs.get_submodule(name).weight, layer.packed.dequantize()), name


def test_gptq_v1_beside_v2_cannot_be_said(tmp_path: Path) -> None:
    model = _mixed(("gptq", {"group_size": 32}, ["*.down_proj"]),
                   ("gptq", {"group_size": 32, "checkpoint_format": "gptq_v2"}, []))  # fmt: skip
    with pytest.raises(
        ValueError, match="down_proj: expected gptq with .* because no quantization_config"
    ):
        huggingface.save(model, tmp_path / "m")


# ---------------------------------------------------------------------- config against tensors
def test_packed_tensors_of_a_layer_the_config_leaves_alone(tmp_path: Path) -> None:
    huggingface.save(_mixed(("gptq", {"group_size": 32}, [])), tmp_path / "m")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules_to_not_convert"] = [
        "lm_head",
        "model.layers.1.mlp.up_proj",
    ]
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="layers.1.mlp.up_proj: expected a plain weight, because .* got g_idx"
    ):
        huggingface.load(tmp_path / "m")


def test_quantized_lm_head(tmp_path: Path) -> None:
    model = _mixed(("gptq", {"group_size": 32}, []))
    with torch.no_grad():
        model.lm_head = qk.QuantLinear.from_linear(model.lm_head, "gptq", group_size=32)
    model.config.tie_word_embeddings = False
    config = _assert_reads_back(model, tmp_path / "m")
    assert config["lm_head"] is True
    assert "dynamic" not in config


@pytest.mark.parametrize(
    ("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")]
)
def test_configs_in_files_of_their_own(name: str, method: str, tmp_path: Path) -> None:
    """Files as AutoGPTQ and AutoAWQ wrote them before config.json held the config."""
    model = _mixed((method, {"group_size": 32}, []))
    huggingface.save(model, tmp_path / "m")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    own = {k: v for k, v in config.pop("quantization_config").items() if k != "quant_method"}
    if method == "awq":
        own = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    path.write_text(json.dumps(config))
    (tmp_path / "m" / name).write_text(json.dumps(own))
    again = huggingface.load(tmp_path / "m")
    assert torch.equal(model(ids(9)[None]).logits, again(ids(9)[None]).logits)


def test_scales_of_a_quantized_cache_are_passed_over(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = _mixed(("fp8", {"granularity": "tensor"}, []))
    huggingface.save(model, tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    more = {
        f"model.layers.0.self_attn.{n}": torch.ones(1)
        for n in ("k_scale", "k_proj.k_scale", "v_scale")
    }
    save_file({**load_file(file), **more}, file)
    assert torch.equal(
        model(ids(9)[None]).logits, huggingface.load(tmp_path / "m")(ids(9)[None]).logits
    )


def test_fp8_scales_as_transformers_names_them(tmp_path: Path) -> None:
    """quant_method fp8 without blocks: `weight_scale_inv` and `activation_scale`, both scalars."""
    model = _mixed(("fp8", {"granularity": "tensor", "activation": "static", "input_scale": 0.1,
                            "scale_name": "weight_scale_inv"}, []))  # fmt: skip
    config = _assert_reads_back(model, tmp_path / "m")
    assert config["quant_method"] == "fp8"
    assert config["weight_block_size"] is None
    packed = model.model.layers[0].mlp.up_proj.packed
    before = packed.tensors
    assert {"weight_scale_inv", "activation_scale"} < set(before)
    packed.prepack_("eight_bit")
    assert torch.equal(packed.storage["input_scale"], before["activation_scale"])
    assert all(torch.equal(before[name], tensor) for name, tensor in packed.tensors.items())
