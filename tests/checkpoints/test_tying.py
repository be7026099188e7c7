"""Weights tied by the config, and files that hold two: the file wins, as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import qkernels as qk
from qkernels.nn.embedding import QuantEmbedding

from ..tiny import ids, tiny_model
from .test_gguf_models import bpe_tokenizer, model_of

FORMATS: list[tuple[str | None, dict[str, Any]]] = [
    (None, {}), ("gptq", {"group_size": 32}), ("nf4", {}), ("pack_quantized", {"group_size": 32}),
    ("q8_0", {}),
]  # fmt: skip
KEPT = (
    "lm_head.weight and model.embed_tokens.weight are tied, but the file has another weight for "
    "each"
)


def _untied(format: str | None, params: dict[str, Any], **sizes: Any) -> nn.Module:
    model = tiny_model(tie_word_embeddings=False, **sizes)
    return model if format is None else qk.quantize_model(model, format, progress=False, **params)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(9)[None]).logits


def _say_tied(path: Path, tied: bool = True) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": tied}))


@pytest.mark.parametrize(("format", "params"), FORMATS, ids=str)
def test_another_head_in_a_tied_model(
    format: str | None, params: dict[str, Any], tmp_path: Path
) -> None:
    model = _untied(format, params)
    qk.save_model(model, tmp_path / "m")
    _say_tied(tmp_path / "m")
    with pytest.warns(UserWarning, match=KEPT):
        loaded = qk.load_model(tmp_path / "m")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(_logits(loaded), _logits(model))
    assert loaded.config.tie_word_embeddings is False
    loaded.tie_weights()  # as resizing and adapters do
    assert torch.equal(_logits(loaded), _logits(model))
    if format is None:  # the judge
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert torch.equal(_logits(theirs), _logits(loaded))
    qk.save_model(loaded, tmp_path / "again")
    assert torch.equal(_logits(qk.load_model(tmp_path / "again")), _logits(model))


def test_saving_a_model_untied_by_hand(tmp_path: Path) -> None:
    """The config still says that the model is tied."""
    model = tiny_model()
    model.lm_head.weight = nn.Parameter(torch.randn(128, 64))
    assert model.config.tie_word_embeddings
    qk.save_model(model, tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(_logits(qk.load_model(tmp_path / "m")), _logits(model))
    assert torch.equal(
        _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), _logits(model)
    )


def test_equal_weights_are_tied(tmp_path: Path) -> None:
    model = tiny_model()
    qk.save_model(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tmp_path / "m/model.safetensors",
    )
    loaded = qk.load_model(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.tie_word_embeddings is True


def test_a_tied_file_with_the_head_alone(tmp_path: Path) -> None:
    model = tiny_model()
    qk.save_model(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "m/model.safetensors")
    loaded = qk.load_model(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(_logits(loaded), _logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_beside_a_plain_embedding(tied: bool, tmp_path: Path) -> None:
    model = _untied("gptq", {"group_size": 32})
    model.lm_head = qk.QuantLinear.from_linear(model.lm_head, "gptq", group_size=32)
    qk.save_model(model, tmp_path / "m")
    _say_tied(tmp_path / "m", tied)
    loaded = qk.load_model(tmp_path / "m")
    assert isinstance(loaded.lm_head, qk.QuantLinear)
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(_logits(loaded), _logits(model))


def test_a_plain_head_beside_a_packed_embedding(tmp_path: Path) -> None:
    """The embedding's bytes once replaced the head."""
    model = _untied("q8_0", {})
    model.set_input_embeddings(
        QuantEmbedding(qk.quantize(model.get_input_embeddings().weight, "q8_0"))
    )
    qk.save_model(model, tmp_path / "m")
    for tied in (True, False):
        _say_tied(tmp_path / "m", tied)
        loaded = qk.load_model(tmp_path / "m")
        assert isinstance(loaded.get_input_embeddings(), QuantEmbedding)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        assert torch.equal(_logits(loaded), _logits(model))


def test_weights_of_which_some_are_tied(tmp_path: Path) -> None:
    """T5's encoder and decoder share the embeddings; the head has another weight in the file."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = nn.Parameter(torch.randn(128, 64))
    qk.save_model(model, tmp_path / "m")
    with pytest.warns(
        UserWarning, match="lm_head.weight and shared.weight are tied, but the file has another"
    ):
        loaded = qk.load_model(tmp_path / "m")
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    tokens = {"input_ids": ids(9)[None], "decoder_input_ids": ids(4)[None]}
    with torch.no_grad():
        assert torch.equal(loaded(**tokens).logits, model(**tokens).logits)


@pytest.mark.parametrize("format", [None, "q8_0"])
def test_gguf_files_with_a_head_of_their_own(format: str | None, tmp_path: Path) -> None:
    model = model_of("llama", tie_word_embeddings=False)
    if format is not None:
        qk.quantize_model(model, format, progress=False)
    model.config.tie_word_embeddings = True  # what it was made from said so
    qk.save_model(model, tmp_path / "m.gguf", bpe_tokenizer())
    loaded = qk.load_model(tmp_path / "m.gguf")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    torch.testing.assert_close(_logits(loaded), _logits(model), rtol=1e-4, atol=1e-4)
