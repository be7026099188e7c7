"""Our own `quantization_config` says what no other config can: GGUF types, packed embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels as qk
from qkernels.checkpoints.hf import reader as huggingface
from qkernels.checkpoints.hf.quantization import OWN_METHOD, Plan
from qkernels.checkpoints.tensor_files import TensorFiles
from qkernels.models.convert import convert_model
from qkernels.nn.embedding import QuantEmbedding

from ..tiny import ids, tiny_model
from .test_gguf_models import bpe_tokenizer, logits, model_of

BIG = {"hidden_size": 256, "intermediate_size": 512}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_gguf_file_becomes_a_directory_bit_for_bit(tmp_path: Path, kind: str, tied: bool) -> None:
    model = model_of(kind, tie_word_embeddings=tied, **(BIG if kind == "llama" else {}))
    qk.quantize_model(model, "q4_k_m" if kind == "llama" else "q5_1", progress=False)
    qk.save_model(model, tmp_path / "x.gguf", bpe_tokenizer())
    packed = qk.load_model(tmp_path / "x.gguf")
    if tied:  # our writer keeps small embeddings in float32, llama.cpp's packs them
        weight = packed.get_input_embeddings().weight
        embedding = QuantEmbedding(qk.quantize(weight, "q6_k" if kind == "llama" else "q8_0"))
        packed.set_input_embeddings(embedding)
        packed.set_output_embeddings(qk.QuantLinear(embedding.packed))
    qk.save_model(packed, tmp_path / "directory")
    again = qk.load_model(tmp_path / "directory")
    assert isinstance(again.get_input_embeddings(), QuantEmbedding) == tied
    want = {
        n: m.packed
        for n, m in packed.named_modules()
        if isinstance(m, (qk.QuantLinear, QuantEmbedding))
    }
    found = {
        n: m.packed
        for n, m in again.named_modules()
        if isinstance(m, (qk.QuantLinear, QuantEmbedding))
    }
    assert found.keys() == want.keys()
    for name, p in want.items():
        assert (p.format, p.params) == (found[name].format, found[name].params)
        assert all(torch.equal(t, found[name].tensors[k]) for k, t in p.tensors.items()), name
    assert torch.equal(logits(again), logits(packed))
    with TensorFiles(tmp_path / "directory") as files:
        heads = [name for name in files.infos if name.startswith("lm_head.")]
    assert bool(heads) != tied, "a tied head is stored once"


def test_a_changed_head_is_not_taken_for_tied(tmp_path: Path) -> None:
    model = tiny_model()
    embedding = QuantEmbedding(qk.quantize(torch.randn(128, 64), "q8_0"))
    model.set_input_embeddings(embedding)
    qk.quantize_model(model, "q8_0", progress=False)
    model.set_output_embeddings(qk.QuantLinear(qk.quantize(torch.randn(128, 64), "q8_0")))
    model.config.tie_word_embeddings = False
    huggingface.save(model, tmp_path / "x")
    again = qk.load_model(tmp_path / "x")
    assert torch.equal(again(ids(9)[None]).logits, model(ids(9)[None]).logits)


@pytest.mark.parametrize(
    ("format", "params", "kind"),
    [
        ("gptq", {"group_size": 32}, "q8_0"),
        ("int8", {}, "int8"),
        ("nf4", {}, "fp16"),
        ("fp16", {}, "bf16"),
        ("q8_0", {}, "fp16"),
    ],
)
@pytest.mark.parametrize("head", ["plain", "tied", "own"])
def test_an_embedding_that_no_config_speaks_of_is_dequantized(
    format: str, params: dict[str, Any], kind: str, head: str, tmp_path: Path
) -> None:
    """It is written in the dtype in which it computes, so the reloaded model computes the same."""
    if head == "tied" and format == "gptq":
        head = "own"  # gptq and q8_0 linears go by no one config
    model = tiny_model(tie_word_embeddings=head == "tied")
    qk.quantize_model(model, format, progress=False, **params)
    embedding = QuantEmbedding(qk.quantize(torch.randn(128, 64), kind))
    model.set_input_embeddings(embedding)
    if head == "tied":
        model.set_output_embeddings(qk.QuantLinear(embedding.packed))
    elif head == "own":
        model.set_output_embeddings(
            qk.QuantLinear(qk.quantize(torch.randn(128, 64), format, **params))
        )
    want = logits(model)
    qk.save_model(model, tmp_path / "x")
    again = qk.load_model(tmp_path / "x")
    assert torch.equal(logits(again), want)
    assert torch.equal(again.get_input_embeddings().weight, embedding.packed.dequantize())


def test_converted_gguf_files_can_be_saved(tmp_path: Path) -> None:
    """16-bit and packed files, as loaded and after a conversion."""
    model = tiny_model().half()
    qk.save_model(model, tmp_path / "x.gguf", bpe_tokenizer())
    loaded = qk.load_model(tmp_path / "x.gguf")
    assert isinstance(loaded.get_input_embeddings(), QuantEmbedding)
    for i, format in enumerate([None, "gptq"]):
        if format:
            convert_model(loaded, format, group_size=32)
        qk.save_model(loaded, tmp_path / f"d{i}")
        assert torch.equal(logits(qk.load_model(tmp_path / f"d{i}")), logits(loaded)), format
    half = qk.load_model(tmp_path / "x.gguf", dtype=torch.float16)
    qk.save_model(half, tmp_path / "half")
    with TensorFiles(tmp_path / "half") as files:
        assert not [name for name in files.infos if name.startswith("lm_head.")], "stored once"
    assert torch.equal(logits(qk.load_model(tmp_path / "half")), logits(half))


def test_nothing_is_written_of_a_model_with_unknown_modules(tmp_path: Path) -> None:
    class Odd(torch.nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[prefix + "secret"] = self.weight

    model = tiny_model()
    model.model.layers[0].mlp.up_proj = Odd(64, 96)
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj: expected no module .* got Odd"):
        qk.save_model(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (None, "groups: expected a non-empty list, got None"),
        ([3], r"groups\[0\]: expected an object, got 3"),
        ([{"format": "q4_k", "modules": "a"}], r"groups\[0\].modules: expected a list of names"),
        ([{"format": "q4_k", "modules": ["a"]}, {"format": "q6_k", "modules": ["a"]}],
         "a: expected in one group"),
        ([{"format": "q9", "modules": ["a"]}], "format: expected one of .*got 'q9'"),
        ([{"format": "nf4", "modules": ["a"], "params": {"x": 1}}], "unknown parameter 'x'"),
        ([{"format": "nf4", "modules": ["a"], "params": 1}], "params: expected an object"),
    ],
)  # fmt: skip
def test_bad_configs(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan("here", {"quant_method": OWN_METHOD, "groups": groups})


def test_what_the_config_says(tmp_path: Path) -> None:
    model = tiny_model()
    qk.quantize_model(model, "q8_0", skip=["*.up_proj"], progress=False)
    huggingface.save(model, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert [g["format"] for g in config["groups"]] == ["q8_0"]
    plan = Plan("here", config)
    assert plan.scheme("model.layers.0.mlp.up_proj") is None
    assert plan.scheme("model.layers.1.mlp.down_proj") == ("q8_0", {})


def test_convert_keeps_a_gguf_files_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qkernels.cli import main

    model = tiny_model(**BIG)
    qk.quantize_model(model, "q4_k_m", progress=False)
    qk.save_model(model, tmp_path / "x.gguf", bpe_tokenizer())
    code = main(["convert", str(tmp_path / "x.gguf"), str(tmp_path / "y"), "--dtype", "bfloat16"])
    assert code == 0, capsys.readouterr().err
    again, packed = qk.load_model(tmp_path / "y"), qk.load_model(tmp_path / "x.gguf")
    kinds = [{n: m.packed.format for n, m in net.named_modules() if isinstance(m, qk.QuantLinear)}
             for net in (again, packed)]  # fmt: skip
    assert kinds[0] == kinds[1]
    assert set(kinds[0].values()) == {"q4_k", "q6_k"}
    assert (tmp_path / "y" / "tokenizer.json").is_file()
