"""Counters of split-K: int32 zeros on a device, which every kernel leaves zero.

A kernel that cuts K into slices counts the finished slices of each block. Its counters are zero
when it starts, and nobody else uses them while it runs. Kernels of one stream run one after
another, so they share counters. A CUDA graph may be replayed on any stream, so it has its own:

    eager calls       a region for each stream
    a captured graph  a region for each stream that the capture runs on

A region is a part of its device's arena, one tensor that is allocated once: when the first weight
comes to a GPU, or at the first call. So no region needs an allocation or a kernel that zeroes it,
and a captured product is its kernels alone. Regions are never given back, because nobody tells when
a graph is gone. If the arena is full, `region` is a new tensor at each call. Within a capture, that
is a memory node of the graph, which zeroes it at each replay.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

#: counters of a device: 4 MiB
ARENA = 2**20
#: the fewest counters of a region. K is cut only where the blocks alone do not fill the GPU, mostly
#: fewer than two for each SM. So this is enough for most weights, and the arena for 4,096 graphs
LEAST = 256
#: what `capture_of` gives if the driver does not tell
UNKNOWN = -1


class _Arena:
    """Zeros, of which the first `used` are in regions."""

    def __init__(self, zeros: Tensor) -> None:
        self.zeros, self.used = zeros, 0


#: the status of a stream's capture, an int in the low half, and the capture's number
_Answer = ctypes.c_uint64 * 2
_lock = threading.Lock()
_arenas: dict[torch.device, _Arena] = {}
#: (device, stream, capture) -> a region and its size
_regions: dict[tuple[torch.device, int, int], tuple[Tensor, int]] = {}


def region(device: torch.device, count: int) -> Tensor:
    """At least `count` counters for kernels that start now, on the device's current stream.

    The result is int32 (count or more) and zero, as soon as the stream's earlier kernels are done.
    """
    stream = stream_of(device)
    key = (device, stream, capture_of(stream) if stream else 0)
    known = _regions.get(key)
    return known[0] if known is not None and known[1] >= count else _new_region(key, count)


def reserve(tensor: Tensor) -> None:
    """Allocate the arena of the GPU that a weight's tensor is on, if there is none yet.

    Not while a graph is captured or traced.
    """
    device = tensor.device
    if device in _arenas or not tensor.is_cuda:
        return
    if isinstance(tensor, FakeTensor) or torch.compiler.is_compiling():
        return
    stream = stream_of(device)
    if not stream or capture_of(stream) == 0:
        _allocate(device)


def stream_of(device: torch.device) -> int:
    """The current stream of a GPU; 0 for the default stream, and for other devices.

    The default stream cannot be captured.
    """
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def capture_of(stream: int) -> int:
    """The number of the capture that a GPU's stream is in: 0 if it is in none, or UNKNOWN.

    No two captures of a process have the same number.
    """
    ask, answer = _capture_info(), _Answer()
    place = ctypes.addressof(answer)
    if ask is None or ask(stream, place, place + 8, None, None, None):
        return UNKNOWN
    status, number = answer
    return (0, number, UNKNOWN)[status]  # CUstreamCaptureStatus: none, active, invalidated


@lru_cache(maxsize=1)
def _capture_info() -> Any:
    """The driver's function that tells about a stream's capture; None without a driver."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p] * 6
    return function


def _new_region(key: tuple[torch.device, int, int], count: int) -> Tensor:
    """A region of `count` counters or more, which `region` finds by `key` from now on."""
    device, _, capture = key
    if capture == 0:
        _allocate(device)
    size = max(LEAST, 1 << (count - 1).bit_length())
    with _lock:
        arena = _arenas.get(device)
        if capture != UNKNOWN and arena is not None and arena.used + size <= arena.zeros.numel():
            zeros = arena.zeros[arena.used : arena.used + size]
            arena.used += size
            _regions[key] = zeros, size
            return zeros
    return torch.zeros(count, dtype=torch.int32, device=device)


def _allocate(device: torch.device) -> None:
    """Allocate the arena of a device, if there is none yet."""
    with _lock:
        if device not in _arenas:
            _arenas[device] = _Arena(_apart(lambda: _zeros(device)))


def _zeros(device: torch.device) -> Tensor:
    zeros = torch.zeros(ARENA, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # every stream may read the zeros now
    return zeros


def _apart(make: Callable[[], Tensor]) -> Tensor:
    """`make()` in a thread of its own.

    Modes and memory pools of torch are set for a thread. So the memory is no FakeTensor, and is not
    in the pool of torch.compile's CUDA graphs, or of weights that a server puts to sleep.
    """
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(make).result()
