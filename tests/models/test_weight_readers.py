"""Layers whose weight the model's code reads stay plain; families of models, end to end."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import qkernels as qk
from qkernels.models.weight_readers import layers_read_by

from ..tiny import ids

SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}
ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "intermediate_size": 128}
VISION = {"hidden_size": 64, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8, **ATTENTION}
TEXT = {
    **SIZES,
    **ATTENTION,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


# ---------------------------------------------------------------------- what is read
class _Reads(nn.Module):
    slow = False
    rank = 1

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential()
        for name in "abcdefghij":
            self.inner.add_module(name, nn.Linear(64, 64))
        self.init_weight = self.inner.j.weight.sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.inner.a.weight
        y = y.to(self.inner.b.weight.dtype) if isinstance(self.inner.b.weight, torch.Tensor) else y
        if self.training and y.is_cuda:
            y = y @ self.inner.c.weight
        if self.slow:
            y = y @ self.inner.d.weight
        else:
            y = y @ self.inner.e.weight
        if self.rank > 1 or not self.slow:
            y = torch.nn.functional.linear(y, weight=self.inner.f.weight)
        return self.inner.g(y) if self.inner.g.weight is not None else self._more(y)

    def _more(self, y: torch.Tensor) -> torch.Tensor:
        weights = [self.inner.h.weight.t() for _ in range(1)]
        return y @ (weights[0] if y.shape[0] > 3 else self.inner.i.weight)


class _ReadsLess(_Reads):
    def _more(self, y: torch.Tensor) -> torch.Tensor:
        return y


def test_what_a_class_reads() -> None:
    assert layers_read_by(_Reads()) == {f"inner.{name}" for name in "aefhi"}
    assert layers_read_by(_ReadsLess()) == {f"inner.{name}" for name in "aef"}, (
        "its method is another"
    )
    slow = _Reads()
    slow.slow = True
    assert layers_read_by(slow) == {f"inner.{name}" for name in "adhi"}


def test_such_layers_stay_plain_and_are_named() -> None:
    model = nn.ModuleDict({"one": _Reads(), "two": _Reads()})
    with pytest.warns(UserWarning, match="stays as it is") as caught:
        qk.quantize_model(model, "nf4", progress=False)
    plain = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert plain == {f"{top}.inner.{name}" for top in ("one", "two") for name in "aefhi"}
    texts = [str(warning.message) for warning in caught]
    assert (
        "qkernels: one.inner.a and 1 more like it stays as it is: "
        "_Reads computes with inner.a.weight itself"
    ) in texts


def test_a_linear_that_computes_something_else_stays_plain() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Broken(nn.Linear):
        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * gate

    class Renamed(nn.Linear):
        pass

    class Falcons(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.weight.T
            return y if self.bias is None else y + self.bias

    kinds = (Doubled, Broken, Renamed, Falcons)
    model = nn.Sequential(*(kind(64, 64, bias=bias) for kind in kinds for bias in (True, False)))
    weights = [layer.weight for layer in model]
    with pytest.warns(
        UserWarning, match="qkernels: 0 and 1 more like it stays as it is: Doubled computes"
    ):
        qk.quantize_model(model, "nf4", progress=False)
    names = [type(layer).__name__ for layer in model]
    assert names == ["Doubled", "Doubled", "Broken", "Broken", *["QuantLinear"] * 4]
    assert all(layer.weight is weight for layer, weight in zip(model[:4], weights[:4], strict=True))


def test_hooks_stay_and_a_replaced_forward_too() -> None:
    seen = []
    model = nn.Sequential(
        nn.Linear(64, 64),
        nn.Linear(64, 64),
        nn.Linear(64, 64),
        transformers.pytorch_utils.Conv1D(64, 64),
    )
    handle = model[0].register_forward_hook(lambda module, args, y: y + 1)
    model[3].register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
    model[1].forward = lambda x: x
    weighted = nn.utils.weight_norm(model[2])  # computes the weight in a hook
    with pytest.warns(
        UserWarning, match="qkernels: 1 stays as it is: its forward is replaced by another function"
    ):
        qk.quantize_model(model, "int8", progress=False)
    assert [type(layer).__name__ for layer in model] == [
        "QuantLinear",
        "Linear",
        "QuantLinear",
        "QuantLinear",
    ]
    x = torch.randn(2, 64)
    y = model[0](x)
    torch.testing.assert_close(model[2](x), weighted(x), rtol=0.1, atol=0.1)
    model[3](x)
    assert seen == ["QuantLinear"]
    handle.remove()
    torch.testing.assert_close(model[0](x), y - 1)


@pytest.mark.parametrize(("model", "message"), [
    (nn.Linear(64, 64), "model: expected a module with linear layers in it, .* got a bare Linear; "
     "qkernels.QuantLinear.from_linear makes a packed layer of one"),
    (transformers.pytorch_utils.Conv1D(64, 64), "got a bare Conv1D"),
])  # fmt: skip
def test_a_bare_layer_is_refused(model: nn.Module, message: str) -> None:
    """A bare layer has no parent in which to replace it; it once came back unchanged."""
    with pytest.raises(ValueError, match=message):
        qk.quantize_model(model, "nf4", progress=False)
    assert not list(model.children())


def test_a_bare_packed_layer_is_not_converted() -> None:
    from qkernels.models.convert import convert_model

    with pytest.raises(ValueError, match="got a bare QuantLinear; convert_weight converts"):
        convert_model(qk.QuantLinear.from_linear(nn.Linear(64, 64), "nf4"), "fp16")


def test_a_classifier_stays_plain_whenever_it_is_asked_for() -> None:
    model = _bert()
    qk.quantize_model(model, "nf4", skip=["*.output.dense"], progress=False)
    qk.quantize_model(model, "nf4", progress=False)
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Linear)] == ["classifier"]
    with pytest.raises(
        ValueError, match="expected at least one nn.Linear to quantize, got none .1 skipped"
    ):
        qk.quantize_model(model, "nf4", progress=False)


# ---------------------------------------------------------------------- torch's own modules
def test_torchs_transformer_from_quantize_to_load() -> None:
    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    model = encoder()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain = copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match="out_proj and 1 more like it stays as it is: MultiheadAttention"
    ):
        qk.quantize_model(model, "nf4", progress=False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, qk.QuantLinear)}
    assert set(layers) == {f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)}
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        for name, layer in layers.items():
            plain.get_submodule(name).weight.copy_(layer.packed.dequantize())
        want = model(x)
        torch.testing.assert_close(want, plain(x), rtol=1e-4, atol=1e-4)
    again = encoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qk.quantize_model(again, "nf4", progress=False)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), want)


# ---------------------------------------------------------------------- families of models
def _gemma3() -> transformers.PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config=dict(TEXT), vision_config=VISION, mm_tokens_per_image=4, image_token_index=100,
        boi_token_index=101, eoi_token_index=102,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def _bert(labels: int = 3) -> transformers.PreTrainedModel:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, **ATTENTION, num_labels=labels)
    )


def _clip() -> transformers.PreTrainedModel:
    text = {**SIZES, **ATTENTION, "max_position_embeddings": 32, "eos_token_id": 2}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=64)
    )


def _whisper() -> transformers.PreTrainedModel:
    config = transformers.WhisperConfig(
        vocab_size=128, num_mel_bins=16, d_model=64, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, max_source_positions=20, max_target_positions=20,
        decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
FAMILIES: dict[str, Any] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "t5 gated": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, feed_forward_proj="gated-gelu")
    ),
    "gemma3 with a vision tower": _gemma3,
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=8)),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**SIZES, state_size=16, num_heads=8, head_dim=16, n_groups=1)
    ),
    "bert classifier": _bert,
    "llama classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**TEXT, num_labels=3, pad_token_id=0)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**VISION, num_labels=3)
    ),
    "clip": _clip,
    "whisper": _whisper,
    "falcon": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(**SIZES, num_attention_heads=4)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)
    ),
    "llama without a head": lambda: transformers.LlamaModel(transformers.LlamaConfig(**TEXT)),
}
#: what each must leave plain, besides heads
PLAIN = {"mamba": "dt_proj", "t5": "wo", "t5 gated": "wo"}


def _inputs(name: str) -> dict[str, torch.Tensor]:
    tokens = ids(9)[None].clamp(3, 90)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = torch.randn(1, 16, 40, generator=torch.Generator().manual_seed(0))
    if name.startswith("t5"):
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    if name == "gemma3 with a vision tower":
        return {
            "input_ids": torch.cat([torch.full((1, 4), 100), tokens], 1),
            "pixel_values": pixels,
        }
    if name == "vit":
        return {"pixel_values": pixels}
    if name == "clip":
        return {"input_ids": torch.cat([tokens, torch.full((1, 1), 2)], 1), "pixel_values": pixels}
    if name == "whisper":
        return {"input_features": features, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def _answer(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        output = model(**_inputs(name))
    for field in ("logits", "logits_per_image", "last_hidden_state"):
        if field in output:
            return output[field]
    raise AssertionError(f"no answer in {list(output)}")


@pytest.mark.filterwarnings("ignore:qkernels")
@pytest.mark.parametrize(("format", "params"), [("nf4", {}), ("gptq", {"group_size": 32})], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_from_quantize_to_save_to_load(
    name: str, format: str, params: dict[str, Any], tmp_path: Path
) -> None:
    """Against the same model with the dequantized weights in plain layers."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)
    plain = copy.deepcopy(model)
    qk.quantize_model(model, format, progress=False, **params)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, qk.QuantLinear)}
    assert packed
    for path, layer in packed.items():
        weight, linear = layer.packed.dequantize(), plain.get_submodule(path)
        linear.weight.data.copy_(weight if isinstance(linear, nn.Linear) else weight.T)
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    heads = {"lm_head", "score", "classifier", "proj_out"}
    assert all(
        n in heads or n.rpartition(".")[2] == PLAIN.get(name) or ".out_proj" in n for n in left
    ), left
    torch.testing.assert_close(_answer(model, name), _answer(plain, name), rtol=1e-4, atol=1e-4)
    qk.save_model(model, tmp_path / "m")
    again = qk.load_model(tmp_path / "m")
    assert type(again) is type(model)
    assert {n for n, m in again.named_modules() if isinstance(m, qk.QuantLinear)} == set(packed)
    assert torch.equal(_answer(again, name), _answer(model, name))
