"""Whole models as GGUF files: loaded packed, written, and read by other programs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import gguf as package
import pytest
import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import qkernels as qk
from qkernels.checkpoints.files import UnchangedFile
from qkernels.checkpoints.gguf import model as gguf_model
from qkernels.checkpoints.gguf import reader as gguf
from qkernels.cli import samples
from qkernels.models.evaluate import perplexity
from qkernels.nn.embedding import QuantEmbedding

from ..tiny import VOCABULARY, ids, tiny_model, tiny_tokenizer
from .test_gguf import GPL3

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary["he"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>"
    )


def model_of(kind: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return tiny_model(**changes)
    config, model = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    more = {"head_dim": 16} if kind == "qwen3" else {}
    made = model(config(**SIZES, **more, **changes)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, 1 if parameter.dim() == 1 else 0, 0.2)
    return made


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids(40, seed=5)[None]).logits
        return found


@pytest.mark.parametrize(
    ("kind", "format", "changes"),
    [
        ("llama", "q8_0", {}),
        ("llama", "q4_0", {"tie_word_embeddings": False}),
        ("llama", "iq4_nl", {"num_key_value_heads": 4}),
        ("llama", "gguf_mxfp4", {}),
        ("llama", "bf16", {}),
        ("qwen2", "q5_1", {"tie_word_embeddings": True}),
        ("qwen3", "q4_1", {}),
    ],
)
def test_written_and_read(kind: str, format: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(kind, **changes)
    qk.quantize_model(model, format, progress=False)
    want = logits(model)
    path = tmp_path / "model.gguf"
    qk.save_model(model, path, bpe_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    loaded = qk.load_model(path)
    assert torch.equal(logits(loaded), want)
    layers = {
        n: m.packed.format for n, m in loaded.named_modules() if isinstance(m, qk.QuantLinear)
    }
    assert {name: kind for name, kind in layers.items() if name != "lm_head"} == {
        n: format for n, m in model.named_modules() if isinstance(m, qk.QuantLinear)
    }
    # transformers misses the head size of Qwen3's; it reads the others, rows in their order
    if format != "bf16" and kind != "qwen3":
        dequantized, tokenizer = gguf.load_dequantized(path)
        torch.testing.assert_close(logits(dequantized), want, rtol=1e-4, atol=1e-4)
        assert tokenizer("the hen")["input_ids"] == bpe_tokenizer()("the hen")["input_ids"]
        # Again from the file's own tokenizer: every entry of it survives.
        qk.save_model(loaded, tmp_path / "again.gguf", gguf.load_tokenizer(path))
        one, other = (package.GGUFReader(p) for p in (path, tmp_path / "again.gguf"))
        for key, field in one.fields.items():
            if key.startswith("tokenizer."):
                assert field.contents() == other.fields[key].contents(), key
        assert {t.name: bytes(t.data) for t in one.tensors} == {
            t.name: bytes(t.data) for t in other.tensors
        }


def test_the_file_type_is_llama_cpp_s(tmp_path: Path) -> None:
    for format, label in (("q8_0", "MOSTLY_Q8_0"), ("gguf_mxfp4", "MOSTLY_MXFP4_MOE")):
        model = qk.quantize_model(tiny_model(), format, progress=False)
        qk.save_model(model, tmp_path / "model.gguf", bpe_tokenizer())
        (value,) = package.GGUFReader(tmp_path / "model.gguf").fields["general.file_type"].parts[-1]
        assert value == package.LlamaFileType[label]


def test_a_packed_embedding_is_shared_with_the_head() -> None:
    packed = qk.quantize(torch.randn(50, 64), "q8_0")
    embedding = QuantEmbedding(packed, torch.float16)
    tokens = torch.tensor([[3, 49, 3], [0, 1, 2]])
    want = packed.dequantize(torch.float16)[tokens]
    assert torch.equal(embedding(tokens), want)
    assert torch.equal(embedding.bfloat16()(tokens), packed.dequantize(torch.bfloat16)[tokens])
    assert embedding.packed.tensors["data"].dtype == torch.uint8
    assert embedding(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 64)
    with pytest.raises(ValueError, match="nf4: weight: expected a tensor that keeps rows apart"):
        QuantEmbedding(qk.quantize(torch.randn(50, 64), "nf4"))
    model = nn.ModuleList([embedding, qk.QuantLinear(embedding.packed)])
    assert gguf_model.memory_of(model) == packed.nbytes
    assert set(model.state_dict()) == {"0.data", "1.data"}


@pytest.mark.parametrize(("format", "params"), [("q6_k", {}), ("fp8", {})])
def test_an_embedding_s_state_dict(format: str, params: dict[str, Any]) -> None:
    one, other = (
        QuantEmbedding(qk.quantize(torch.randn(50, 256), format, **params)) for _ in range(2)
    )
    tokens = torch.tensor([3, 49, 0])
    want = one(tokens)
    assert not torch.equal(other(tokens), want)
    state = one.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other(tokens), want)
    pair = nn.ModuleList([other, qk.QuantLinear(other.packed)])
    pair.load_state_dict(pair.state_dict())
    assert pair[1].packed.storage["data" if "data" in state else "weight"].data_ptr() == (
        pair[0].packed.tensors["data" if "data" in state else "weight"].data_ptr()
    ), "what was shared stays shared"
    first = next(iter(state))
    with pytest.raises(RuntimeError, match=f'Missing key.*"{first}"'):
        other.load_state_dict({name: t for name, t in state.items() if name != first})
    with pytest.raises(RuntimeError, match='Unexpected key.*"more"'):
        other.load_state_dict({**state, "more": state[first]})
    with pytest.raises(ValueError, match=f"{format}: {first}: expected"):
        other.load_state_dict({**state, first: state[first][:-1]})
    assert torch.equal(other(tokens), want)


# ---------------------------------------------------------------------- bad input
@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    model = tiny_model()
    qk.quantize_model(model, "q8_0", progress=False)
    qk.save_model(model, path, bpe_tokenizer())
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b"blk.1.ffn_down.weight",
            b"blk.1.ffn_dowm.weight",
            "blk.1.ffn_down.weight: expected a tensor of shape",
        ),
        (
            b"blk.0.attn_norm.weight",
            b"blk.7.attn_norm.weight",
            "blk.0.attn_norm.weight: expected a tensor",
        ),
        (
            b"token_embd.weight",
            b"token_embe.weight",
            "token_embd.weight: expected a tensor of shape",
        ),
    ],
)
def test_damaged_names(old: bytes, new: bytes, message: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(good.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=f"bad.gguf: {message}"):
        qk.load_model(path)


def test_nan_in_the_data(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    shutil.copy(good, path)
    tensor = next(t for t in gguf.read_header(path).tensors if t.name == "blk.0.ffn_up.weight")
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff\x7f")  # the first block's scale
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight: q8_0: .*expected finite"):
        qk.load_model(path)


def test_types_and_tensors_that_are_not_known(tmp_path: Path) -> None:
    model = tiny_model()
    path = tmp_path / "bad.gguf"
    qk.save_model(model, path, bpe_tokenizer())
    original = gguf_model.read_header(path)
    tensors = {t.name: t for t in original.tensors}
    reader = gguf_model._Reader(UnchangedFile(path), original, model.config)
    odd = tensors["blk.0.ffn_up.weight"].__class__("blk.0.ffn_up.weight", "IQ1_S", (96, 64), 10, 0)
    reader.tensors["blk.0.ffn_up.weight"] = odd
    with pytest.raises(
        ValueError, match="blk.0.ffn_up.weight: expected one of the types .*Q8_0.*; got IQ1_S"
    ):
        reader.weight("model.layers.0.mlp.up_proj", (96, 64))
    with pytest.raises(ValueError, match="expected one of F32, F16, BF16, got IQ1_S"):
        reader.plain("model.layers.0.mlp.up_proj.weight", (96, 64))
    with pytest.raises(ValueError, match=r"expected shape \(96, 65\), got \(96, 64\)"):
        reader.weight("model.layers.0.mlp.up_proj", (96, 65))
    with pytest.raises(ValueError, match="expected only tensors the model has"):
        reader.check_all_used()


def test_a_file_that_is_cut_while_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are mapped, so reading the lost ones would end the process."""
    model = tiny_model()
    path = tmp_path / "cut.gguf"
    qk.save_model(model, path, bpe_tokenizer())
    real = gguf_model.read_config

    def cut(*args: Any) -> Any:
        os.truncate(path, path.stat().st_size // 2)
        return real(*args)

    monkeypatch.setattr(gguf_model, "read_config", cut)
    with pytest.raises(
        ValueError, match="cut.gguf: expected the file whose header was read, got one changed"
    ):
        qk.load_model(path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = tiny_model()
    with pytest.raises(ValueError, match="tokenizer: expected one"):
        qk.save_model(model, path)
    with pytest.raises(ValueError, match="tokenizer: .*: expected a BPE model, got WordLevel"):
        qk.save_model(model, path, tiny_tokenizer())
    qk.quantize_model(model, "gptq", group_size=32, progress=False)
    with pytest.raises(
        ValueError,
        match=r"layers.0.self_attn.q_proj: expected a layer in one of GGUF's types, got gptq",
    ):
        qk.save_model(model, path, bpe_tokenizer())
    model.config.model_type = "mystery"
    with pytest.raises(
        ValueError, match="model: expected one of the types llama, .*, got 'mystery'"
    ):
        qk.save_model(model, path, bpe_tokenizer())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not GPL3.is_file(), reason=f"{GPL3} is not on this machine")
@pytest.mark.slow
def test_real_model_packed() -> None:
    """The logits of the dequantized load, in the memory of the file's size."""
    path = samples.model_path("smollm2-135m")
    model = qk.load_model(path)
    tokenizer = gguf.load_tokenizer(path)
    assert qk.models.quantize.model_summary(model).formats == {"q4_1": 210, "q8_0": 1}
    assert gguf_model.memory_of(model) < path.stat().st_size
    tokens = tokenizer(GPL3.read_text())["input_ids"]
    assert perplexity(model, tokens, window=1024, max_tokens=1024).perplexity == pytest.approx(
        19.30, abs=0.01
    )
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    answer = model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
