"""Too little memory to load, quantize or save: an error says so, and a second try works."""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk

from ..tiny import ids, tiny_model
from .test_gguf_models import bpe_tokenizer

ROOT = Path(__file__).parents[2]
MB = 1 << 20
#: what there is beyond what the process has already taken when it starts
LEFT = (1, 2, 4, 8, 16, 32, 64)


def model() -> torch.nn.Module:
    """A model of 18 MB in float32."""
    return tiny_model(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=8
    )


def taken() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limited(work: Callable[[], object], left: int) -> str:
    """Run `work` with `left` MB more than is in use. Returns the name of the error, or ""."""
    ctypes.CDLL(None).malloc_trim(0)
    resource.setrlimit(resource.RLIMIT_AS, (taken() + left * MB, -1))
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return ""


def run(kind: str, folder: Path) -> list[str]:
    """Run with each limit of LEFT; after each, a run without a limit must succeed."""
    torch.set_num_threads(1)
    want = qk.quantize_model(model(), "q4_1", progress=False)
    tokens = ids(8)[None]
    with torch.no_grad():
        logits = want(tokens).logits
    qk.save_model(want, folder / "source")
    ends = []
    for left in LEFT:
        if kind == "load":
            ends.append(limited(lambda: qk.load_model(folder / "source", dtype="float64"), left))
            again = qk.load_model(folder / "source")
        elif kind == "quantize":
            again = model()
            ends.append(limited(lambda m=again: qk.quantize_model(m, "q4_1", progress=False), left))
            if ends[-1]:
                # goes on with the layers that are left
                qk.quantize_model(again, "q4_1", progress=False)
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, logits)
    return ends


@pytest.mark.parametrize("kind", ["load", "quantize"])
def test_it_is_said_nothing_is_half_done_and_then_it_works(kind: str, tmp_path: Path) -> None:
    """In a process of its own: what earlier tests have freed would be enough."""
    code = (
        "import json, sys; from pathlib import Path; "
        "from tests.checkpoints.test_out_of_memory import run; "
        "print(json.dumps(run(sys.argv[1], Path(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", code, kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = json.loads(done.stdout.splitlines()[-1])
    failed = [end for end in ends if end]
    assert failed, "nothing ran out of memory"
    assert not ends[-1]
    assert [
        end for end in failed if "memory" not in end.lower() and "alloc" not in end.lower()
    ] == []


@pytest.mark.parametrize("name", ["model", "model.gguf"])
def test_a_save_without_memory_leaves_the_old_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving allocates little, so the n-th copy fails instead."""
    (folder := tmp_path / "folder").mkdir()
    old, new = tiny_model(), qk.quantize_model(tiny_model(seed=1), "q4_1", progress=False)
    tokens, target, real = ids(8)[None], folder / name, torch.Tensor.contiguous
    qk.save_model(old, target, bpe_tokenizer())
    for fails in (1, 2, 5, 20, 10**9):
        calls = []

        def contiguous(
            self: Tensor, fails: int = fails, calls: list[int] = calls, **more: Any
        ) -> Tensor:
            calls.append(1)
            if len(calls) >= fails:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return real(self, **more)

        monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
        try:
            qk.save_model(new, target, bpe_tokenizer())
            failed = False
        except RuntimeError as error:
            failed = "can't allocate memory" in str(error)
        monkeypatch.setattr(torch.Tensor, "contiguous", real)
        assert failed == (len(calls) >= fails)
        assert failed or fails > 2
        assert [path.name for path in folder.iterdir()] == [name]
        with torch.no_grad():
            found, want = (
                qk.load_model(target)(tokens).logits,
                (old if failed else new)(tokens).logits,
            )
        torch.testing.assert_close(found, want)
