"""Mixtures of experts of transformers: experts as parameters, and experts as linear layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.models.quantize import model_summary
from qkernels.nn.experts import expert_modules, routers

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}  # fmt: skip


def model_of(kind: str) -> nn.Module:
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=4)
    else:
        more = {"moe_intermediate_size": 32, "intermediate_size": 96, "num_experts": 4}
        config = transformers.Qwen3MoeConfig(**SIZES, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(0, 0.2)  # or the experts would not matter
    return model


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_are_parameters(kind: str) -> None:
    model = model_of(kind)
    assert len(list(expert_modules(model))) == 2
    plain = copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match=r"experts of 2 layers \(model.layers.0.*\), .* stay as they are"
    ):
        qk.quantize_model(plain, "q8_0", progress=False)
    assert len(list(expert_modules(plain))) == 2
    quantized = qk.quantize_model(copy.deepcopy(model), "q8_0", experts=True, progress=False)
    assert not list(expert_modules(quantized))
    stacks = [m for m in quantized.modules() if isinstance(m, qk.QuantExperts)]
    assert len(stacks) == 2
    # The same model with the dequantized weights where they were.
    for (_, module), stack in zip(expert_modules(plain), stacks, strict=True):
        module.gate_up_proj.data = torch.stack([p.dequantize() for p in stack.gate_up])
        module.down_proj.data = torch.stack([p.dequantize() for p in stack.down])
    ids = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        want, original = plain(ids).logits, model(ids).logits
        torch.testing.assert_close(quantized(ids).logits, want, rtol=1e-4, atol=1e-4)
        assert (
            want - original
        ).abs().max() > 1e-3  # so that what is compared differs from what it was
    assert model_summary(quantized).quantized_weights > model_summary(plain).quantized_weights
    state = stacks[0].state_dict()
    gate_up = torch.cat([state["3.gate_proj.data"], state["3.up_proj.data"]])
    assert torch.equal(gate_up, stacks[0].gate_up.expert(3).tensors["data"])


class Mixture(nn.Module):
    """A router over experts that are linear layers, as in older models."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


def test_experts_that_are_linear_layers() -> None:
    model = qk.quantize_model(Mixture(), "nf4", skip="gate", progress=False)
    assert all(isinstance(expert, qk.QuantLinear) for expert in model.experts)
    assert type(model.gate) is nn.Linear
    stacked = qk.PackedExperts([expert.packed for expert in model.experts])
    x = torch.randn(5, 64)
    bias = torch.stack([expert.bias for expert in model.experts]).detach()
    every = torch.arange(3).expand(5, 3)
    y = qk.grouped_matmul(x, stacked, every, model.gate(x).softmax(-1).detach(), bias).sum(1)
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_quantized_says_so() -> None:
    model = model_of("mixtral")
    with pytest.raises(
        ValueError, match="model.layers.0.mlp.experts: awq: group_size: .* K=96, .* got 64"
    ):
        qk.quantize_model(model, "awq", experts=True, group_size=64, progress=False)
    assert not any(isinstance(m, qk.QuantLinear) for m in model.modules()), (
        "changed before all was checked"
    )
    with pytest.raises(
        ValueError, match="experts: expected False with a recipe or calibration data"
    ):
        qk.quantize_model(model, "gptq", torch.zeros(1, 8, dtype=torch.int64), experts=True)
    (_, module), *_ = expert_modules(model)
    module.act_fn = nn.ReLU()
    with pytest.raises(ValueError, match="act_fn: expected SiLU or GELU, got ReLU"):
        qk.QuantExperts.from_module(module, "nf4")
    module.register_parameter("down_proj_bias", nn.Parameter(torch.zeros(4, 64)))
    with pytest.raises(ValueError, match="expected parameters gate_up_proj and down_proj alone"):
        qk.QuantExperts.from_module(module, "nf4")


#: experts that compute more than gate, up and down: clamps, a norm behind each, experts that change
#: nothing
OTHERS = [
    ("deepseek_v4", "DeepseekV4Experts", "got something more from DeepseekV4Experts"),
    ("glm5_next", "Glm5NextTextExperts", "act_fn: expected SiLU or GELU, got None"),
    ("muse_spark", "MuseSparkExperts", "expected no module but act_fn, got post_expert_norm"),
    ("longcat_flash", "LongcatFlashExperts", "expected no module but act_fn, got identity_expert"),
    ("inkling2", "Inkling2Experts", "act_fn: expected SiLU or GELU"),
    ("llama4", "Llama4TextExperts", "expected gate_up_proj"),
]


@pytest.mark.parametrize(("model", "name", "message"), OTHERS, ids=str)
def test_experts_that_compute_something_else_are_refused(
    model: str, name: str, message: str
) -> None:
    """Most of these modules look like usual experts, but for their forward."""
    file = f"transformers.models.{model}.modeling_{model}"
    kind = getattr(pytest.importorskip(file), name)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 16,
     "hidden_act": "silu",
             "num_experts": 2, "n_routed_experts": 2, "num_local_experts": 2, "swiglu_limit": 7.0,
             "expert_ffn_hidden_size": 16, "zero_expert_num": 1, "rms_norm_eps": 1e-6,
             "moe_num_experts": 2,
             "gated_expert_act": "silu"}  # fmt: skip

    class Sizes:
        def __getattr__(self, field: str) -> object:
            return sizes.get(field, 1)

    module = kind(Sizes())
    with pytest.raises(ValueError, match=message):
        qk.QuantExperts.from_module(module, "q8_0")


def test_a_router_that_is_a_linear_with_a_forward_of_its_own() -> None:
    config = transformers.PhimoeConfig(**SIZES, intermediate_size=96, num_local_experts=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    router = model.model.layers[0].mlp.router
    assert isinstance(router, nn.Linear)
    qk.quantize_model(model, "q8_0", experts=True, progress=False)
    assert model.model.layers[0].mlp.router is router
    assert isinstance(model.model.layers[0].self_attn.q_proj, qk.QuantLinear)
    model(torch.randint(0, 128, (1, 5)))


def test_halves_are_of_one_weight_where_that_can_be_joined() -> None:
    """Gate and up with one scale stay one weight; nested scales that would be cut do not."""
    for _, module in expert_modules(model_of("mixtral")):
        one = qk.QuantExperts.from_module(module, "fp8", granularity="tensor")
        assert isinstance(one.gate_up, qk.PackedExperts)
        two = qk.QuantExperts.from_module(module, "nf4", double_quant=True)
        assert isinstance(two.gate_up, tuple)
        for e in range(4):
            halves = module.gate_up_proj[e].detach().split(96)
            for half, role in zip(halves, ("gate", "up"), strict=True):
                packed = two.parts.expert(e)[role]
                assert packed.params["double_quant"]
                assert torch.equal(
                    packed.dequantize(), qk.quantize(half, "nf4", double_quant=True).dequantize()
                )


def test_what_is_a_router() -> None:
    """The gate of a shared expert is no router, but a linear layer like any other."""
    config = transformers.Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=32,
        intermediate_size=96,
        num_experts=4,
        shared_expert_intermediate_size=32,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert [name for name, _ in routers(model)] == [
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    ]
    qk.quantize_model(model, "q8_0", experts=True, progress=False)
    assert isinstance(model.model.layers[0].mlp.shared_expert_gate, qk.QuantLinear)
    assert [name for name, _ in routers(model)] == [
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    ]
