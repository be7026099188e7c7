"""Starts the extension's kernels: once, or in replays that only write new addresses into the calls.

A recording has the call structs of one product one after another in one buffer. A replay copies the
buffer, because several threads may use one weight, and writes addresses and the stream into the
copy.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import cuda
from ..device import supports_pdl
from ..plan import NOW, Compute, Recording, Work, Y, view
from .calls import Call

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem
    from ..registry import Run

_WORD = ctypes.sizeof(ctypes.c_uint64)


class Launch:
    """A kernel with its call struct. It is called with the tensors that the struct points to.

    reads: the number of tensors that the kernel reads; it writes the tensors after them.
    """

    def __init__(self, name: str, call: Call, reads: int) -> None:
        self.name, self.call, self.reads = name, call, reads
        self.call_bytes = bytes(call)

    def __call__(self, *tensors: Tensor) -> None:
        if cuda.emulator is not None:
            self.emulate(self.call, list(tensors))
            return
        call, index = self.call, tensors[0].get_device()
        call.stream = cuda.stream_of(index)
        # With PDL a kernel reads its weight before the last kernel is done. The last kernel may be
        # the one that wrote the weight, so the first call of a weight runs without PDL.
        template = call.template or call
        call.pdl = int(template.launched and supports_pdl(index))
        template.launched = True
        cuda.run(self.name, ctypes.addressof(call), index)

    def emulate(self, call: Call, tensors: list[Tensor]) -> None:
        """Run in the emulator, which checks every access of the kernel."""
        assert cuda.emulator is not None
        error = cuda.emulator(self.name, call, tensors[: self.reads], tensors[self.reads :])
        if error:
            raise RuntimeError(f"qkernels: CUDA kernel {self.name}: {error}")


def start(
    name: str, call: Call, reads: list[Tensor], writes: list[Tensor], work: Work = NOW
) -> None:
    """Start kernel `name`. The caller may change `call` afterwards."""
    work.start(Launch(name, call, len(reads)), *reads, *writes)


def whole(compute: Compute) -> Run:
    """A `run` that calls `compute` with a new y, and with the bias cast to x's dtype."""

    def run(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        y = torch.empty(x.shape[0], p.shape[0], dtype=x.dtype, device=x.device)
        compute(x, p, None if bias is None else bias.to(x.dtype).contiguous(), problem, y, NOW)
        return y

    return run


class Replay:
    """Replays a recording, for operands of the same shapes, dtypes, device and alignment."""

    def __init__(self, recording: Recording, y: Tensor) -> None:
        self._index = y.get_device()
        #: for each call: its launch, its offset in the buffer, and its tensors for the emulator
        self._starts: list[tuple[Launch, int, list[Any]]] = []
        #: each word with an address: index of the word, index of the base address, offset
        self._places: list[tuple[int, int, int]] = []
        #: indices of the words with the stream
        self._streams: list[int] = []
        buffer = bytearray()
        for launch, tensors, _ in recording.steps:
            call = type(launch.call).from_buffer_copy(launch.call_bytes)
            # A recording is not the weight's first call, so it may use PDL: see `Launch`.
            call.pdl = supports_pdl(self._index)
            word = len(buffer) // _WORD
            emulated = [recording.moving(t) for t in tensors] if cuda.emulator is not None else []
            self._starts.append((launch, len(buffer), emulated))
            self._streams.append(word + type(call).stream.offset // _WORD)
            for name, kind in call.args._fields_:
                address = getattr(call.args, name) if kind is ctypes.c_void_p else None
                place = None if address is None else recording.place(address)
                if place is not None:
                    self._places.append(
                        (word + getattr(type(call.args), name).offset // _WORD, *place)
                    )
            buffer += bytes(call) + bytes(-ctypes.sizeof(call) % _WORD)
        self._buffer, self._words = bytes(buffer), ctypes.c_uint64 * (len(buffer) // _WORD)
        self._memory = recording.memory()

    def __call__(self, operands: tuple[Tensor | None, ...], addresses: list[int]) -> Tensor:
        tensors, bases = self._memory.take(operands, addresses)
        y = tensors[Y]
        assert y is not None
        words = self._words.from_buffer_copy(self._buffer)
        for word, base, offset in self._places:
            words[word] = bases[base] + offset
        if cuda.emulator is not None:
            for launch, first, emulated in self._starts:
                call = type(launch.call).from_buffer(words, first)
                launch.emulate(call, [view(tensors, t) for t in emulated])
            return y
        stream = cuda.stream_of(self._index)
        for word in self._streams:
            words[word] = stream
        address = ctypes.addressof(words)
        for launch, first, _ in self._starts:
            cuda.run(launch.name, address + first, self._index)
        return y
