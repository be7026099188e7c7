"""Times calls on the GPU: in CUDA graphs, with weights that are not in the L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
#: weights of this many bytes take turns, and this many bytes are written to empty the L2 cache
COLD_BYTES = 256 * 2**20
#: calls of one chain at most: tiny weights would need thousands
MAX_CHAIN = 64


class Time(NamedTuple):
    """Microseconds: median, and the distance between the quartiles."""

    median: float
    spread: float


def of_samples(samples: Sequence[float]) -> Time:
    ordered = sorted(samples)
    return Time(
        statistics.median(ordered), ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]
    )


def copies_for(weight_bytes: int, device: str) -> int:
    """How many copies of a weight must take turns so that each call finds its own outside the L2
    cache.
    """
    return 1 if device == "cpu" else min(MAX_CHAIN, max(2, -(-COLD_BYTES // weight_bytes)))


def graph_of(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All calls, one after another, as one CUDA graph; each has run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def chain(calls: Sequence[Call], device: str, repeats: int, graphs: bool = True) -> Time:
    """One call out of `calls` that follow each other, as a model's layers do.

    graphs: replayed from a CUDA graph; without, started by the host, whose time is in it if it is
    the slower.
    """
    if device == "cpu":
        return _on_cpu(calls[0], repeats)
    run = _started(calls, graphs)
    run()
    return of_samples([_seconds(run) * 1e6 / len(calls) for _ in range(repeats)])


def alone(call: Call, device: str, repeats: int, graphs: bool = True) -> Time:
    """A call that nothing precedes, from a cold L2 cache."""
    if device == "cpu":
        return _on_cpu(call, repeats)
    run = _started([call], graphs)
    flush = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)
    samples = []
    for _ in range(repeats):
        flush.zero_()
        samples.append(_seconds(run) * 1e6)
    return of_samples(samples)


def _started(calls: Sequence[Call], graphs: bool) -> Call:
    """Starts all of `calls`."""
    if graphs:
        return graph_of(calls).replay

    def run() -> None:
        for call in calls:
            call()

    run()
    return run


def _seconds(run: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _on_cpu(call: Call, repeats: int) -> Time:
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return of_samples(samples)


def copy_bandwidth(device: str) -> float | None:
    """GB/s that a kernel moves which reads and writes a large tensor once; None without a GPU.

    Not `copy_`: on an H200 that moved 4.2 TB/s as kernels do, but in a CUDA graph, where all is
    timed, 2.8.
    """
    if device == "cpu":
        return None
    source = torch.ones(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    found = chain([lambda: torch.neg(source, out=target)] * 4, device, 10)
    return 2 * source.nbytes / found.median / 1e3
