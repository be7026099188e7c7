"""Tokenizers in GGUF metadata: checked before they are built, and written only if known for
certain.

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
#: SentencePiece's space
_SPACE = "▁"


# ---------------------------------------------------------------------- reading
def load(path: Path) -> Any:
    """The tokenizer of a file, by transformers. ValueError naming the key that is missing or wrong."""
    from transformers import AutoTokenizer

    header = read_header(path, keep="tokenizer.")
    check_any_architecture(path, header)  # transformers makes a config on the way
    _check(path, header.metadata)
    try:
        return AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    except MemoryError:
        raise
    except Exception as error:  # what is wrong with a file shows in any way there
        raise ValueError(
            f"{path}: tokenizer: expected one transformers builds, got {error!r:.300}"
        ) from error


def _check(path: Path, metadata: dict[str, Any]) -> None:
    given = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}

    def fail(key: str, expected: str, got: Any) -> ValueError:
        return ValueError(f"{path}: {PREFIX}{key}: expected {expected}, got {got!r:.60}")

    for key, kind in _ITEMS.items():
        if key in given and not (
            isinstance(given[key], list) and all(type(v) is kind for v in given[key])
        ):
            raise fail(key, f"an array of {kind.__name__}", given[key])
    tokens, model = given.get("tokens"), given.get("model")
    if not tokens:
        raise fail("tokens", "a non-empty array", tokens)
    if not isinstance(model, str):
        raise fail("model", "a name", model)
    if model == "gpt2" and not given.get("merges"):
        raise fail("merges", "a non-empty array for a gpt2 tokenizer", given.get("merges"))
    if model == "llama" and not given.get("merges") and "scores" not in given:
        raise fail("scores", "an array for a llama tokenizer", None)
    for key in ("scores", "token_type"):
        if key in given and len(given[key]) != len(tokens):
            raise fail(key, f"{len(tokens)} items, one a token", f"{len(given[key])} items")
    if not all(math.isfinite(score) for score in given.get("scores", ())):
        raise fail("scores", "finite numbers", "others")
    known = set(tokens)
    for merge in given.get("merges", ()):
        left, space, right = merge.partition(" ")
        if model in _MODELS and not (space and {left, right, left + right} <= known):
            raise fail("merges", "pairs of tokens that make a token", merge)
    for key in _IDS:
        number = given.get(f"{key}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
            raise fail(f"{key}_token_id", f"an integer of 0 to {len(tokens) - 1}", number)
    for key in _FLAGS:
        if not isinstance(given.get(key, False), bool):
            raise fail(key, "true or false", given[key])
    for key in (f"{PREFIX}pre", "tokenizer.chat_template"):
        if not isinstance(metadata.get(key, ""), str):
            raise ValueError(f"{path}: {key}: expected text, got {metadata[key]!r:.60}")


# ---------------------------------------------------------------------- writing
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: how a byte-level tokenizer cuts text before BPE, and whether whole words skip its merges ->
#: llama.cpp's name
_BYTE_LEVEL: dict[tuple[Any, ...], str] = {
    (("bytes", True), False): "gpt-2",
    (("digits", True), ("bytes", True), False): "smollm",
    (("split", _SPLIT % r"\p{N}{1,3}"), ("bytes", False), True): "llama-bpe",
    (("split", _SPLIT % r"\p{N}"), ("bytes", False), False): "qwen2",
}


def write(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Add a tokenizer's entries; `vocabulary` is the number of the model's embedding rows.

    Raises ValueError, naming the tokenizer, if llama.cpp has none that is known to do the same.
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
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer: {name}: expected a BPE model, got {model['type']}")
    by_id = {number: (text, _NORMAL) for text, number in model["vocab"].items()}
    for token in described.get("added_tokens", ()):
        by_id[token["id"]] = (token["content"], _CONTROL if token["special"] else _USER)
    if max(by_id) >= vocabulary:
        raise ValueError(
            f"tokenizer: {name}: expected ids below the model's vocabulary of {vocabulary}, got {max(by_id)}"
        )
    listed = [by_id.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(vocabulary)]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if not merges:
        raise ValueError(f"tokenizer: {name}: expected a BPE model with merges, got none")
    if model["byte_fallback"]:
        _add_sentencepiece(writer, name, described, listed, merges)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(name, described))
        writer.add_token_list([text for text, _ in listed])
        writer.add_token_types([kind for _, kind in listed])
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for key in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{key}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{key}_token_id")(number)
    framed = backend.encode("a").ids  # with whatever the tokenizer puts around a text
    writer.add_add_bos_token(framed[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(framed[-1:] == [tokenizer.eos_token_id])
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("normalizers", part.get("pretokenizers"))
    return [step for one in inner for step in _steps(one)]


def _pre_tokenizer(name: str, described: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text. ValueError if it is not known to
    have one.
    """
    rules: list[Any] = []
    for step in _steps(described.get("pre_tokenizer")):
        if step["type"] == "Digits":
            rules.append(("digits", step["individual_digits"]))
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            rules.append(("split", step["pattern"].get("Regex")))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            rules.append(("bytes", step["use_regex"]))
        else:
            rules.append(step["type"])
    model = described["model"]
    # Qwen's NFC is left out by llama.cpp and its converter, too.
    normal = {step["type"] for step in _steps(described.get("normalizer"))} <= {"NFC"}
    plain = not (
        model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or model["dropout"]
    )
    found = _BYTE_LEVEL.get((*rules, bool(model.get("ignore_merges"))))
    if found is None or not normal or not plain:
        raise ValueError(
            f"tokenizer: {name}: expected one that cuts text as {', '.join(_BYTE_LEVEL.values())} do, or a "
            f"SentencePiece model, got pre-tokenizer {json.dumps(described.get('pre_tokenizer')):.200} and "
            f"normalizer {json.dumps(described.get('normalizer')):.100}"
        )
    return found


def _add_sentencepiece(
    writer: Any,
    name: str,
    described: dict[str, Any],
    listed: list[tuple[str, int]],
    merges: list[Any],
) -> None:
    """SentencePiece's BPE. llama.cpp merges the pair whose token has the best score: scores are the
    merges' order.
    """
    vocabulary, unknown = described["model"]["vocab"], described["model"].get("unk_token")
    prefix = _space_prefix(name, described)
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    added = {text for text, kind in listed if kind != _NORMAL}
    ranks = _ranks(name, vocabulary, merges, bytes_ | added)
    if not bytes_ <= vocabulary.keys() or unknown is None:
        raise ValueError(
            f"tokenizer: {name}: expected a token <0x00> to <0xFF> for each byte, and one for the unknown, "
            f"got {len(bytes_ & vocabulary.keys())} and {unknown!r}"
        )
    scores, kinds = [], []
    for i, (text, kind) in enumerate(listed):
        kind = _BYTE if text in bytes_ else _UNKNOWN if text == unknown else kind
        kinds.append(kind)
        scores.append(-float(ranks.get(text, len(ranks) + i)) if kind == _NORMAL else 0.0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(prefix)


def _space_prefix(name: str, described: dict[str, Any]) -> bool:
    """Whether text gets a space in front. ValueError unless spaces are treated as SentencePiece
    does.
    """
    before, cuts = _steps(described.get("normalizer")), _steps(described.get("pre_tokenizer"))
    prepend = before[:1] == [{"type": "Prepend", "prepend": _SPACE}]
    rest = before[prepend:]
    if rest == [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}] and not cuts:
        return prepend
    if (
        not before
        and len(cuts) == 1
        and cuts[0]["type"] == "Metaspace"
        and cuts[0]["replacement"] == _SPACE
    ):
        inside = next((t for t in described["model"]["vocab"] if _SPACE in t[1:]), None)
        if not cuts[0].get("split", True) or inside is None:
            return bool(cuts[0]["prepend_scheme"] != "never")
    raise ValueError(
        f"tokenizer: {name}: expected spaces to become {_SPACE} without cutting tokens, as SentencePiece does, "
        f"got normalizer {json.dumps(described.get('normalizer')):.100} and pre-tokenizer "
        f"{json.dumps(described.get('pre_tokenizer')):.100}"
    )


def _ranks(
    name: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], whole: set[str]
) -> dict[str, int]:
    """Token -> place in the order in which merges make tokens. `whole` are those that none makes.

    ValueError unless a token's merges lie together, and are all pairs of tokens that make it: only
    then do merges by rank and by the token's score give the same.
    """
    ranks: dict[str, int] = {}
    pairs: dict[str, set[str]] = {}
    last = None
    for left, right in merges:
        token = left + right
        if token != last and token in ranks:
            raise ValueError(
                f"tokenizer: {name}: expected merges that follow from scores, got {token!r} made at two places"
            )
        ranks.setdefault(token, len(ranks))
        pairs.setdefault(token, set()).add(left)
        last = token
    for token in vocabulary.keys() - whole:
        lefts = pairs.get(token, set())
        halves = {
            token[:i] for i in range(1, len(token)) if {token[:i], token[i:]} <= vocabulary.keys()
        }
        if halves != lefts:
            raise ValueError(
                f"tokenizer: {name}: expected merges that follow from scores, got {len(lefts)} of the "
                f"{len(halves)} that make {token!r}"
            )
    return ranks


def _copy(writer: Any, source: Path, vocabulary: int) -> None:
    """The tokenizer's entries of the file it was read from, which hold more than transformers
    keeps.
    """
    import gguf

    count = len(read_header(source, keep="tokenizer.").metadata.get(f"{PREFIX}tokens") or ())
    if count != vocabulary:
        raise ValueError(
            f"tokenizer: {source}: expected {vocabulary} tokens, the model's vocabulary, got {count}"
        )
    for key, field in gguf.GGUFReader(str(source)).fields.items():
        if not key.startswith("tokenizer."):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
