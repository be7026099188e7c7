"""A race on a pretended GPU: devices, plans, CUDA graphs, both backends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkernels.benchmark import race, timing
from tests import pretend_gpu

ROOT = Path(__file__).parents[2]


def walk() -> None:
    """Run in a process of its own, because caches about a GPU must not outlive the test."""
    timing.MAX_CHAIN, timing.COLD_BYTES = 2, 2**12
    field = [
        race.Ours("gptq", {"bits": 4, "group_size": 128}, "triton"),
        race.Ours("quip_sharp", {}, "cuda"),  # three launches: transform, product, transform
        race.Ours("int8", {}, "cuda"),
        race.Ours("nf4", {}, "reference"),
    ]
    with pretend_gpu.visible():
        rows = list(race.run(field, [(72, 512)], [1, 17], race.Settings("cuda", 1)))
    assert [row.failed for row in rows] == [""] * 10
    assert {row.kernel.split(".")[0] for row in rows} == {"", "triton", "cuda", "reference"}
    assert all(row.predicted and row.speedup == 1.0 and not row.eager for row in rows)


class Waiting(race.Dense):
    """Asks the GPU like LLM.int8() of bitsandbytes, which a CUDA graph cannot capture."""

    name = "waiting"

    def prepare(self, weight: torch.Tensor) -> race.Layer:
        made = super().prepare(weight)
        call = made.call
        made.call = lambda x: call(x) * (1.0 if bool(x.isfinite().all()) else 0.0)
        return made


def walk_without_graphs() -> None:
    timing.MAX_CHAIN, timing.COLD_BYTES = 2, 2**12
    waiting = Waiting()
    with pretend_gpu.visible():
        rows = list(race.run([waiting], [(72, 512)], [1, 17], race.Settings("cuda", 1)))
    assert [(row.failed, row.eager) for row in rows] == [("", False)] * 2 + [("", True)] * 2
    assert not waiting.graphs


@pytest.mark.parametrize("name", ["walk", "walk_without_graphs"])
def test_a_race(name: str) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c",
         f"from tests.bench.test_on_a_gpu import {name}; {name}()"],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_pretends_fails_as_a_gpu_does() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    with pretend_gpu.visible():
        x = torch.ones(3, device="cuda")
        assert (x.device.type, x.cpu().device.type, (x + x).device.type) == ("cuda", "cpu", "cuda")
        with pytest.raises(RuntimeError, match="on the same device"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="to numpy"):
            x.numpy()
        graph, y = torch.cuda.CUDAGraph(), torch.empty(3, device="cuda")
        with torch.cuda.graph(graph):
            y.copy_(x * 2)
        x.fill_(5)
        graph.replay()
        assert y.tolist() == [10, 10, 10]
        with (
            pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
            torch.cuda.graph(graph),
        ):
            x.sum().item()
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.cpu()
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(3, device="cuda")
