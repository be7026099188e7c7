"""Bad checkpoints of mixtures of experts: an error that names the fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qkernels as qk

from ..moe_checkpoint import edit, save_moe, stacks_of, tiny_moe
from ..tiny import tiny_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_moe("mixtral", "gptq", {"group_size": 64}, tmp_path / "q", tmp_path / "p")
    return tmp_path / "q"


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3"


def test_a_missing_expert(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = load_file(path)
    save_file({k: t for k, t in whole.items() if not k.startswith(f"{EXPERT}.")}, path)
    with pytest.raises(
        ValueError, match=f"{EXPERT}: expected the weight of one of 4 experts, found none"
    ):
        qk.load_model(saved)
    save_file(
        {k: t for k, t in whole.items() if "layers.1.block_sparse_moe.experts" not in k}, path
    )
    with pytest.raises(ValueError, match="found none of: model.layers.1.mlp.experts.gate_up_proj"):
        qk.load_model(saved)


def test_a_missing_tensor_of_an_expert(saved: Path) -> None:
    edit(saved, drop=f"{EXPERT}.scales")
    with pytest.raises(
        ValueError, match=rf"model.safetensors: {EXPERT}: gptq: scales: expected .* got none"
    ):
        qk.load_model(saved)


def test_an_expert_too_many(saved: Path) -> None:
    tensor = load_file(saved / "model.safetensors")[f"{EXPERT}.scales"]
    edit(saved, **{EXPERT.replace(".2.", ".4.") + ".scales": tensor})
    with pytest.raises(ValueError, match=r"experts.4.w3: expected experts 0..3, got 4"):
        qk.load_model(saved)


# of no expert's weight, of no tensor, of another architecture
@pytest.mark.parametrize("name", ["w4.qweight", "w1", "gate_proj.qweight"])
def test_tensors_of_other_names(name: str, saved: Path) -> None:
    edit(saved, **{f"model.layers.0.block_sparse_moe.experts.0.{name}": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"NAME one of w1, w3, w2, got '0\."):
        qk.load_model(saved)


@pytest.mark.parametrize("number", ["-1", "1e3", "99999999999999999999", "٣", "3_0"])
def test_experts_that_are_no_numbers(number: str, saved: Path) -> None:
    edit(saved, **{f"model.layers.0.block_sparse_moe.experts.{number}.w1.qweight": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected tensors named EXPERT.NAME.TENSOR"):
        qk.load_model(saved)


def test_one_tensor_for_all_packed_experts(saved: Path) -> None:
    edit(saved, **{"model.layers.0.mlp.experts.gate_up_proj_packed": torch.zeros(1)})
    with pytest.raises(
        ValueError, match="expected tensors named EXPERT.* got 'gate_up_proj_packed'"
    ):
        qk.load_model(saved)


def test_a_tensor_under_two_names(saved: Path) -> None:
    edit(saved, **{f"{EXPERT.replace('block_sparse_moe', 'mlp')}.scales": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"w3.scales': expected once, got it again as .*w3.scales'"
    ):
        qk.load_model(saved)


def test_a_bias_that_is_not_zero(saved: Path) -> None:
    edit(saved, **{f"{EXPERT}.bias": torch.zeros(128)})
    assert len(stacks_of(qk.load_model(saved))) == 2
    edit(saved, **{f"{EXPERT}.bias": torch.arange(128.0)})
    with pytest.raises(
        ValueError, match=f"{EXPERT}.bias: expected none or zeros, got one that is not zero"
    ):
        qk.load_model(saved)


def test_a_bad_packed_tensor(saved: Path) -> None:
    scales = load_file(saved / "model.safetensors")[f"{EXPERT}.scales"]
    scales[0, 3] = torch.nan
    edit(saved, **{f"{EXPERT}.scales": scales})
    with pytest.raises(
        ValueError, match=f"model.safetensors: {EXPERT}: gptq: scales: expected finite"
    ):
        qk.load_model(saved)


def test_experts_in_different_formats(saved: Path) -> None:
    """The config may give each module its own format."""
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {rf"+:^{EXPERT}$": {"bits": 8}}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"{EXPERT}: expected gptq with .* like .*experts.0.w3, .* got gptq with"
    ):
        qk.load_model(saved)
    config["quantization_config"]["dynamic"] = {rf"-:^{EXPERT}$": {}}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{EXPERT}: expected a plain weight, because"):
        qk.load_model(saved)


def test_one_plain_expert_among_packed_ones(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = {k: t for k, t in load_file(path).items() if not k.startswith(f"{EXPERT}.")}
    save_file({**tensors, f"{EXPERT}.weight": torch.zeros(128, 256).half()}, path)
    with pytest.raises(ValueError, match=rf"{EXPERT}: expected gptq with .* got a plain weight"):
        qk.load_model(saved)


def test_experts_whose_own_tensors_say_other_parameters(tmp_path: Path) -> None:
    save_moe("mixtral", "nf4", {}, tmp_path / "q", tmp_path / "p")
    other = qk.quantize(torch.randn(128, 256), "nf4", block_size=128)
    path = tmp_path / "q/model.safetensors"
    tensors = {k: t for k, t in load_file(path).items() if not k.startswith(f"{EXPERT}.")}
    save_file(tensors | {f"{EXPERT}.{k}": t for k, t in other.tensors.items()}, path)
    with pytest.raises(
        ValueError, match=r"experts\[2\]: expected params .*, that of experts\[0\], got"
    ):
        qk.load_model(tmp_path / "q")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 3}, r"expected experts 0..2, got 3"),
        ({"num_local_experts": 5},
         r"experts.4.w1: expected the weight of one of 5 experts, found none"),
        ({"num_local_experts": 999},
         r"experts.4.w1: expected the weight of one of 999 experts, found none"),
        ({"num_local_experts": 10**4},
         r"gate.weight': expected shape \(10000, 256\) .* got \(4, 256\)"),
        ({"num_local_experts": 10**5},
         "expected parameters of at most [0-9]+ numbers, as the files hold fewer"),
        ({"num_local_experts": 10**12}, "num_local_experts: expected a number of at most 131072"),
        ({"intermediate_size": 64},
         r"experts.0.w1: gptq: qweight: expected shape \(32, 64\), got \(32, 128\)"),
        ({"hidden_act": "relu"},
         r"block_sparse_moe.experts: experts: act_fn: expected SiLU or GELU, got"),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_do_not_fit(changes: dict[str, Any], message: str, saved: Path) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if (count := changes.get("num_local_experts", 4)) < 1000:
        gate = "model.layers.{}.block_sparse_moe.gate.weight"
        edit(saved, **{gate.format(layer): torch.zeros(count, 256) for layer in range(2)})
    with pytest.raises(ValueError, match=message):
        qk.load_model(saved)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight", torch.zeros(128, 255),
         r"w3.weight': expected shape \(128, 256\), got \(128, 255\)"),
        ("weight", torch.zeros(128, 256, dtype=torch.int8),
         r"w3.weight': expected dtype F32, got I8"),
        ("weight", torch.zeros(128, 256).half(), r"w3.weight': expected dtype F32, got F16"),
        ("bias", torch.zeros(128),
         r"w3.bias': expected a plain weight and no other tensor, got this one"),
    ],
    ids=str,
)  # fmt: skip
def test_plain_experts_that_do_not_fit(
    name: str, tensor: Tensor, message: str, saved: Path
) -> None:
    edit(saved.parent / "p", **{f"{EXPERT}.{name}": tensor})
    with pytest.raises(ValueError, match=message):
        qk.load_model(saved.parent / "p")


def test_all_plain_experts_of_a_dtype_that_is_none(saved: Path) -> None:
    path = saved.parent / "p/model.safetensors"
    tensors = {k: t.to(torch.int32) if ".experts." in k else t for k, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"expected dtype F16, BF16 or F32, got I32"):
        qk.load_model(path.parent)


def test_experts_bigger_than_memory_are_not_made(saved: Path) -> None:
    """The sizes claim half a terabyte a layer; each of them alone could be true."""
    path = saved / "config.json"
    sizes = {"intermediate_size": 65536, "moe_intermediate_size": 65536, "num_local_experts": 4096}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    with pytest.raises(ValueError, match=r"expected shape \(4096, 256\) from config.json, got"):
        qk.load_model(saved)


def test_a_gguf_file_takes_no_experts(tmp_path: Path) -> None:
    model = qk.quantize_model(tiny_moe("qwen3_moe"), "q8_0", experts=True, progress=False)
    with pytest.raises(ValueError, match="expected one of the types llama.* got .qwen3_moe."):
        qk.save_model(model, tmp_path / "m.gguf", tokenizer=tiny_tokenizer())
    assert not (tmp_path / "m.gguf").exists()
