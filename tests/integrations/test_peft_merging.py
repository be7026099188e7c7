"""Merging adapters into packed layers gives what PEFT gives on plain, dequantized layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import qkernels as qk

from ..tiny import ids, tiny_model

peft = pytest.importorskip("peft")

from .peft_judge import NF4, close, pair, plain_layers  # noqa: E402

BASES: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {"block_size": 32, "double_quant": True}),
    ("gptq", {"group_size": 32}),
    ("awq", {"group_size": 32}),
    ("q8_0", {}),
    ("fp16", {}),
]
BIASES = {"attention_bias": True, "mlp_bias": True}
X = ids(18).view(2, 9)


def logits(model: Any, x: torch.Tensor = X, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(x, **options).logits


def same_layers(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-6) -> None:
    """Assert that two models have the same plain layers, with the same numbers."""
    mine, judge = plain_layers(ours), plain_layers(theirs)
    assert mine.keys() == judge.keys()
    for name, layer in judge.items():
        assert mine[name].weight.dtype == layer.weight.dtype, name
        assert close(mine[name].weight, layer.weight, tolerance), name
        assert (mine[name].bias is None) == (layer.bias is None), name
        if layer.bias is not None:
            assert mine[name].bias.dtype == layer.bias.dtype, name
            assert close(mine[name].bias, layer.bias, tolerance), name


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("base", BASES, ids=str)
def test_merging_is_what_peft_does(
    base: tuple[str, dict[str, Any]], lora_bias: bool, safe: bool
) -> None:
    ours, theirs = pair(base=base, options={"lora_bias": lora_bias, "lora_alpha": 12}, **BIASES)
    beside = logits(ours)
    assert close(beside, logits(theirs))
    for model in (ours, theirs):
        model.merge_adapter(safe_merge=safe)
    assert close(logits(ours), logits(theirs))
    same_layers(ours, theirs)
    ours.unmerge_adapter()
    assert torch.equal(logits(ours), beside)
    theirs.unmerge_adapter()
    merged, judge = (model.merge_and_unload(safe_merge=safe) for model in (ours, theirs))
    same_layers(merged, judge)
    assert close(logits(merged), logits(judge))
    assert not [m for m in merged.modules() if isinstance(m, qk.QuantLinear)]
    assert not [n for n, p in merged.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("lora_bias", [False, True])
def test_one_after_another_is_all_at_once(lora_bias: bool) -> None:
    names = ("default", "b", "c")
    ours, theirs = pair(adapters=names, options={"lora_bias": lora_bias}, **BIASES)
    beside = logits(ours)
    assert close(beside, logits(theirs))
    theirs.merge_adapter(list(names))
    ours.merge_adapter(list(names))
    once = {n: p.clone() for n, p in ours.named_parameters() if "base_layer" in n}
    same_layers(ours, theirs)
    ours.unmerge_adapter()
    assert torch.equal(logits(ours), beside)
    for name in ("c", "default", "b"):
        with pytest.warns(UserWarning, match="were merged") if name != "c" else _nothing():
            ours.merge_adapter([name])
    for name, parameter in ours.named_parameters():
        if "base_layer" in name:
            assert close(parameter, once[name], 1e-6), name
    ours.unmerge_adapter()
    assert torch.equal(logits(ours), beside)
    merged = ours.merge_and_unload(adapter_names=["b"])
    theirs.unmerge_adapter()
    same_layers(merged, theirs.merge_and_unload(adapter_names=["b"]), 1e-5)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_merging_twice_adds_once() -> None:
    ours, theirs = pair()
    theirs.merge_adapter()
    ours.merge_adapter(["default", "default"])
    same_layers(ours, theirs)
    with pytest.warns(UserWarning, match="already merged"):
        ours.merge_adapter(["default"])
    same_layers(ours, theirs)
    with pytest.warns(UserWarning, match="already merged"):
        same_layers(ours.merge_and_unload(), theirs.merge_and_unload())


def test_unmerging_what_is_not_merged_changes_nothing() -> None:
    ours, _ = pair()
    beside = logits(ours)
    with pytest.warns(UserWarning, match="Already unmerged"):
        ours.unmerge_adapter()
    assert torch.equal(logits(ours), beside)


def test_disabling_merged_adapters_gives_the_base() -> None:
    ours, theirs = pair()
    ours.merge_adapter()
    theirs.merge_adapter()
    with ours.disable_adapter(), theirs.disable_adapter():
        assert close(logits(ours), logits(theirs))


def test_a_lora_bias_has_nowhere_to_go_on_a_base_without_one() -> None:
    with pytest.warns(UserWarning, match="has no bias"):
        ours, theirs = pair(options={"lora_bias": True})
    beside = logits(ours)
    assert close(beside, logits(theirs))
    said = []
    for model in (theirs, ours):
        with pytest.raises(RuntimeError) as error:
            model.merge_adapter()
        said.append(str(error.value))
    assert said[0] == said[1]
    assert torch.equal(logits(ours), beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "upcast", [True, False], ids=["adapters in float32", "adapters in the model's"]
)
def test_the_merged_weights_are_in_the_dtype_of_the_model(dtype: torch.dtype, upcast: bool) -> None:
    from .peft_judge import bases, same_adapters

    tuned = []
    for base, ours in zip(bases(dtype=dtype, **BIASES), (True, False), strict=True):
        config = peft.LoraConfig(r=4, target_modules="all-linear", lora_bias=True)
        if ours:
            from qkernels.integrations.peft import with_quant_linear

            config = with_quant_linear(config, base)
        tuned.append(peft.get_peft_model(base, config, autocast_adapter_dtype=upcast).eval())
    same_adapters(tuned[0], tuned[1])
    for model in tuned:
        expected = torch.float32 if upcast else dtype
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {expected}
    # a 16-bit sum is rounded at other places
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2 if dtype == torch.bfloat16 else 5e-3
    assert close(logits(tuned[0]), logits(tuned[1]), tolerance)
    merged, judge = (model.merge_and_unload() for model in tuned)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    same_layers(
        merged, judge, {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    )
    assert close(logits(merged), logits(judge), tolerance)


def test_the_dtype_is_the_one_the_model_has_when_it_is_merged() -> None:
    ours, _ = pair(**BIASES)
    ours.to(torch.bfloat16)
    merged = ours.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(merged)).all()


def test_a_model_whose_first_parameters_are_adapters() -> None:
    """The adapters are float32, which says nothing about the model's dtype."""
    from qkernels.integrations.peft import with_quant_linear

    torch.manual_seed(0)
    layer = qk.QuantLinear.from_linear(nn.Linear(64, 32, bias=False), *NF4[:1], **NF4[1])
    model = nn.Sequential(layer, nn.LayerNorm(32, dtype=torch.bfloat16))
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, with_quant_linear(config, model))
    assert next(tuned.parameters()).dtype == torch.float32
    x = torch.randn(3, 64).bfloat16()
    beside = tuned(x)
    merged = tuned.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    assert merged[0].weight.dtype == torch.bfloat16
    assert close(merged(x), beside, 2e-2)


def test_layers_that_do_not_know_their_model_take_inputs_of_any_dtype() -> None:
    from qkernels.integrations.peft import with_quant_linear

    from .peft_judge import bases, same_adapters

    model, plain = bases()
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    ours = peft.get_peft_model(model, with_quant_linear(peft.LoraConfig(**options))).eval()
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**options)).eval()
    same_adapters(ours, theirs)
    merged, judge = ours.merge_and_unload(), theirs.merge_and_unload()
    layer = merged.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, qk.QuantLinear)
    assert layer.packed.format == "fp16"
    weight = judge.get_submodule("model.layers.1.mlp.down_proj").weight
    assert close(layer.packed.dequantize(), weight, 2**-11)
    assert close(logits(merged), logits(judge), 2**-8)
    assert torch.isfinite(logits(merged.to(torch.bfloat16))).all()


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_that_are_not_finite_are_refused_by_name(what: str, value: float) -> None:
    ours, _ = pair(dtype=torch.float16, options={"lora_bias": True}, **BIASES)
    beside = logits(ours)
    layer = ours.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    tensor = getattr(layer.lora_B["default"], what)
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.view(-1)[5] = value
        if what == "weight":
            layer.lora_A["default"].weight.fill_(1)
    with pytest.raises(
        ValueError,
        match=rf"^model\.layers\.1\.self_attn\.v_proj: expected a {what} that is finite in"
        r" torch\.float16 after merging default, got a largest value of "
    ):  # fmt: skip
        ours.merge_adapter()
    assert isinstance(layer.base_layer, qk.QuantLinear)
    assert not layer.merged
    ours.unmerge_adapter()
    with torch.no_grad():
        tensor.copy_(before)
    if what == "bias":
        assert torch.equal(logits(ours), beside)


def test_batches_of_several_adapters() -> None:
    ours, theirs = pair(adapters=("default", "b"), options={"lora_bias": True}, **BIASES)
    x, names = ids(27).view(3, 9), ["b", "__base__", "default"]
    assert close(logits(ours, x, adapter_names=names), logits(theirs, x, adapter_names=names))


def test_a_copy_merges_by_itself() -> None:
    ours, theirs = pair()
    beside = logits(ours)
    twin = copy.deepcopy(ours).to(torch.bfloat16)
    merged = twin.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    same = {n: m.to(torch.bfloat16) for n, m in plain_layers(theirs.merge_and_unload()).items()}
    assert all(
        close(layer.weight, same[name].weight, 2e-2) for name, layer in plain_layers(merged).items()
    )
    assert torch.equal(logits(ours), beside)
    part = copy.deepcopy(ours.get_submodule("base_model.model.model.layers.0.mlp"))
    assert all(layer._model() is ours.base_model.model for layer in (part.up_proj, part.down_proj))


def test_a_pickled_model_merges() -> None:
    ours, theirs = pair()
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(logits(again), logits(ours))
    assert close(logits(again.merge_and_unload()), logits(theirs.merge_and_unload()), 2**-8)


def test_layers_do_not_keep_their_model_alive() -> None:
    import gc
    import weakref

    from qkernels.integrations.peft import with_quant_linear

    model = qk.quantize_model(tiny_model(), "nf4", progress=False)
    config = with_quant_linear(peft.LoraConfig(r=4, target_modules="all-linear"), model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert copy.deepcopy(config).target_modules == config.target_modules


def test_a_merged_model_can_be_quantized_again() -> None:
    ours, _ = pair()
    merged = ours.merge_and_unload()
    before = {n: m.weight.clone() for n, m in plain_layers(merged).items()}
    qk.quantize_model(merged, "q8_0", progress=False)
    layers = {n: m for n, m in merged.named_modules() if isinstance(m, qk.QuantLinear)}
    assert len(layers) == 14
    assert all(
        close(layer.packed.dequantize(), before[name], 2**-7) for name, layer in layers.items()
    )


def test_a_layer_that_came_from_conv1d_is_one_again() -> None:
    transformers = pytest.importorskip("transformers")
    from qkernels.integrations.peft import with_quant_linear

    from .peft_judge import same_adapters

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    plain = copy.deepcopy(model)
    qk.quantize_model(model, NF4[0], progress=False, **NF4[1])
    for name, layer in model.named_modules():
        if isinstance(layer, qk.QuantLinear):
            plain.get_submodule(name).weight.data = layer.packed.dequantize().T.contiguous()
    options = {"r": 4, "target_modules": "all-linear", "fan_in_fan_out": True}
    ours = peft.get_peft_model(model, with_quant_linear(peft.LoraConfig(**options), model)).eval()
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**options)).eval()
    same_adapters(ours, theirs)
    assert close(logits(ours), logits(theirs))
    merged, judge = ours.merge_and_unload(), theirs.merge_and_unload()
    assert close(logits(merged), logits(judge))
    mine, right = merged.state_dict(), judge.state_dict()
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in right.items()}
    assert all(close(tensor, right[name], 1e-6) for name, tensor in mine.items())
