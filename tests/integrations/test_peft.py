"""QLoRA: adapters of PEFT on packed layers learn, the base does not move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels as qk

from ..tiny import ids, tiny_model

peft = pytest.importorskip("peft")

BASES: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {"block_size": 32, "double_quant": True}),
    ("gptq", {"group_size": 32}),
    ("fp8", {}),
]


def _with_adapters(name: str = "nf4", params: dict[str, Any] | None = None, **options: Any) -> Any:
    from qkernels.integrations.peft import with_quant_linear

    model = qk.quantize_model(tiny_model(), name, progress=False, **(params or {}))
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})
    return peft.get_peft_model(model, with_quant_linear(config, model))


def _loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, labels=tokens).loss


@pytest.mark.parametrize(("name", "params"), BASES, ids=str)
def test_adapters_learn_and_the_base_stays(name: str, params: dict[str, Any]) -> None:
    model = _with_adapters(name, params)
    wrapped = [m for m in model.modules() if type(m).__name__ == "LoraQuantLinear"]
    assert len(wrapped) == 14
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    tokens = ids(64).view(2, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(12):
        loss = _loss(model, tokens)
        loss.backward()
        if step == 1:  # B starts at zero, so A has a gradient from the second step on
            grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            assert all(
                g is not None and bool(torch.isfinite(g).all()) and bool(g.any())
                for g in grads.values()
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_gradients_are_those_of_the_dequantized_model() -> None:
    """Against autograd through plain matmuls: only the order of float32 sums differs."""
    torch.manual_seed(0)
    model = _with_adapters("nf4", {"block_size": 32})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    plain = tiny_model()
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            if type(layer).__name__ == "LoraQuantLinear":
                plain.get_submodule(name).weight.copy_(layer.base_layer.packed.dequantize())
    other = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules="all-linear"))
    other.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False
    )
    tokens = ids(40).view(2, 20)
    _loss(model, tokens).backward()
    _loss(other, tokens).backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    theirs = {n: p.grad for n, p in other.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert (grad - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def test_adapters_are_saved_and_loaded_on_their_own(tmp_path: Path) -> None:
    from qkernels.integrations.peft import with_quant_linear

    model = _with_adapters()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 200_000
    base = qk.quantize_model(tiny_model(), "nf4", progress=False)
    plain = base(ids(9)[None]).logits
    config = with_quant_linear(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=config)
    assert torch.equal(again(ids(9)[None]).logits, model.eval()(ids(9)[None]).logits)
    assert not torch.equal(again(ids(9)[None]).logits, plain)
    with again.disable_adapter():
        assert torch.equal(again(ids(9)[None]).logits, plain)


def test_a_model_that_transformers_quantized_on_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from qkernels.integrations.peft import with_quant_linear
    from qkernels.integrations.transformers import QKernelsConfig

    from ..tiny import save_tiny

    save_tiny(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.bfloat16, quantization_config=QKernelsConfig("nf4")
    )
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    config = with_quant_linear(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    tuned = peft.get_peft_model(model, config).train()
    _loss(tuned, ids(32).view(2, 16)).backward()
    grads = [p.grad for n, p in tuned.named_parameters() if "lora_B" in n]
    assert len(grads) == 4
    assert all(g is not None and bool(g.any()) for g in grads)


def test_two_adapters_and_switching() -> None:
    model = _with_adapters()
    x = ids(9)[None]
    first = model(x).logits
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            parameter.data.normal_(0, 0.1)
    assert not torch.equal(model(x).logits, first)
    model.set_adapter("default")
    assert torch.equal(model(x).logits, first)
