"""Counters of split-K: who shares them, and when they are allocated. On a GPU: tests/gpu."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qkernels as qk
from qkernels import counters
from qkernels.backends import registry
from qkernels.backends.problem import problem_of

from .conftest import DEVICE

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the driver, which tells the stream and the capture that a test sets.

    There are no counters yet.
    """
    state = SimpleNamespace(stream=0, capture=0)
    monkeypatch.setattr(counters, "_arenas", {})
    monkeypatch.setattr(counters, "_regions", {})
    monkeypatch.setattr(counters, "stream_of", lambda device: state.stream)
    monkeypatch.setattr(counters, "capture_of", lambda stream: state.capture)
    return state


def taken(
    state: SimpleNamespace, stream: int, capture: int, count: int = counters.LEAST
) -> torch.Tensor:
    state.stream, state.capture = stream, capture
    region = counters.region(CPU, count)
    assert region.dtype == torch.int32
    assert region.numel() >= count
    assert not region.any()
    return region


def places(*regions: torch.Tensor) -> list[range]:
    """The bytes of each region; regions of the same bytes count once."""
    found = {(r.data_ptr(), r.data_ptr() + 4 * r.numel()) for r in regions}
    return [range(*ends) for ends in sorted(found)]


def never(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise AssertionError("an allocation")


def test_who_shares_counters(gpu: SimpleNamespace) -> None:
    users = [(0, 0), (7, 0), (8, 0), (7, 1), (7, 2), (8, 1)]  # stream, capture
    first = [taken(gpu, *user) for user in users]
    again = [taken(gpu, *user) for user in users]
    apart = places(*first)
    assert len(apart) == len(users)
    assert all(low.stop <= high.start for low, high in pairwise(apart))
    assert places(*first, *again) == apart


def test_a_larger_launch_gets_more(gpu: SimpleNamespace) -> None:
    small, large = taken(gpu, 7, 0, 1), taken(gpu, 7, 0, counters.LEAST + 1)
    assert len(places(small, large)) == 2
    assert small.numel() == counters.LEAST
    assert taken(gpu, 7, 0, 1) is large  # nothing more is used up


def test_a_capture_allocates_nothing(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = taken(gpu, 7, 0)
    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, never)
    for capture in range(1, 100):
        assert len(places(eager, taken(gpu, 7, capture))) == 2


@pytest.mark.parametrize("capture", [3, counters.UNKNOWN])
def test_a_capture_before_any_call(gpu: SimpleNamespace, capture: int) -> None:
    """Its counters are memory of the graph, so nothing else may use them later."""
    assert len(places(taken(gpu, 7, capture), taken(gpu, 7, capture))) == 2
    assert not counters._arenas
    assert not counters._regions


def test_unknown_captures_share_nothing(gpu: SimpleNamespace) -> None:
    regions = [taken(gpu, 7, capture) for capture in (0, counters.UNKNOWN, counters.UNKNOWN)]
    assert len(places(*regions)) == 3


@pytest.mark.parametrize("capture", [0, 2])
def test_a_full_arena(gpu: SimpleNamespace, capture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "ARENA", 3 * counters.LEAST)
    shared = [taken(gpu, stream, 0) for stream in (1, 2)]
    large = taken(gpu, 3, capture, 2 * counters.LEAST)  # there is room for half of it
    last = taken(gpu, 4, capture)
    fresh = [taken(gpu, 5, capture) for _ in range(2)]
    assert len(places(*shared, large, last, *fresh)) == 6
    assert taken(gpu, 1, 0) is shared[0]
    assert taken(gpu, 4, capture) is last


def test_modes_of_the_caller_do_not_reach_the_arena(gpu: SimpleNamespace) -> None:
    """torch.compile's memory pool is set for a thread, too, but there is none without a GPU."""
    with FakeTensorMode(), torch.inference_mode():
        counters._allocate(CPU)
    zeros = counters._arenas[CPU].zeros
    assert type(zeros) is torch.Tensor
    assert not zeros.is_inference()


@pytest.mark.parametrize(
    ("status", "error", "want"),
    [(0, 0, 0), (1, 0, 2**40 + 5), (2, 0, counters.UNKNOWN), (1, 201, counters.UNKNOWN)],
)
def test_what_the_driver_tells(
    status: int, error: int, want: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 6)

    def info(stream: int, at: int, number_at: int, *rest: None) -> int:
        assert (stream, rest) == (2**40 + 8, (None, None, None))
        ctypes.c_int.from_address(at).value = status
        if status:
            ctypes.c_uint64.from_address(number_at).value = 2**40 + 5
        return error

    function = kind(info)
    monkeypatch.setattr(counters, "_capture_info", lambda: function)
    assert counters.capture_of(2**40 + 8) == want


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert counters._capture_info.__wrapped__() is None
    monkeypatch.setattr(counters, "_capture_info", lambda: None)
    assert counters.capture_of(8) == counters.UNKNOWN


@pytest.mark.parametrize(
    "case", [("gptq", {"bits": 4, "group_size": 64}), ("int8", {}), ("w8a8", {})], ids=str
)
@pytest.mark.parametrize("full", [False, True])
def test_products_are_replayed_with_counters(
    case: tuple[str, dict[str, Any]], full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each call has new counters: a replay finds them, and they are zero."""
    pytest.importorskip("triton")
    monkeypatch.setattr(counters, "_arenas", {})
    monkeypatch.setattr(counters, "_regions", {})
    if full:
        monkeypatch.setattr(counters, "ARENA", 0)
    counts: list[int] = []
    real = counters.region

    def region(device: torch.device, count: int) -> torch.Tensor:
        counts.append(count)
        return real(device, count)

    monkeypatch.setattr(counters, "region", region)
    p = qk.quantize(torch.randn(200, 2048), case[0], **case[1]).to(DEVICE)
    most = []  # counters that each call asks for
    for call in range(4):
        x = 3 * torch.randn(2, 2048).half().to(DEVICE)
        counts.clear()
        y = qk.matmul(x, p, backend="triton")
        asked = list(counts)
        most.append(max(asked, default=0))
        problem = problem_of(p, 2, x.dtype, x.device)
        want = registry.select(problem, "triton").run(x, p, None, problem)
        assert torch.equal(y, want), f"call {call}"
    assert most == [most[0]] * 4
    assert most[0] > 0, "no split-K"
    assert len(asked) == 1, "that was no replay"
    assert bool(counters._regions) is not full


# ---------------------------------------------------------------------- on a pretended GPU
def reserved() -> None:
    """The first weight on a GPU brings the counters there, and no later one allocates any."""
    from . import pretend_gpu

    p = qk.quantize(torch.randn(16, 128), "awq", group_size=64)
    experts = qk.quantize_experts(torch.randn(2, 16, 128), "awq", group_size=64)
    moves = (
        lambda: p.to("cuda"),
        lambda: qk.quantize(torch.randn(16, 128, device="cuda"), "awq", group_size=64),
        lambda: experts.to("cuda"),
        lambda: qk.QuantLinear(p).to("cuda").packed,
    )
    for move in moves:
        with pretend_gpu.visible(), mock.patch.object(counters, "_zeros", wraps=_zeros) as made:
            p.prepack_("weight_only")
            assert made.call_count == 0
            move()
            made.assert_called_once_with(pretend_gpu.CUDA)
            for again in moves:
                again()
            assert made.call_count == 1


_zeros = counters._zeros


def captured() -> None:
    """Two graphs of one weight have their own counters, which no step of theirs zeroes."""
    from . import pretend_gpu

    for backend, name, params in (
        ("triton", "gptq", {"bits": 4, "group_size": 64}),
        ("triton", "w8a8", {}),
        ("cuda", "w8a8", {}),
        ("cuda", "gptq", {"bits": 4, "group_size": 64}),
    ):
        with pretend_gpu.visible():
            layer = qk.QuantLinear(qk.quantize(torch.randn(40, 2048), name, **params))
            layer = layer.to("cuda")
            layer.backend = backend
            x = torch.randn(1, 2048).half().to("cuda")
            layer(x)
            used = counters._arenas[pretend_gpu.CUDA].used
            assert used > 0, "no split-K"
            graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
            results = []
            for graph in graphs:
                with torch.cuda.graph(graph), mock.patch.object(torch, "zeros", never):
                    results.append(layer(x))
            assert counters._arenas[pretend_gpu.CUDA].used == 3 * used
            assert len(places(*(r for r, _ in counters._regions.values()))) == 3
            x.copy_(torch.randn(1, 2048).half())
            want = layer(x).held
            for graph, y in zip(graphs, results, strict=True):
                others = [
                    region.held
                    for (_, _, capture), (region, _) in counters._regions.items()
                    if capture != graph.number
                ]
                for region in others:
                    region.fill_(99)
                y.held.fill_(float("nan"))
                graph.replay()
                assert torch.equal(y.held, want)
                for region in others:
                    assert bool((region == 99).all())
                    region.zero_()


@pytest.mark.parametrize("name", ["reserved", "captured"])
def test_on_a_pretended_gpu(name: str) -> None:
    """In a process of its own, because caches about a GPU must not outlive the test."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from tests.test_counters import {name}; {name}()"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
