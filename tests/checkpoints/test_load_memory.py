"""The peak memory of loading a model, against the size of its files.

All resident memory counts: allocations of the process, and pages of the files that it maps. Tensors
that stay backed by their file are the model, so their pages count like allocations, though the
system can drop them. Pages that are only read for a copy count for as long as they are mapped.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

import qkernels as qk

from ..tiny import tiny_model
from .test_gguf_models import bpe_tokenizer

#: prints for each (path, dtype) the bytes that loading added at its highest, and those that stay
MEASURE = """
import ctypes, gc, json, sys
import torch
import qkernels as qk

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

torch.set_num_threads(1)
warm, cases = json.loads(sys.argv[1])
for path in warm:
    qk.load_model(path)
found = []
for path, dtype in cases:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the highest so far is what there is now
    before = status("VmRSS")
    model = qk.load_model(path, dtype=dtype)
    found.append((status("VmHWM") - before, status("VmRSS") - before))
    del model
print(json.dumps(found))
"""
FORMATS = ("nf4", "fp8", "q4_1", "q4_k_m")
SHARD = 20_000_000


def model_of(format: str | None) -> LlamaForCausalLM:
    """A model of about 100 MB when packed; all blocks have the same values."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    if format is not None:
        qk.quantize_model(model, format, progress=False)
    first = model.model.layers[0]
    count = {"fp8": 24, None: 12}.get(format, 40)
    model.model.layers.extend(copy.deepcopy(first) for _ in range(count - 1))
    config.num_hidden_layers = count
    return model


def file_bytes(path: Path) -> tuple[int, int]:
    """(bytes of all weight files, bytes of the largest)."""
    sizes = [f.stat().st_size for f in ([path] if path.is_file() else path.glob("*.safetensors"))]
    return sum(sizes), max(sizes)


def test_the_peak_is_the_file_s_size_and_a_tenth(tmp_path: Path) -> None:
    """The peak is the size of the file, a tenth, and one shard.

    With a single file it is the largest tensor instead of a shard, because no more is copied at
    once.
    """
    tiny = qk.quantize_model(tiny_model(), "q4_1", progress=False)
    warm = [tmp_path / "warm", tmp_path / "warm.gguf"]
    for path in warm:
        qk.save_model(tiny, path, bpe_tokenizer())
    cases: list[tuple[Path, str | None, int]] = []
    largest = 8192 * 512 * 2
    for format in (*FORMATS, None):
        model, name = model_of(format), format or "plain"
        qk.save_model(model, tmp_path / name)
        cases += [(tmp_path / name, dtype, largest) for dtype in (None, "float16")]
        qk.save_model(model, tmp_path / f"{name}-parts", max_shard_bytes=SHARD)
        cases += [(tmp_path / f"{name}-parts", dtype, SHARD) for dtype in (None, "float16")]
        if name.startswith("q4"):
            qk.save_model(model, tmp_path / f"{name}.gguf", bpe_tokenizer())
            cases += [(tmp_path / f"{name}.gguf", dtype, largest) for dtype in (None, "bfloat16")]
    # glibc's heap keeps up to 45 MB of what loading frees, by chance. So a case that is over its
    # bound is measured once more, in a new process, which what loading needs would exceed, too.
    over = cases_over(warm, cases)
    over = cases_over(warm, over) if over else []
    assert [(path.name, dtype) for path, dtype, _ in over] == []


def cases_over(
    warm: list[Path], cases: list[tuple[Path, str | None, int]]
) -> list[tuple[Path, str | None, int]]:
    """The cases whose loading, measured in a new process, takes more than their bound."""
    given = [list(map(str, warm)), [(str(path), dtype) for path, dtype, _ in cases]]
    command = [sys.executable, "-c", MEASURE, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    over = []
    for case, (peak, left) in zip(cases, json.loads(done.stdout), strict=True):
        path, dtype, more = case
        size, shard = file_bytes(path)
        assert size > 50_000_000, path
        assert left > 0, "what is measured must be there"
        print(
            f"{path.name} {dtype}: {size / 1e6:.0f} MB, peak {peak / size:.2f}, "
            f"left {left / size:.2f}"
        )
        if peak > 1.1 * size + max(more, shard if "parts" in path.name else 0):
            over.append(case)
    return over
