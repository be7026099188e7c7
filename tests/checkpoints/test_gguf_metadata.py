"""Metadata of GGUF files is obeyed or refused, and an error names the key."""

from __future__ import annotations

import math
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qkernels as qk
from qkernels import cli
from qkernels.checkpoints import load_tokenizer
from qkernels.checkpoints.gguf import reader as gguf
from qkernels.checkpoints.gguf.metadata import rope_table

from ..tiny import ids, tiny_model
from .gguf_files import rewrite
from .test_gguf_models import bpe_tokenizer, logits, model_of

HUGE = 2**32 - 1
TOKENS = "tokenizer.ggml.tokens"
MERGES = "tokenizer.ggml.merges"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    model = tiny_model(num_hidden_layers=1)
    qk.quantize_model(model, "q8_0", progress=False)
    qk.save_model(model, path, bpe_tokenizer())
    return path


def inv_freq(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.model.rotary_emb.inv_freq
    return found


# ---------------------------------------------------------------------- bad files: the corpus
#: every bad file that an audit or the fuzz test found: (keys changed, keys and tensors dropped, the
#: message)
BAD: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"general.architecture": ["llama"]}, (), "general.architecture: expected a name"),
    ({"general.architecture": 3}, (), "general.architecture: expected a name, got 3"),
    ({}, ("general.architecture",), "general.architecture: expected a name, got None"),
    *(
        ({f"llama.{key}": value}, (), rf"llama\.{key}: expected int")
        for key in ("attention.head_count", "attention.head_count_kv", "block_count",
         "embedding_length",
                    "feed_forward_length", "context_length", "attention.key_length",
                    "rope.dimension_count",
                    "vocab_size")
        for value in (0, -5, HUGE, 2**63, "x", math.nan, 2.0, [1, 2], [1] * 100, True)
    ),
    *(
        ({f"llama.{key}": value}, (), rf"llama\.{key}: expected float")
        for key in ("rope.freq_base", "attention.layer_norm_rms_epsilon")
        for value in (-1.0, math.nan, math.inf, "x", 3, [1.0])
    ),
    *(
        ({}, (f"llama.{key}",), rf"llama\.{key}: expected (int|float), .*got None")
        for key in ("attention.head_count", "block_count", "embedding_length",
         "feed_forward_length",
                    "context_length", "attention.layer_norm_rms_epsilon")
    ),
    ({"llama.block_count": 2**31 - 1}, (),
     "block_count: expected 1, as the tensors' names have it"),
    ({"llama.block_count": 2}, (), "block_count: expected 1"),
    ({"llama.embedding_length": 128}, (),
     "embedding_length: expected 64, the columns of token_embd.weight"),
    ({"llama.feed_forward_length": 2**30}, (), "feed_forward_length: expected 96, the rows of"),
    ({"llama.vocab_size": 2**30}, (), "vocab_size: expected 128, the rows of token_embd.weight"),
    ({"llama.attention.head_count": 3}, (),
     "head_count: expected heads of 16 that make the 64 rows"),
    ({"llama.attention.head_count_kv": 2**30}, (),
     "head_count_kv: expected heads of 16 that make the 32 rows"),
    ({"llama.attention.head_count": 4, "llama.attention.key_length": 2**30}, (),
     "head_count: expected heads of"),
    ({"llama.attention.value_length": 8}, (), "value_length: expected 16, the size of a key"),
    ({"llama.rope.dimension_count": 8}, (), "rope.dimension_count: expected 16, the size of a key"),
    ({}, ("token_embd.weight",), "token_embd.weight: expected a tensor of shape .*found none"),
    ({}, ("blk.0.ffn_up.weight",), "blk.0.ffn_up.weight: expected a tensor of shape .*found none"),
    ({}, ("blk.0.attn_norm.weight",),
     r"blk.0.attn_norm.weight: expected a tensor of shape \(64,\), found none"),
    # what would change the function
    ({"llama.logit_scale": 8.0}, (), "llama.logit_scale: expected none or 0.0"),
    ({"llama.attention.sliding_window": 4}, (),
     "llama.attention.sliding_window: expected no such key"),
    ({"llama.attention.sliding_window": "x"}, (),
     "llama.attention.sliding_window: expected no such key"),
    ({"llama.expert_count": 8}, (), "llama.expert_used_count: expected int"),
    ({"llama.expert_count": [1]}, (), "llama.expert_count: expected none or 0"),
    ({"llama.attention.causal": False}, (), "llama.attention.causal: expected none or True"),
    ({"llama.news": 1}, (), "llama.news: expected no such key"),
    ({"llama.rope.scaling.type": "longrope"}, (),
     "rope.scaling.type: expected none, linear or yarn, got 'longrope'"),
    ({"llama.rope.scaling.type": 4}, (), "rope.scaling.type: expected str, text; got 4"),
    ({"llama.rope.scaling.factor": 0.5}, (),
     "rope.scaling.factor: expected 0 or at least 1, got 0.5"),
    ({"llama.rope.scaling.factor": math.nan}, (), "rope.scaling.factor: expected float"),
    ({"llama.rope.scale_linear": -1.0}, (), "rope.scale_linear: expected float"),
    ({"llama.rope.scaling.attn_factor": 2.0}, (), "rope.scaling.attn_factor: expected none or 1.0"),
    ({"tokenizer.ggml.bos_token_id": 128}, (),
     "bos_token_id: expected an integer of 0 to 127, got 128"),
    ({"tokenizer.ggml.eos_token_id": "x"}, (),
     "eos_token_id: expected an integer of 0 to 127, got 'x'"),
]  # fmt: skip
BAD_TOKENIZERS: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({}, (TOKENS,), "tokens: expected a non-empty array, got None"),
    ({TOKENS: []}, (), "tokens: expected a non-empty array"),
    ({TOKENS: 5}, (), "tokens: expected an array of str, got 5"),
    ({TOKENS: [1, 2]}, (), "tokens: expected an array of str"),
    ({TOKENS: [["a"], ["b"]]}, (), "tokens: expected an array of str"),
    ({}, (MERGES,), "merges: expected a non-empty array for a gpt2 tokenizer"),
    ({MERGES: []}, (), "merges: expected a non-empty array for a gpt2 tokenizer"),
    ({MERGES: ["h"]}, (), "merges: expected pairs of tokens that make a token, got 'h'"),
    ({MERGES: ["h q"]}, (), "merges: expected pairs of tokens that make a token, got 'h q'"),
    ({}, ("tokenizer.ggml.model",), "model: expected a name, got None"),
    ({"tokenizer.ggml.model": 7}, (), "model: expected a name, got 7"),
    ({"tokenizer.ggml.model": "odd"}, (), "tokenizer: expected one transformers builds"),
    ({"tokenizer.ggml.model": "llama"}, (MERGES,),
     "scores: expected an array for a llama tokenizer"),
    ({"tokenizer.ggml.scores": [1.0]}, (),
     "scores: expected 128 items, one for each token, got '1 items'"),
    ({"tokenizer.ggml.scores": [math.nan] * 128}, (), "scores: expected finite numbers"),
    ({"tokenizer.ggml.token_type": [1] * 9}, (), "token_type: expected 128 items"),
    ({"tokenizer.ggml.token_type": ["a"] * 128}, (), "token_type: expected an array of int"),
    ({"tokenizer.ggml.unknown_token_id": -1}, (),
     "unknown_token_id: expected an integer of 0 to 127, got -1"),
    ({"tokenizer.ggml.padding_token_id": HUGE}, (), "padding_token_id: expected an integer"),
    ({"tokenizer.ggml.add_bos_token": 1}, (), "add_bos_token: expected true or false, got 1"),
    ({"tokenizer.ggml.pre": 1}, (), "pre: expected text, got 1"),
    ({"tokenizer.chat_template": [1]}, (), "chat_template: expected text"),
]  # fmt: skip


def test_bad_models(good: Path, tmp_path: Path) -> None:
    """One test for all cases, under a memory limit that believing a size would exceed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), hard))
    try:
        for i, (changes, drop, message) in enumerate(BAD):
            path = rewrite(good, tmp_path / f"{i}.gguf", changes, drop)
            with pytest.raises(ValueError, match=rf"{path.name}: .*{message}"):
                qk.load_model(path)
            path.unlink()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(("changes", "drop", "message"), BAD_TOKENIZERS)
def test_bad_tokenizers(
    changes: dict[str, Any], drop: tuple[str, ...], message: str, good: Path, tmp_path: Path
) -> None:
    path = rewrite(good, tmp_path / "bad.gguf", changes, drop)
    with pytest.raises(ValueError, match=rf"bad.gguf: .*{message}"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=rf"bad.gguf: .*{message}"):
        gguf.load_dequantized(path)


@pytest.mark.parametrize("key", ["falcon.block_count", "falcon.attention.head_count_kv"])
@pytest.mark.parametrize("value", [HUGE, [8, HUGE], -1, "x"])
def test_absurd_counts_of_other_architectures(
    key: str, value: Any, good: Path, tmp_path: Path
) -> None:
    changes = {"general.architecture": "falcon", key: value}
    path = rewrite(good, tmp_path / "bad.gguf", changes)
    with (
        pytest.warns(UserWarning, match="dequantized"),
        pytest.raises(ValueError, match=f"{key}: expected an integer of 0 to"),
    ):
        qk.load_model(path)


def test_the_command_says_it_in_one_line(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, drop in (
        ({"general.architecture": ["llama"]}, ()), ({"llama.attention.head_count": 0}, ()),
        ({}, (TOKENS,)),
        ({MERGES: []}, ()), ({"general.architecture": "falcon"}, ()),
    ):  # fmt: skip
        path = rewrite(good, tmp_path / "bad.gguf", changes, drop)
        for verb in (
            ["generate", str(path), "--prompt", "he"],
            ["convert", str(path), str(tmp_path / "o"), "-f", "int8"],
        ):
            assert cli.main(verb) == 2
            errors = capsys.readouterr().err.splitlines()
            assert errors[-1].startswith(f"qkernels: error: {path}: "), errors
            assert sum("error" in line for line in errors) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.causal", 1), ("logit_scale", False), ("expert_count", False)],
)
def test_a_bool_is_no_number(good: Path, tmp_path: Path, key: str, value: object) -> None:
    """A number is no bool either, even where they are equal."""
    path = rewrite(good, tmp_path / "bad.gguf", {f"llama.{key}": value})
    with pytest.raises(ValueError, match=rf"llama\.{re.escape(key)}: expected"):
        qk.load_model(path)


def test_overlapping_tensors(good: Path, tmp_path: Path) -> None:
    tensors = {t.name: t for t in gguf.read_header(good).tensors}
    start = min(t.offset for t in tensors.values())
    data = bytearray(good.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16 + 4
    other = tensors["blk.0.ffn_gate.weight"].offset - start
    data[at : at + 8] = other.to_bytes(8, "little")
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"tensor 'blk.0.ffn_(up|gate).weight': data: expected bytes from \d+ on"
    ):
        gguf.read_header(tmp_path / "bad.gguf")


# ---------------------------------------------------------------------- scaled positions
def test_what_changes_nothing_is_taken(good: Path, tmp_path: Path) -> None:
    want = logits(qk.load_model(good))
    path = rewrite(good, tmp_path / "x.gguf", {
        "llama.expert_count": 0, "llama.logit_scale": 0.0, "llama.attention.sliding_window": 256,
        "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 8.0,
        "llama.attention.causal": True,
        "llama.rope.scaling.finetuned": False,
    }, tensors={"rope_freqs.weight": np.ones(8, np.float32)})  # fmt: skip
    assert torch.equal(logits(qk.load_model(path)), want)
    minimal = rewrite(good, tmp_path / "y.gguf",
     drop=("llama.attention.key_length", "llama.vocab_size",
        "llama.attention.value_length", "llama.rope.dimension_count"))  # fmt: skip
    assert torch.equal(logits(qk.load_model(minimal)), want)


@pytest.mark.parametrize("changes", [
    {"llama.rope.scale_linear": 4.0}, {"llama.rope.scaling.factor": 4.0},
    {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
])  # fmt: skip
def test_linear_scaling(changes: dict[str, Any], good: Path, tmp_path: Path) -> None:
    plain, scaled = qk.load_model(good), qk.load_model(rewrite(good, tmp_path / "x.gguf", changes))
    torch.testing.assert_close(inv_freq(scaled), inv_freq(plain) / 4)
    assert not torch.equal(logits(scaled), logits(plain))


def test_yarn(good: Path, tmp_path: Path) -> None:
    """Against llama.cpp's rope_yarn and ggml_rope_yarn_corr_dims, written out."""
    factor, original, fast, slow, size, theta = 4.0, 64, 16.0, 2.0, 16, 10000.0
    path = rewrite(good, tmp_path / "x.gguf", {
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": factor,
        "llama.rope.scaling.original_context_length": original,
        "llama.rope.scaling.yarn_beta_fast": fast,
        "llama.rope.scaling.yarn_beta_slow": slow,
    })  # fmt: skip
    model = qk.load_model(path)

    def corrected(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(0, math.floor(corrected(fast))), min(size - 1, math.ceil(corrected(slow)))
    want = []
    for i in range(size // 2):
        base = theta ** (-2 * i / size)
        mix = 1 - min(1, max(0, (i - low) / max(0.001, high - low)))
        want.append(base / factor * (1 - mix) + base * mix)
    torch.testing.assert_close(inv_freq(model), torch.tensor(want))
    assert 0 < low + 1 < high, "a ramp that is one"
    assert model.model.rotary_emb.attention_scaling == pytest.approx(1 + 0.1 * math.log(factor))


def test_llama_3_table(good: Path, tmp_path: Path) -> None:
    """The table as llama.cpp's converter makes it: frequencies are divided by it."""
    size, theta, factor = 16, 10000.0, 8.0
    table = []
    for i in range(size // 2):
        length = 2 * math.pi * theta ** (2 * i / size)
        if length < 8192 / 4:
            table.append(1.0)
        elif length > 8192:
            table.append(factor)
        else:
            smooth = (8192 / length - 1) / 3
            table.append(1 / ((1 - smooth) / factor + smooth))
    assert len(set(table)) == 3
    path = rewrite(
        good, tmp_path / "x.gguf", tensors={"rope_freqs.weight": np.array(table, np.float32)}
    )
    plain, scaled = qk.load_model(good), qk.load_model(path)
    torch.testing.assert_close(inv_freq(scaled), inv_freq(plain) / torch.tensor(table))
    rope = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": theta}
    found = rope_table({**rope, "original_max_position_embeddings": 8192}, size)
    torch.testing.assert_close(found, torch.tensor(table))


@pytest.mark.parametrize("table", [
    np.linspace(1, 32, 8), np.full(8, np.nan), np.full(8, 0.5), np.full(4, 1.0), np.full(8, np.inf),
])  # fmt: skip
def test_other_tables(table: np.ndarray, good: Path, tmp_path: Path) -> None:
    path = rewrite(
        good, tmp_path / "x.gguf", tensors={"rope_freqs.weight": table.astype(np.float32)}
    )
    with pytest.raises(ValueError, match="rope_freqs.weight: expected"):
        qk.load_model(path)


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
     "beta_slow": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_scaling_written_and_read(kind: str, rope: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(kind, rope_parameters={"rope_theta": 10000.0, **rope})
    qk.save_model(model, tmp_path / "x.gguf", bpe_tokenizer())
    again = qk.load_model(tmp_path / "x.gguf")
    torch.testing.assert_close(inv_freq(again), inv_freq(model), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_scaling_that_gguf_has_not(tmp_path: Path) -> None:
    for changes, message in (
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
         "rope_type: expected one of"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4,
           "attention_factor": 3.0,
                              "original_max_position_embeddings": 64}},
                              "attention_factor: expected none for yarn"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            qk.save_model(tiny_model(**changes), tmp_path / "x.gguf", bpe_tokenizer())
    model = tiny_model()
    model.config.model_type, model.config.sliding_window = "mistral", 8
    with pytest.raises(ValueError, match="sliding_window: expected none below the 256 positions"):
        qk.save_model(model, tmp_path / "x.gguf", bpe_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_biases_are_read(tmp_path: Path) -> None:
    model = tiny_model(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    qk.quantize_model(model, "q8_0", progress=False)
    qk.save_model(model, tmp_path / "x.gguf", bpe_tokenizer())
    assert torch.equal(logits(qk.load_model(tmp_path / "x.gguf")), logits(model))
    assert model(ids(4)[None]).logits.isfinite().all()
