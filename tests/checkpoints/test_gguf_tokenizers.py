"""Tokenizers written to GGUF files: exactly, or refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf as package
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

import qkernels as qk
from qkernels.checkpoints import load_tokenizer
from qkernels.checkpoints.gguf.tokenizer import _SPLIT

from ..tiny import tiny_model

TEXT = "the hen, he said: a  theme é ☃ 123\nhen"
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
# in the order of their scores
WORDS = [
    "▁h",
    "he",
    "▁he",
    "th",
    "the",
    "▁the",
    "en",
    "hen",
    "▁hen",
]


def byte_level(
    pre: Any, *, normalizer: Any = None, merges: Any = (("h", "e"),), **options: Any
) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), **options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>"
    )


def sentencepiece(
    normalizer: Any = LEGACY, pre: Any = None, drop: int | None = None, **options: Any
) -> Any:
    """A tokenizer like Llama 2's: bytes, letters, and the merges that its scores imply."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *"▁thenmasid,:",
        *WORDS,
    ]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (word[:i], word[i:])
        for word in WORDS
        for i in range(1, len(word))
        if word[:i] in vocabulary and word[i:] in vocabulary
    ]
    if drop is not None:
        del merges[drop]
    settings: dict[str, Any] = {
        "byte_fallback": True,
        "unk_token": "<unk>",
        "fuse_unk": True,
        **options,
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **settings))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def split(digits: str) -> Any:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT % digits), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


def plain() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def save(path: Path, tokenizer: Any) -> dict[str, Any]:
    """Save a model with this tokenizer. Returns the metadata of the file."""
    qk.save_model(tiny_model(vocab_size=320, num_hidden_layers=1), path, tokenizer)
    return {key: field.contents() for key, field in package.GGUFReader(path).fields.items()}


@pytest.mark.parametrize(("tokenizer", "name"), [
    (byte_level(plain()), "gpt-2"),
    (byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain()])),
     "smollm"),
    (byte_level(split(r"\p{N}{1,3}"), ignore_merges=True), "llama-bpe"),
    (byte_level(split(r"\p{N}"), normalizer=normalizers.NFC()), "qwen2"),
], ids=["gpt-2", "smollm", "llama-bpe", "qwen2"])  # fmt: skip
def test_byte_level(tokenizer: Any, name: str, tmp_path: Path) -> None:
    found = save(tmp_path / "x.gguf", tokenizer)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert load_tokenizer(tmp_path / "x.gguf")(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize(("tokenizer", "prefix"), [
    (sentencepiece(), True),
    (sentencepiece(normalizers.Replace(" ", "▁")), False),
    (sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)), True),
    (sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True)), True),
    (sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)), False),
])  # fmt: skip
def test_sentencepiece(tokenizer: Any, prefix: bool, tmp_path: Path) -> None:
    found = save(tmp_path / "x.gguf", tokenizer)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert kinds[:3] == [2, 3, 3]
    assert all(kinds[tokens.index(f"<0x{i:02X}>")] == 6 for i in range(256))
    scores = dict(zip(tokens, found["tokenizer.ggml.scores"], strict=True))
    assert sorted(WORDS, key=lambda word: -scores[word]) == WORDS
    assert all(scores[letter] < scores[WORDS[-1]] for letter in "then")
    assert tokens.index("[PAD300]") == 300
    assert kinds[300] == 5
    want = tokenizer(TEXT)["input_ids"]
    assert _llama_cpp(TEXT, found) == want[1:], "as llama.cpp merges"
    if prefix:  # transformers reads no add_space_prefix
        assert load_tokenizer(tmp_path / "x.gguf")(TEXT)["input_ids"] == want


def _llama_cpp(text: str, metadata: dict[str, Any]) -> list[int]:
    """Tokenize as llama.cpp does with a SentencePiece vocabulary.

    Join the two neighbours that make the token with the best score, again and again; what is no
    token becomes bytes.
    """
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    text = (" " if metadata["tokenizer.ggml.add_space_prefix"] else "") + text
    parts = list(text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in pairwise(parts)]
        best = max(
            (i for i, p in enumerate(joined) if p in ids),
            key=lambda i: scores[ids[joined[i]]],
            default=None,
        )
        if best is None:
            break
        parts[best : best + 2] = [joined[best]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize(("tokenizer", "message"), [
    (byte_level(pre_tokenizers.Whitespace()),
     "expected one that splits text as gpt-2, .*Whitespace"),
    (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
     "expected one that splits text as"),
    (byte_level(split(r"\p{N}{1,2}")), "expected one that splits text as"),
    (byte_level(split(r"\p{N}"), ignore_merges=True), "expected one that splits text as"),
    (byte_level(None), "expected one that splits text as"),
    (byte_level(plain(), normalizer=normalizers.Lowercase()),
     "expected one that splits text as .*Lowercase"),
    (byte_level(plain(), dropout=0.5), "expected one that splits text as"),
    (byte_level(plain(), merges=()), "expected a BPE model with merges, got none"),
    (sentencepiece(normalizers.Prepend("▁")), "expected spaces to become ▁ .*Prepend"),
    (sentencepiece(None, plain()), "expected spaces to become ▁ .*ByteLevel"),
    (sentencepiece(drop=4), "expected merges that follow from scores, got 0 of the 1 that make"),
    (sentencepiece(drop=-1), "expected merges that follow from scores, got"),
    (sentencepiece(unk_token=None), "expected a token <0x00> to <0xFF>"),
])  # fmt: skip
def test_what_is_not_known(tokenizer: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"tokenizer: .*: {message}"):
        save(tmp_path / "x.gguf", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_vocabularies_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="expected ids below the model's vocabulary of 128, got 258"
    ):
        qk.save_model(tiny_model(), tmp_path / "x.gguf", byte_level(plain()))
    save(tmp_path / "x.gguf", byte_level(plain()))
    read = load_tokenizer(tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="expected 128 tokens, the model's vocabulary, got 320"):
        qk.save_model(tiny_model(), tmp_path / "y.gguf", read)
    (tmp_path / "x.gguf").unlink()
    with pytest.raises(
        ValueError, match="expected the file it was read from at .*x.gguf, found none"
    ):
        save(tmp_path / "y.gguf", read)
    assert list(tmp_path.iterdir()) == []
