"""Mixtures of experts with other names and tensors, against transformers, which wrote the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels as qk

from ..moe_checkpoint import SIZES, edit, stacks_of
from .test_expert_layers import assert_same, ids, tensors_of


@pytest.mark.parametrize(
    "kind", ["OlmoeConfig", "DeepseekV3Config", "PhimoeConfig", "MiniMaxM2Config"]
)
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    """Routers, shared experts and biases of routers have other names in each architecture."""
    import transformers

    sizes = {**SIZES, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4,
     "moe_intermediate_size": 128,
             "intermediate_size": 128, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
             "q_lora_rank": 64,
             "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
             "v_head_dim": 64}  # fmt: skip
    if kind == "DeepseekV3Config":
        sizes["head_dim"] = 32
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**sizes)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "theirs")
    tokens = ids()
    with torch.no_grad():
        assert torch.equal(qk.load_model(tmp_path / "theirs")(tokens).logits, model(tokens).logits)
    qk.save_model(model, tmp_path / "ours")
    assert_same(tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours"))
    qk.quantize_model(model, "fp8", experts=True, progress=False)
    qk.save_model(model, tmp_path / "q")
    again = qk.load_model(tmp_path / "q")
    assert len(stacks_of(again)) == len(stacks_of(model)) >= 1
    assert_same(again.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.fixture
def kimi() -> nn.Module:
    """Kimi Linear: its files have convolutions for q, k and v; the model has one."""
    import transformers

    if not hasattr(transformers, "KimiLinearConfig"):
        pytest.skip("this transformers does not know Kimi Linear")
    sizes = {**SIZES, "intermediate_size": 128, "moe_intermediate_size": 128, "num_experts": 4,
     "head_dim": 32,
             "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
             "qk_nope_head_dim": 32,
             "v_head_dim": 64, "linear_head_dim": 64, "linear_num_heads": 4,
             "num_experts_per_token": 2,
             "pad_token_id": None, "use_cache": False}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.KimiLinearConfig(**sizes)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


def test_tensors_that_files_keep_in_parts(kimi: nn.Module, tmp_path: Path) -> None:
    kimi.save_pretrained(tmp_path / "theirs")
    again, tokens = qk.load_model(tmp_path / "theirs"), ids()
    assert_same(again.state_dict(), kimi.state_dict())
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, kimi(tokens).logits)
    qk.save_model(kimi, tmp_path / "ours")
    assert_same(tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours"))
    name = "model.layers.0.self_attn.{}_conv1d.weight"
    assert name.format("k") in tensors_of(tmp_path / "ours")
    edit(tmp_path / "ours", **{name.format("k"): torch.zeros(255, 1, 4)})
    with pytest.raises(
        ValueError, match=r"q_conv1d.*, .*v_conv1d.*: expected shape \(768, 1, 4\) together"
    ):
        qk.load_model(tmp_path / "ours")
    edit(tmp_path / "ours", drop=name.format("k"))
    with pytest.raises(ValueError, match="got 2 unexpected: .*conv1d.weight"):
        qk.load_model(tmp_path / "ours")
    qk.quantize_model(kimi, "gptq", group_size=64, experts=True, progress=False)
    qk.save_model(kimi, tmp_path / "q")
    assert_same(qk.load_model(tmp_path / "q").state_dict(), kimi.state_dict())
