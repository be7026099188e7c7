"""Starts the extension's kernels: once, or again and again with nothing but addresses put in.

The calls of one product lie one after another in one piece of memory. To start them again it is
copied, for several threads may use one weight, and addresses and the stream are written into the
copy.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import cuda
from ..plan import NOW, Compute, Recording, Work, Y, view
from .calls import Call

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem
    from ..registry import Run

_WORD = ctypes.sizeof(ctypes.c_uint64)


class Launch:
    """A kernel with its call struct. reads, writes: the tensors whose addresses are in it."""

    def __init__(self, name: str, call: Call, reads: int) -> None:
        self.name, self.call, self.reads = name, call, reads
        self.kept = bytes(call)

    def __call__(self, *tensors: Tensor) -> None:
        if cuda.emulator is not None:
            self.emulate(self.call, list(tensors))
            return
        call, index = self.call, tensors[0].get_device()
        call.stream = cuda.stream_of(index)
        # A kernel that starts early reads its weight before the kernel before it is done. That one
        # may just have written the weight, so the first call of a weight does not start early.
        kept = call.kept or call
        call.pdl = int(kept.launched and cuda.supports_pdl(index))
        kept.launched = True
        cuda.run(self.name, ctypes.addressof(call), index)

    def emulate(self, call: Call, tensors: list[Tensor]) -> None:
        """In the emulator, which minds what the kernel touches."""
        assert cuda.emulator is not None
        error = cuda.emulator(self.name, call, tensors[: self.reads], tensors[self.reads :])
        if error:
            raise RuntimeError(f"qkernels: CUDA kernel {self.name}: {error}")


def start(
    name: str, call: Call, reads: list[Tensor], writes: list[Tensor], work: Work = NOW
) -> None:
    """Start kernel `name`. `call` may change afterwards."""
    work.start(Launch(name, call, len(reads)), *reads, *writes)


def whole(compute: Compute) -> Run:
    """`compute` into a new y, with a bias in x's dtype: one of another is cast at each call, N
    values.
    """

    def run(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        y = torch.empty(x.shape[0], p.shape[0], dtype=x.dtype, device=x.device)
        compute(x, p, None if bias is None else bias.to(x.dtype).contiguous(), problem, y, NOW)
        return y

    return run


class Replay:
    """What a recording has noted, for operands of the same shapes, dtypes, device and alignment."""

    def __init__(self, recording: Recording, y: Tensor) -> None:
        self._index = y.get_device()
        #: of each call its launch, where it begins, and for the emulator its tensors
        self._starts: list[tuple[Launch, int, list[Any]]] = []
        #: words with an address: index, base, offset; and those with the stream
        self._places: list[tuple[int, int, int]] = []
        self._streams: list[int] = []
        kept = bytearray()
        for launch, tensors, _ in recording.steps:
            call = type(launch.call).from_buffer_copy(launch.kept)
            # A recording is not the weight's first call, so its kernels may start early: see
            # `Launch`.
            call.pdl = cuda.supports_pdl(self._index)
            word = len(kept) // _WORD
            emulated = [recording.moving(t) for t in tensors] if cuda.emulator is not None else []
            self._starts.append((launch, len(kept), emulated))
            self._streams.append(word + type(call).stream.offset // _WORD)
            for name, kind in call.args._fields_:
                address = getattr(call.args, name) if kind is ctypes.c_void_p else None
                place = None if address is None else recording.place(address)
                if place is not None:
                    self._places.append(
                        (word + getattr(type(call.args), name).offset // _WORD, *place)
                    )
            kept += bytes(call) + bytes(-ctypes.sizeof(call) % _WORD)
        self._kept, self._words = bytes(kept), ctypes.c_uint64 * (len(kept) // _WORD)
        self._memory = recording.memory()

    def __call__(self, operands: tuple[Tensor | None, ...], addresses: list[int]) -> Tensor:
        tensors, bases = self._memory.take(operands, addresses)
        y = tensors[Y]
        assert y is not None
        words = self._words.from_buffer_copy(self._kept)
        for word, base, offset in self._places:
            words[word] = bases[base] + offset
        if cuda.emulator is not None:
            for launch, first, wanted in self._starts:
                call = type(launch.call).from_buffer(words, first)
                launch.emulate(call, [view(tensors, t) for t in wanted])
            return y
        stream = cuda.stream_of(self._index)
        for word in self._streams:
            words[word] = stream
        address = ctypes.addressof(words)
        for launch, first, _ in self._starts:
            cuda.run(launch.name, address + first, self._index)
        return y
