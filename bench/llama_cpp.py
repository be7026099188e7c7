"""Compare the perplexity of llama.cpp and of qkernels on one GGUF file and the same text.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install xllamacpp
    python -m qkernels quantize smollm2-135m -f q4_k_m --no-report -o smol.gguf
    python -m bench.llama_cpp smol.gguf --llama /tmp/llama

xllamacpp is a wheel around llama.cpp that exports its C API. A child process in that environment
calls it by ctypes. Structures that llama.cpp passes by value are opaque bytes here, but for two:
the batch, and the first numbers of the context's parameters, whose defaults are checked.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any


class Opaque(ctypes.Structure):
    """Any of llama.cpp's parameter structures: this is larger than each of them."""

    _fields_ = [("words", ctypes.c_uint32 * 128)]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def library(environment: Path) -> Any:
    """The shared object of the wheel, with types for the functions that are called."""
    paths = sorted(environment.rglob("xllamacpp*.so"))
    if not paths:
        raise SystemExit(f"{environment}: expected xllamacpp installed, found none")
    lib = ctypes.PyDLL(str(paths[0]))
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    for name, result, arguments in (
        ("llama_model_default_params", Opaque, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Opaque]),
        ("llama_context_default_params", Opaque, []),
        ("llama_init_from_model", pointer, [pointer, Opaque]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_tokenize", number, [pointer, ctypes.c_char_p, number, pointer, number, flag, flag]),
        ("llama_batch_init", Batch, [number, number, number]),
        ("llama_decode", number, [pointer, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, flag]),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_backend_init()
    return lib


def serve(environment: Path, path: Path, text: str, tokens: int, window: int) -> dict[str, Any]:
    """Tokenize and score `text` with llama.cpp, in this process.

    Returns its token ids ("ids"), and the mean negative log-likelihood ("nll") of every token but
    the first of its window ("scored" of them).
    """
    import numpy as np

    lib = library(environment)
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert model, "llama.cpp could not load the file"
    params = lib.llama_context_default_params()
    assert params.words[:3] == [512, 2048, 512], (
        f"another layout of llama_context_params: {params.words[:8]}"
    )
    params.words[0] = params.words[1] = params.words[2] = window  # n_ctx, n_batch, n_ubatch
    context = lib.llama_init_from_model(model, params)
    assert context, "llama.cpp could not make a context"
    vocab = lib.llama_model_get_vocab(model)
    raw = text.encode()
    buffer = (ctypes.c_int32 * (len(raw) + 8))()
    count = lib.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), True, False)
    assert count >= tokens, f"expected a text of {tokens} tokens, got {count}"
    ids, size = list(buffer[:tokens]), lib.llama_vocab_n_tokens(vocab)
    total, scored = 0.0, 0
    batch = lib.llama_batch_init(window, 0, 1)
    for begin in range(0, tokens, window):
        part = ids[begin : begin + window]
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert lib.llama_decode(context, batch) == 0
        for i, following in enumerate(part[1:]):
            logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (size,)).astype(
                np.float64
            )
            top = logits.max()
            total -= logits[following] - top - math.log(np.exp(logits - top).sum())
            scored += 1
    return {"ids": ids, "nll": total / scored, "scored": scored}


def ours(path: Path, ids: list[int], window: int) -> float:
    """Mean negative log-likelihood by `qkernels.load_model`, in float32 from the packed bytes."""
    import torch

    import qkernels as qk

    model = qk.load_model(path)
    total, scored = 0.0, 0
    for begin in range(0, len(ids), window):
        part = torch.tensor([ids[begin : begin + window]])
        with torch.no_grad():
            logits = model(part).logits[0, :-1].double()
        total -= float(logits.log_softmax(-1).gather(1, part[0, 1:, None]).sum())
        scored += part.shape[1] - 1
    return total / scored


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path)
    parser.add_argument(
        "--llama", type=Path, required=True, help="folder that xllamacpp is installed in"
    )
    parser.add_argument(
        "--text", default="macbeth", help="a file, or one of qkernels' sample texts"
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        print(
            json.dumps(serve(given.llama, given.gguf, sys.stdin.read(), given.tokens, given.window))
        )
        return
    from qkernels.checkpoints import load_tokenizer
    from qkernels.cli.common import read_text

    text = read_text(given.text)[: 8 * given.tokens]
    command = [sys.executable, __file__, "--serve", *sys.argv[1:]]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    theirs = json.loads(done.stdout.splitlines()[-1])
    mine = load_tokenizer(given.gguf)(text)["input_ids"][: given.tokens]
    same = sum(a == b for a, b in zip(mine, theirs["ids"], strict=True))
    nll = ours(given.gguf, theirs["ids"], given.window)
    print(f"{given.gguf.name}: {given.tokens} tokens of {given.text} in windows of {given.window}")
    print(f"tokens that both tokenizers put at the same place: {same} of {given.tokens}")
    print(f"perplexity: llama.cpp {math.exp(theirs['nll']):.4f}, qkernels {math.exp(nll):.4f}")
    print(f"difference of the mean log-likelihoods: {nll - theirs['nll']:+.6f} nats per token")


if __name__ == "__main__":
    main()
