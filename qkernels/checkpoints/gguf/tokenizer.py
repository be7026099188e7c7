"""Tokenizers in GGUF metadata: checked on reading, written only if llama.cpp is known to match.

    tokenizer.ggml.model   "gpt2": byte-level BPE, tokens and merges, split as `pre` says
                           "llama": SentencePiece's BPE, tokens, scores and types; merges follow
                           from scores

Source: ggml's docs/gguf.md and llama.cpp's vocabulary loader.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .header import read_header
from .metadata import check_any_architecture

PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_MODELS = ("gpt2", "llama")
_ITEMS = {"tokens": str, "merges": str, "scores": float, "token_type": int}
_IDS = ("bos", "eos", "unknown", "padding", "seperator", "cls", "mask", "eot", "eom")
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
#: the character that stands for a space in SentencePiece
_SPACE = "▁"


# ---------------------------------------------------------------------- reading
def load(path: Path) -> Any:
    """The tokenizer of a file, built by transformers. ValueError naming a missing or wrong key."""
    from transformers import AutoTokenizer

    header = read_header(path, keep="tokenizer.")
    check_any_architecture(path, header)  # transformers also builds a config
    _check(path, header.metadata)
    try:
        return AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    except MemoryError:
        raise
    except Exception as error:  # transformers may fail on a bad file in any way
        raise ValueError(
            f"{path}: tokenizer: expected one transformers builds, got {error!r:.300}"
        ) from error


def _check(path: Path, metadata: dict[str, Any]) -> None:
    """ValueError naming the first key whose value is wrong."""
    entries = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}

    def fail(key: str, expected: str, got: Any) -> ValueError:
        return ValueError(f"{path}: {PREFIX}{key}: expected {expected}, got {got!r:.60}")

    for key, kind in _ITEMS.items():
        if key in entries and not (
            isinstance(entries[key], list) and all(type(v) is kind for v in entries[key])
        ):
            raise fail(key, f"an array of {kind.__name__}", entries[key])
    tokens, model = entries.get("tokens"), entries.get("model")
    if not tokens:
        raise fail("tokens", "a non-empty array", tokens)
    if not isinstance(model, str):
        raise fail("model", "a name", model)
    if model == "gpt2" and not entries.get("merges"):
        raise fail("merges", "a non-empty array for a gpt2 tokenizer", entries.get("merges"))
    if model == "llama" and not entries.get("merges") and "scores" not in entries:
        raise fail("scores", "an array for a llama tokenizer", None)
    for key in ("scores", "token_type"):
        if key in entries and len(entries[key]) != len(tokens):
            raise fail(
                key, f"{len(tokens)} items, one for each token", f"{len(entries[key])} items"
            )
    if not all(math.isfinite(score) for score in entries.get("scores", ())):
        raise fail("scores", "finite numbers", "others")
    token_set = set(tokens)
    for merge in entries.get("merges", ()):
        left, space, right = merge.partition(" ")
        if model in _MODELS and not (space and {left, right, left + right} <= token_set):
            raise fail("merges", "pairs of tokens that make a token", merge)
    for key in _IDS:
        number = entries.get(f"{key}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
            raise fail(f"{key}_token_id", f"an integer of 0 to {len(tokens) - 1}", number)
    for key in _FLAGS:
        if not isinstance(entries.get(key, False), bool):
            raise fail(key, "true or false", entries[key])
    for key in (f"{PREFIX}pre", "tokenizer.chat_template"):
        if not isinstance(metadata.get(key, ""), str):
            raise ValueError(f"{path}: {key}: expected text, got {metadata[key]!r:.60}")


# ---------------------------------------------------------------------- writing
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: (how a byte-level tokenizer splits text before BPE, whether whole words skip its merges) ->
#: llama.cpp's name
_BYTE_LEVEL: dict[tuple[Any, ...], str] = {
    (("bytes", True), False): "gpt-2",
    (("digits", True), ("bytes", True), False): "smollm",
    (("split", _SPLIT % r"\p{N}{1,3}"), ("bytes", False), True): "llama-bpe",
    (("split", _SPLIT % r"\p{N}"), ("bytes", False), False): "qwen2",
}


def write(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Add the entries of a tokenizer to a GGUF file.

    vocabulary: the number of the model's embedding rows.
    Raises ValueError naming the tokenizer if llama.cpp has none that is known to behave the same.
    """
    source = getattr(tokenizer, "gguf_file", None)
    if source is not None:
        if not Path(source).is_file():
            raise ValueError(
                f"tokenizer: expected the file it was read from at {source}, found none"
            )
        _copy(writer, Path(source), vocabulary)
        return
    name = getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer: {name}: expected a fast tokenizer, got {type(tokenizer).__name__}"
        )
    description = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer: {name}: expected a BPE model, got {model['type']}")
    by_id = {number: (text, _NORMAL) for text, number in model["vocab"].items()}
    for token in description.get("added_tokens", ()):
        by_id[token["id"]] = (token["content"], _CONTROL if token["special"] else _USER)
    if max(by_id) >= vocabulary:
        raise ValueError(
            f"tokenizer: {name}: expected ids below the model's vocabulary of {vocabulary}, got "
            f"{max(by_id)}"
        )
    tokens = [by_id.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(vocabulary)]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if not merges:
        raise ValueError(f"tokenizer: {name}: expected a BPE model with merges, got none")
    if model["byte_fallback"]:
        _add_sentencepiece(writer, name, description, tokens, merges)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(name, description))
        writer.add_token_list([text for text, _ in tokens])
        writer.add_token_types([kind for _, kind in tokens])
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for key in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{key}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{key}_token_id")(number)
    encoded = backend.encode("a").ids  # with the tokens that the tokenizer puts around a text
    writer.add_add_bos_token(encoded[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(encoded[-1:] == [tokenizer.eos_token_id])
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, nested sequences flattened."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("normalizers", part.get("pretokenizers"))
    return [step for one in inner for step in _steps(one)]


def _pre_tokenizer(name: str, description: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text. ValueError if it has none."""
    rules: list[Any] = []
    for step in _steps(description.get("pre_tokenizer")):
        if step["type"] == "Digits":
            rules.append(("digits", step["individual_digits"]))
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            rules.append(("split", step["pattern"].get("Regex")))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            rules.append(("bytes", step["use_regex"]))
        else:
            rules.append(step["type"])
    model = description["model"]
    # llama.cpp and its converter also leave out Qwen's NFC.
    normalizer_ok = {step["type"] for step in _steps(description.get("normalizer"))} <= {"NFC"}
    plain_bpe = not (
        model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or model["dropout"]
    )
    known_name = _BYTE_LEVEL.get((*rules, bool(model.get("ignore_merges"))))
    if known_name is None or not normalizer_ok or not plain_bpe:
        raise ValueError(
            f"tokenizer: {name}: expected one that splits text as "
            f"{', '.join(_BYTE_LEVEL.values())} do, or a SentencePiece model, got pre-tokenizer "
            f"{json.dumps(description.get('pre_tokenizer')):.200} and normalizer "
            f"{json.dumps(description.get('normalizer')):.100}"
        )
    return known_name


def _add_sentencepiece(
    writer: Any,
    name: str,
    description: dict[str, Any],
    tokens: list[tuple[str, int]],
    merges: list[Any],
) -> None:
    """Add SentencePiece's BPE.

    llama.cpp merges the pair whose token has the best score, so the scores give the merges' order.
    """
    vocabulary, unknown = description["model"]["vocab"], description["model"].get("unk_token")
    space_prefix = _space_prefix(name, description)
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    added = {text for text, kind in tokens if kind != _NORMAL}
    ranks = _ranks(name, vocabulary, merges, byte_tokens | added)
    if not byte_tokens <= vocabulary.keys() or unknown is None:
        raise ValueError(
            f"tokenizer: {name}: expected a token <0x00> to <0xFF> for each byte, and an unknown "
            f"token, got {len(byte_tokens & vocabulary.keys())} and {unknown!r}"
        )
    scores, kinds = [], []
    for i, (text, kind) in enumerate(tokens):
        kind = _BYTE if text in byte_tokens else _UNKNOWN if text == unknown else kind
        kinds.append(kind)
        scores.append(-float(ranks.get(text, len(ranks) + i)) if kind == _NORMAL else 0.0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(space_prefix)


def _space_prefix(name: str, description: dict[str, Any]) -> bool:
    """Whether a space is put before text. ValueError unless spaces work as in SentencePiece."""
    normalizers, pre_tokenizers = (
        _steps(description.get("normalizer")),
        _steps(description.get("pre_tokenizer")),
    )
    prepend = normalizers[:1] == [{"type": "Prepend", "prepend": _SPACE}]
    other_normalizers = normalizers[prepend:]
    if (
        other_normalizers == [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
        and not pre_tokenizers
    ):
        return prepend
    if (
        not normalizers
        and len(pre_tokenizers) == 1
        and pre_tokenizers[0]["type"] == "Metaspace"
        and pre_tokenizers[0]["replacement"] == _SPACE
    ):
        token_with_space = next((t for t in description["model"]["vocab"] if _SPACE in t[1:]), None)
        if not pre_tokenizers[0].get("split", True) or token_with_space is None:
            return bool(pre_tokenizers[0]["prepend_scheme"] != "never")
    raise ValueError(
        f"tokenizer: {name}: expected spaces to become {_SPACE} without cutting tokens, as "
        f"SentencePiece does, got normalizer {json.dumps(description.get('normalizer')):.100} and "
        f"pre-tokenizer {json.dumps(description.get('pre_tokenizer')):.100}"
    )


def _ranks(
    name: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], unmerged: set[str]
) -> dict[str, int]:
    """Token -> its place in the order in which merges make tokens.

    unmerged: tokens that no merge makes.
    Raises ValueError unless all merges that make a token are next to each other and are all pairs
    of tokens that make it. Only then do merging by rank and merging by the token's score agree.
    """
    ranks: dict[str, int] = {}
    pairs: dict[str, set[str]] = {}
    last = None
    for left, right in merges:
        token = left + right
        if token != last and token in ranks:
            raise ValueError(
                f"tokenizer: {name}: expected merges that follow from scores, got {token!r} made "
                "at two places"
            )
        ranks.setdefault(token, len(ranks))
        pairs.setdefault(token, set()).add(left)
        last = token
    for token in vocabulary.keys() - unmerged:
        lefts = pairs.get(token, set())
        halves = {
            token[:i] for i in range(1, len(token)) if {token[:i], token[i:]} <= vocabulary.keys()
        }
        if halves != lefts:
            raise ValueError(
                f"tokenizer: {name}: expected merges that follow from scores, got {len(lefts)} of "
                f"the {len(halves)} that make {token!r}"
            )
    return ranks


def _copy(writer: Any, source: Path, vocabulary: int) -> None:
    """Copy the tokenizer's entries from its file, which holds more than transformers keeps."""
    import gguf

    count = len(read_header(source, keep="tokenizer.").metadata.get(f"{PREFIX}tokens") or ())
    if count != vocabulary:
        raise ValueError(
            f"tokenizer: {source}: expected {vocabulary} tokens, the model's vocabulary, got "
            f"{count}"
        )
    for key, field in gguf.GGUFReader(str(source)).fields.items():
        if not key.startswith("tokenizer."):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
