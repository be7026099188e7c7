"""GGUF: `read_header`, `load_model` with a forward, `load_tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as package

import qkernels as qk
from qkernels.checkpoints import load_tokenizer
from qkernels.checkpoints.gguf import metadata as gguf_metadata
from qkernels.checkpoints.gguf import reader as gguf

from ..checkpoints.test_gguf_experts import mixture
from ..checkpoints.test_gguf_models import bpe_tokenizer, model_of
from ..tiny import tiny_model
from . import documents
from .documents import Tree
from .oracle import Finding, attempt
from .work import forward, place

FILE = "model.gguf"
#: keys that no seed has
WORDS = [
    f"llama.{key}"
    for key in (*gguf_metadata.RULES, *gguf_metadata.EXPERT_RULES, *gguf_metadata._NEUTRAL)
]
WORDS += [
    f"tokenizer.ggml.{key}"
    for key in ("scores", "pre", "merges", "token_type", "add_bos_token", "cls_token_id")
]
WORDS += [
    "gemma2",
    "gpt2",
    "falcon",
    "mamba",
    "phi3",
    "t5",
    "bert",
    "rope_freqs.weight",
    "general.alignment",
    "output.weight",
]


def seeds(scratch: Path) -> dict[str, Tree]:
    """Sound files of each architecture and of some types."""
    found = {}
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    for name, kind, format in (
        ("llama-q8_0", "llama", "q8_0"), ("llama-q4_0", "llama", "q4_0"),
        ("qwen2-iq4_nl", "qwen2", "iq4_nl"), ("qwen3-fp16", "qwen3", "fp16"),
    ):  # fmt: skip
        model = tiny_model(**sizes) if kind == "llama" else model_of(kind)
        found[name] = _seed(scratch, qk.quantize_model(model, format, progress=False))
    for kind in ("llama", "qwen2moe"):
        path = mixture(kind, scratch)[0]
        found[f"{kind}-experts"] = {FILE: documents.gguf_tree(path.read_bytes(), str(path))}
    found["falcon"] = _renamed(found["llama-q8_0"], "falcon")
    found["llama-spm"] = _sentencepiece(found["llama-q8_0"])
    return found


def _seed(scratch: Path, model: Any) -> Tree:
    path = scratch / "seed.gguf"
    qk.save_model(model, path, bpe_tokenizer())
    return {FILE: documents.gguf_tree(path.read_bytes(), str(path))}


def _renamed(seed: Tree, architecture: str) -> Tree:
    """A file of an architecture that transformers reads and we dequantize."""
    tree = documents.edited(
        seed, [["set", [FILE, "metadata", "general.architecture", "value"], architecture]]
    )
    metadata = tree[FILE]["metadata"]
    tree[FILE]["metadata"] = {
        k.replace("llama.", f"{architecture}."): v for k, v in metadata.items()
    }
    return tree


def _sentencepiece(seed: Tree) -> Tree:
    """A file with a tokenizer that has scores instead of merges."""
    tree = documents.edited(seed, [["drop", [FILE, "metadata", "tokenizer.ggml.merges"]]])
    metadata = tree[FILE]["metadata"]
    count = len(metadata["tokenizer.ggml.tokens"]["value"])
    metadata["tokenizer.ggml.model"]["value"] = "llama"
    metadata["tokenizer.ggml.scores"] = {
        "type": 9,
        "item": 6,
        "value": [-float(i) for i in range(count)],
    }
    return tree


def run(tree: Tree, edits: list[list[Any]], folder: Path) -> None:
    """Read the file in each way."""
    files = documents.files_of(tree, edits)
    place(folder, files)
    path = folder / FILE
    names = (str(folder),)
    header = attempt("read_header", names, lambda: gguf.read_header(path))
    if header is not None:
        size = path.stat().st_size
        for tensor in header.tensors:
            if not 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= size:
                raise Finding(
                    "read_header: a tensor outside of the file", f"{tensor}, {size} bytes"
                )
        _compare(path, header)
    model = attempt("load_model", names, lambda: qk.load_model(path))
    if model is not None:
        forward(model)
    tokenizer = attempt("load_tokenizer", names, lambda: load_tokenizer(path))
    if tokenizer is not None:
        tokenizer.decode(tokenizer("he a").input_ids)


def _compare(path: Path, header: Any) -> None:
    """Compare with the package gguf, which must find the same tensors and not refuse the file."""
    try:
        theirs = package.GGUFReader(path).tensors
    except ValueError as error:
        raise Finding(f"read_header: takes what gguf refuses: {error!s:.40}", str(error)) from None
    found = {t.name: (t.tensor_type.name, t.data_offset, t.n_bytes) for t in theirs}
    ours = {t.name: (t.type, t.offset, t.nbytes) for t in header.tensors}
    if found != ours:
        raise Finding("read_header: other tensors than gguf's", f"{found}\n{ours}")
