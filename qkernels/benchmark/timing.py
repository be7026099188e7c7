"""Times calls on the GPU: in CUDA graphs, with weights outside the L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
#: Bytes that do not fit the L2 cache. The copies of a weight that take turns have at least this
#: size, and a buffer of this size is written to flush the cache.
COLD_BYTES = 256 * 2**20
#: largest number of calls in a chain, because tiny weights would need thousands
MAX_CHAIN = 64


class Time(NamedTuple):
    """A time in microseconds: the median, and the distance between the quartiles."""

    median: float
    spread: float


def of_samples(samples: Sequence[float]) -> Time:
    ordered = sorted(samples)
    return Time(
        statistics.median(ordered), ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]
    )


def copies_for(weight_bytes: int, device: str) -> int:
    """Number of copies of a weight that take turns, so that no copy is still in the L2 cache."""
    return 1 if device == "cpu" else min(MAX_CHAIN, max(2, -(-COLD_BYTES // weight_bytes)))


def graph_of(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All calls, one after another, as one CUDA graph. Each runs once before the capture."""
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
    """Time of one of `calls` that follow each other, as a model's layers do.

    graphs: replay the calls from a CUDA graph. Otherwise the host launches them, and the time is
    the host's where the host is slower.
    """
    if device == "cpu":
        return _on_cpu(calls[0], repeats)
    start_all = _starter(calls, graphs)
    start_all()
    return of_samples([_seconds(start_all) * 1e6 / len(calls) for _ in range(repeats)])


def alone(call: Call, device: str, repeats: int, graphs: bool = True) -> Time:
    """Time of a single call, with a cold L2 cache."""
    if device == "cpu":
        return _on_cpu(call, repeats)
    start = _starter([call], graphs)
    flush = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)
    samples = []
    for _ in range(repeats):
        flush.zero_()
        samples.append(_seconds(start) * 1e6)
    return of_samples(samples)


def _starter(calls: Sequence[Call], graphs: bool) -> Call:
    """A function that launches all of `calls`; each has run once before."""
    if graphs:
        return graph_of(calls).replay

    def start_all() -> None:
        for call in calls:
            call()

    start_all()
    return start_all


def _seconds(call: Call) -> float:
    """Seconds of a call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
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
    """GB/s of a kernel that reads and writes a large tensor once; None without a GPU.

    The kernel is not `copy_`: on an H200 `copy_` moved 4.2 TB/s, as kernels do, but only 2.8 TB/s
    in a CUDA graph, in which everything is timed.
    """
    if device == "cpu":
        return None
    source = torch.ones(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    time_of_copy = chain([lambda: torch.neg(source, out=target)] * 4, device, 10)
    return 2 * source.nbytes / time_of_copy.median / 1e3
