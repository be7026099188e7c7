"""Each field of LoraConfig does the same on packed and on plain layers, or is refused by name."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch

import qkernels as qk

from ..tiny import ids, tiny_model

peft = pytest.importorskip("peft")

from qkernels.integrations.peft import LoraQuantLinear, with_quant_linear  # noqa: E402

from .peft_judge import bases, close, pair, same_adapters  # noqa: E402

X = ids(18).view(2, 9)
LORA = peft.tuners.lora.config

#: refused on packed layers: what to set
REFUSED: dict[str, Any] = {
    "use_dora": True,
    "use_qalora": True,
    "velora_config": LORA.VeloraConfig(),
    "alora_invocation_tokens": [1, 2],
    "monteclora_config": LORA.MontecloraConfig(),
    "use_bdlora": LORA.BdLoraConfig(),
    "arrow_config": LORA.ArrowConfig(),
    "kasa_config": LORA.KasaConfig(),
}
#: the same on packed layers: options to compare by
SAME: dict[str, dict[str, Any]] = {
    "r": {"r": 6},
    "target_modules": {"target_modules": r".*\.(q_proj|down_proj)"},
    "exclude_modules": {"exclude_modules": ["v_proj"]},
    "lora_alpha": {"lora_alpha": 3},
    "lora_dropout": {"lora_dropout": 0.3},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "bias": {"bias": "all"},
    "bias of the adapted": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "use_rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "init_lora_weights": {"init_lora_weights": False},
    "layers_to_transform": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layers_pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "rank_pattern": {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {r"layers\.1\..*": 3}},
    "trainable_token_indices": {"trainable_token_indices": [3, 5]},
    "layer_replication": {
        "layer_replication": [(0, 2), (0, 2)],
        "target_modules": ["q_proj", "down_proj"],
    },
    "lora_bias": {"lora_bias": True},
    "target_parameters": {
        "target_parameters": ["embed_tokens.weight"],
        "target_modules": ["q_proj"],
    },
    "ensure_weight_tying": {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
}
#: nothing that a layer computes by, or of use with one of `init_lora_weights` alone
OTHER = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config",
}  # fmt: skip


def logits(model: Any, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(x).logits


def test_each_field_is_decided_on() -> None:
    """A field or variant that PEFT adds has no test here, so it fails this one."""
    known = {f.name for f in fields(peft.LoraConfig)}
    assert known == {name for name in SAME if " " not in name} | REFUSED.keys() | OTHER
    variants = {f.name for f in fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants | {"use_qalora"} == REFUSED.keys()


@pytest.mark.parametrize("name", SAME)
def test_a_field_does_what_it_does_on_plain_layers(name: str) -> None:
    ours, theirs = pair(options=SAME[name], attention_bias=True, mlp_bias=True)
    mine = {n for n, p in ours.named_parameters() if p.requires_grad}
    judge = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert mine == judge
    with torch.no_grad():  # what is trained beside adapters
        right = dict(theirs.named_parameters())
        for key, parameter in ours.named_parameters():
            if parameter.requires_grad and "lora_" not in key:
                right[key].add_(0.1 * torch.randn(parameter.shape))
                parameter.copy_(right[key])
    beside = logits(ours)
    assert close(beside, logits(theirs), 1e-4)
    assert not close(beside, logits(bases(attention_bias=True, mlp_bias=True)[0]), 1e-2)
    if name == "target_parameters":
        return  # the embedding, which is PEFT's own business; here it is tied, too
    merged = logits(ours.merge_and_unload())
    assert close(merged, beside, 1e-4)
    # whose layers share weights in PEFT, so that it adds adapters to all of them
    if name != "layer_replication":
        assert close(merged, logits(theirs.merge_and_unload()), 1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_variant_is_refused_by_its_name(name: str) -> None:
    model, _ = bases()
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", name: REFUSED[name]}
    config = with_quant_linear(peft.LoraConfig(**options), model)
    with pytest.raises(ValueError, match=f"^{name}: expected none with QuantLinear, got "):
        peft.get_peft_model(model, config)


def test_a_variant_is_refused_as_a_second_adapter() -> None:
    ours, _ = pair()
    before = logits(ours)
    config = peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    with pytest.raises(ValueError, match="use_dora: expected none"):
        ours.add_adapter("second", with_quant_linear(config, ours))
    assert torch.equal(logits(ours), before)


def test_a_variant_that_peft_adds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`update_layer` does not know its kind: PEFT's own look-up refuses it."""
    field = peft.LoraConfig.__dataclass_fields__["init_lora_weights"]
    monkeypatch.setattr(field, "metadata", {"lora_variants": ["gaussian"]})
    model, _ = bases()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian")
    with pytest.raises(ValueError, match="variant combination: .*gaussian"):
        peft.get_peft_model(model, with_quant_linear(config, model))


@pytest.mark.parametrize(
    "init",
    [
        "pissa",
        "pissa_niter_4",
        "olora",
        "OLoRA",
        "orthogonal",
        "loftq",
        "corda",
        "lora_ga",
        "mica",
        "of_2030",
    ],
)
def test_an_init_that_reads_the_weight_is_refused(init: str) -> None:
    model, _ = bases()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    config.init_lora_weights = init  # loftq asks for scipy when a config is made
    with pytest.raises(
        ValueError,
        match=r"^init_lora_weights: expected one of \(True, False, 'gaussian', 'eva'\) with "
              r"QuantLinear"
    ):  # fmt: skip
        peft.get_peft_model(model, with_quant_linear(config, model))


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian"])
def test_inits_are_those_of_peft(init: Any) -> None:
    started = []
    for model, ours in zip(bases(), (True, False), strict=True):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
        torch.manual_seed(3)
        tuned = peft.get_peft_model(model, with_quant_linear(config, model) if ours else config)
        started.append({n: p for n, p in tuned.named_parameters() if "lora_" in n})
    assert started[0].keys() == started[1].keys()
    assert all(torch.equal(parameter, started[1][name]) for name, parameter in started[0].items())


def test_eva_starts_from_inputs_as_in_peft() -> None:
    batches = [{"input_ids": ids(24, seed).view(2, 12)} for seed in range(4)]
    started = []
    for model, ours in zip(bases(), (True, False), strict=True):
        options = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "eva"}
        config = peft.LoraConfig(**options, eva_config=peft.EvaConfig(rho=1.0))
        torch.manual_seed(3)
        tuned = peft.get_peft_model(model, with_quant_linear(config, model) if ours else config)
        before = {n: p.clone() for n, p in tuned.named_parameters() if "lora_A" in n}
        peft.initialize_lora_eva_weights(tuned, batches, show_progress_bar=False)
        after = {n: p for n, p in tuned.named_parameters() if "lora_A" in n}
        assert not any(torch.equal(p, before[n]) for n, p in after.items())
        assert not any(p.any() for n, p in tuned.named_parameters() if "lora_B" in n)
        started.append(after)
    for name, parameter in started[0].items():  # singular vectors have no sign
        judge = started[1][name]
        assert close(parameter.T @ parameter, judge.T @ judge, 1e-3), name


@pytest.mark.parametrize("format", ["fp8", "fp16", "nf4"])
def test_adapters_do_not_take_the_dtype_of_the_codes(format: str) -> None:
    model = qk.quantize_model(tiny_model(), format, progress=False)
    for config in (
        with_quant_linear(peft.LoraConfig(r=4, target_modules=["q_proj"]), model),
        with_quant_linear(peft.LoraConfig(r=4, target_modules=["q_proj"])),
    ):
        tuned = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
        adapters = {n: p for n, p in tuned.named_parameters() if "lora_" in n}
        assert {p.dtype for p in adapters.values()} == {torch.float32}
        a = next(p for n, p in adapters.items() if "lora_A" in n)
        assert len(a.unique()) == a.numel()  # not rounded on the way


def test_adapters_of_a_saved_config_are_made_empty_and_filled(tmp_path: Any) -> None:
    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    base, _ = bases()
    config = with_quant_linear(peft.LoraConfig.from_pretrained(tmp_path), base)
    again = peft.PeftModel.from_pretrained(
        base, tmp_path, config=config, low_cpu_mem_usage=True
    ).eval()
    assert torch.equal(logits(again), logits(ours))


# ------------------------------------------------------------------ which layers
def _targets(config: Any, model: Any) -> set[str]:
    tuned = peft.get_peft_model(model, config)
    layers = tuned.base_model.model.named_modules()
    return {n for n, m in layers if isinstance(m, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize("skip", [None, ["*.layers.1.*"]], ids=["all packed", "some plain"])
@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_means_what_it_means_on_plain_layers(skip: list[str] | None, tied: bool) -> None:
    model, plain = bases(skip=skip, tie_word_embeddings=tied)
    config = with_quant_linear(peft.LoraConfig(r=4, target_modules="all-linear"), model)
    ours = _targets(config, model)
    assert ours == _targets(peft.LoraConfig(r=4, target_modules="all-linear"), plain)
    assert len(ours) == 14
    assert sum(isinstance(m, LoraQuantLinear) for m in model.modules()) == (7 if skip else 14)


def test_all_linear_of_a_second_adapter() -> None:
    tuned = []
    for tuner, ours in zip(
        pair(options={"target_modules": ["q_proj"]}), (True, False), strict=True
    ):
        config = peft.LoraConfig(r=2, target_modules="all-linear")
        tuner.add_adapter("second", with_quant_linear(config, tuner) if ours else config)
        tuner.set_adapter("second")
        tuned.append(tuner)
    same_adapters(tuned[0], tuned[1])
    assert close(logits(tuned[0]), logits(tuned[1]))


def test_all_linear_leaves_the_head_of_a_classifier() -> None:
    transformers = pytest.importorskip("transformers")
    options = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    model = transformers.LlamaForSequenceClassification(tiny_model().config)
    plain = copy.deepcopy(model)
    qk.quantize_model(model, "nf4", skip=["score"], progress=False)
    config = with_quant_linear(peft.LoraConfig(**options), model)
    assert _targets(config, model) == _targets(peft.LoraConfig(**options), plain)


def test_all_linear_needs_the_model() -> None:
    with pytest.raises(
        ValueError,
        match="target_modules: expected names of layers, or a model, got 'all-linear' and none",
    ):
        with_quant_linear(peft.LoraConfig(target_modules="all-linear"))
    config = peft.LoraConfig(target_modules="all-linear", layer_replication=[(0, 2), (1, 2)])
    with pytest.raises(
        ValueError, match="expected names of layers with layer_replication, got 'all-linear'"
    ):
        with_quant_linear(config, bases()[0])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["down_proj"], "model.layers.0.mlp.down_proj"),
        (["lm_head", "layers.1.mlp"], "model.layers.1.mlp.gate_proj"),
        (["embed_tokens", "v_proj"], "model.layers.0.self_attn.v_proj"),
    ],
)
def test_saved_modules_that_are_packed_are_refused(names: list[str], said: str) -> None:
    model, _ = bases()
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=names)
    with pytest.raises(
        ValueError,
        match=f"^modules_to_save: expected plain modules, got {said}, whose weight is packed",
    ):
        with_quant_linear(config, model)


def test_a_packed_classifier_is_refused_though_peft_names_it() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForSequenceClassification(tiny_model(num_labels=32).config)
    qk.quantize_model(model, "nf4", progress=False)
    model.score = qk.QuantLinear.from_linear(model.score, "nf4")  # which quantizing leaves plain
    with pytest.raises(ValueError, match="modules_to_save: expected plain modules, got score, "):
        with_quant_linear(peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"), model)


def test_a_parameter_of_a_packed_layer_is_refused() -> None:
    model, _ = bases(attention_bias=True)
    config = peft.LoraConfig(target_modules=["down_proj"], target_parameters=["q_proj.bias"])
    with pytest.raises(
        ValueError, match=r"target_parameters: expected no parameter of a QuantLinear, got .*q_proj"
    ):
        peft.get_peft_model(model, with_quant_linear(config, model))
