"""Launches kernels, and launches them again without asking triton each time what their arguments
mean.

`kernel[grid](...)` costs the host tens of microseconds: it binds 40 arguments, derives the
specialization and looks the compiled kernel up by it. Where all but a few addresses stay the same
from call to call, the compiled kernels and their lists of arguments are kept, and a call only puts
the addresses in.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..plan import Recording, Y, view

#: rows of x up to which a program fetches its first PREFETCH_TILES of weights before it waits for
#: x: where the
#: weights' bytes are what a product waits for
PREFETCH_ROWS, PREFETCH_TILES = 64, 4


@lru_cache(maxsize=64)
def pdl(device: torch.device) -> dict[str, bool]:
    """Arguments with which a kernel starts before the one before it is done, where GPUs can
    (triton_kernels/pdl.py).

    QKERNELS_PDL=0 in the environment turns that off.
    """
    if device.type != "cuda" or os.environ.get("QKERNELS_PDL", "1") == "0":
        return {"PDL": False}
    capable = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if capable else {"PDL": False}


@lru_cache(maxsize=16)
def overtakes(arch: int) -> bool:
    """Whether triton leaves a product that reads its first operand from registers under way while
    the decoding of the next tile writes those, so that kernels have to wait for it (their WAIT).

    It does on sm_90 until 3.9 (triton-lang/triton issue 9433); an H200 gave sums off by 10^18. What
    it costs there with 3.6: 4-bit products of 4,096 rows took 936 us without the wait, when they
    were right, and 1,112 with it.
    """
    triton = importlib.import_module("triton")
    return arch == 90 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def prefetch(block_m: int) -> int:
    """The kernels' PREFETCH."""
    return PREFETCH_TILES if block_m <= PREFETCH_ROWS else 0


class Launch:
    """A kernel with its grid and all its arguments but some tensors.

    kernel: the @triton.jit function. fixed: argument -> value, launch options (num_warps, ...) too.
    slots: the arguments that calls give.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int], fixed: dict[str, Any], slots: tuple[str, ...]
    ) -> None:
        self.kernel, self.grid, self.fixed, self.slots = kernel, grid, fixed, slots

    def __call__(self, *tensors: Tensor) -> Any:
        """Start the kernel through triton, on the current stream of the tensors' device, compiling
        it if need be. Returns the compiled kernel; None from the interpreter."""
        with torch.cuda.device_of(tensors[0]):
            return self.kernel[self.grid](
                **dict(zip(self.slots, tensors, strict=True)), **self.fixed
            )

    def arguments(self) -> tuple[list[Any], list[int]]:
        """In the kernel's order, with holes for the slots, and where those are."""
        names = list(self.kernel.signature.parameters)
        found = [None if name in self.slots else _address(self.fixed[name]) for name in names]
        return found, [names.index(slot) for slot in self.slots]


class Replay:
    """What a recording has noted, for operands of the same shapes, dtypes, device and alignment."""

    def __init__(self, recording: Recording, y: Tensor) -> None:
        self._index = y.get_device()
        self._steps = [_Step(recording, *step) for step in recording.steps]
        self._compiled = any(step.compiled is not None for step in self._steps)
        self._memory = recording.memory()

    def __call__(self, operands: tuple[Tensor | None, ...], addresses: list[int]) -> Tensor:
        stream, enter, leave = 0, None, None
        if self._compiled:
            active = _runtime().driver.active
            current = active.get_current_device()
            if self._index not in (-1, current):  # triton launches on the current device
                with torch.cuda.device(self._index):
                    return self(operands, addresses)
            stream = active.get_current_stream(current)
            enter, leave = _hooks()
        tensors, bases = self._memory.take(operands, addresses)
        for step in self._steps:
            if step.compiled is None:
                step.slowly(tensors)
                continue
            arguments = step.arguments.copy()
            for place, base, offset in step.places:
                arguments[place] = bases[base] + offset
            # What triton does at the end of `kernel[grid](...)`, in 3.6 to 3.9.
            compiled, (blocks_x, blocks_y) = step.compiled, step.grid
            metadata = None
            if enter is not None:
                metadata = compiled.launch_metadata(step.grid, stream, *arguments)
            compiled.run(
                blocks_x, blocks_y, 1, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave,
                *arguments,
            )  # fmt: skip
        y = tensors[Y]
        assert y is not None
        return y


class _Step:
    """One kernel, or a transposing copy. compiled: None where it is started through torch or the
    interpreter.
    """

    def __init__(
        self,
        recording: Recording,
        launch: Launch | None,
        tensors: tuple[Tensor, ...],
        compiled: Any,
    ) -> None:
        self.compiled = compiled
        if compiled is None:
            self._launch, self._tensors = launch, [recording.moving(t) for t in tensors]
            return
        assert launch is not None
        found = [recording.place(t.data_ptr()) for t in tensors]
        # Of the weight only addresses are kept: whoever keeps this need not keep the weight alive.
        self.grid = launch.grid
        self.arguments, holes = launch.arguments()
        #: index of the argument, base, offset
        self.places = [
            (hole, *place) for hole, place in zip(holes, found, strict=True) if place is not None
        ]
        for hole, t, place in zip(holes, tensors, found, strict=True):
            if place is None:
                self.arguments[hole] = t.data_ptr()

    def slowly(self, memory: list[Tensor | None]) -> None:
        """With tensors, views of a call's memory."""
        tensors = [view(memory, t) for t in self._tensors]
        if self._launch is None:
            tensors[1].copy_(tensors[0].T)
        else:
            self._launch(*tensors)


@lru_cache(maxsize=1)
def _runtime() -> Any:
    """triton's module with the active driver; imported late, for triton may not be there."""
    return importlib.import_module("triton.runtime")


@lru_cache(maxsize=1)
def _knobs() -> Any:
    """Where profilers put their hooks."""
    return importlib.import_module("triton.knobs").runtime


def _hooks() -> tuple[Any, Any]:
    """Those before and after a launch, None where nobody has put one there."""
    knobs = _knobs()
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    # Of some versions these are chains of hooks, which may be empty.
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return enter, leave
    return None, None


def _address(value: Any) -> Any:
    """Tensors as addresses, which the launcher takes as well and need not ask for."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(_address(part) for part in value) if isinstance(value, tuple) else value
