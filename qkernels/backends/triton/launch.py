"""Launches kernels, and replays recorded launches without triton's work on the host.

`kernel[grid](...)` costs the host tens of microseconds: triton binds the arguments, derives the
specialization and looks up the compiled kernel. If all arguments except a few addresses stay the
same from call to call, the compiled kernels and their argument lists are kept, and a call only
fills in the addresses.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..device import supports_pdl
from ..plan import Recording, Y, view

#: up to so many rows of x in a block, a program fetches its first PREFETCH_TILES tiles of W before
#: it waits for x: these products are limited by the bytes of W
PREFETCH_ROWS, PREFETCH_TILES = 64, 4


def pdl(device: torch.device) -> dict[str, bool]:
    """Arguments that switch PDL on (triton_kernels/pdl.py), where the device supports it."""
    supported = supports_pdl(device.index if device.type == "cuda" else -1)
    return {"PDL": True, "launch_pdl": True} if supported else {"PDL": False}


@lru_cache(maxsize=16)
def overtakes(arch: int) -> bool:
    """Whether triton may overwrite the registers of a product that is still running.

    A wgmma that reads its first operand from registers is asynchronous, and the decoding of the
    next tile writes those registers. Kernels then have to wait for each product (`Method.wait`).
    triton does this on sm_90 before 3.9 (triton-lang/triton issue 9433); an H200 gave sums off by
    10^18. The cost of the wait there with 3.6: 4-bit products of 4,096 rows took 936 us without it,
    when they were right, and 1,112 us with it.
    """
    triton = importlib.import_module("triton")
    return arch == 90 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def prefetch(block_m: int) -> int:
    """The kernels' argument PREFETCH: tiles of W to fetch before the wait for x."""
    return PREFETCH_TILES if block_m <= PREFETCH_ROWS else 0


class Launch:
    """A kernel with its grid and all its arguments except some tensors.

    kernel: the @triton.jit function.
    fixed: argument -> value, launch options (num_warps, ...) included.
    slots: names of the tensor arguments that each call gives.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int], fixed: dict[str, Any], slots: tuple[str, ...]
    ) -> None:
        self.kernel, self.grid, self.fixed, self.slots = kernel, grid, fixed, slots

    def __call__(self, *tensors: Tensor) -> Any:
        """Start the kernel through triton, on the current stream of the tensors' device.

        triton compiles it if necessary. Returns the compiled kernel; None from the interpreter.
        """
        with torch.cuda.device_of(tensors[0]):
            return self.kernel[self.grid](
                **dict(zip(self.slots, tensors, strict=True)), **self.fixed
            )

    def arguments(self) -> tuple[list[Any], list[int]]:
        """The arguments in the kernel's order, None for the slots, and the index of each slot."""
        names = list(self.kernel.signature.parameters)
        values = [None if name in self.slots else _address(self.fixed[name]) for name in names]
        return values, [names.index(slot) for slot in self.slots]


class Replay:
    """The recorded launches of a call, for operands of the same shapes, dtypes and alignment.

    The device is the same, too.
    """

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
            # The same as triton's own code at the end of `kernel[grid](...)`, in 3.6 to 3.9.
            compiled, (blocks_x, blocks_y) = step.compiled, step.grid
            metadata = None
            if enter is not None:
                metadata = compiled.launch_metadata(step.grid, stream, *arguments)
            compiled.run(
                blocks_x, blocks_y, 1, stream, compiled.function, compiled.packed_metadata,
                metadata, enter, leave, *arguments,
            )  # fmt: skip
        y = tensors[Y]
        assert y is not None
        return y


class _Step:
    """One recorded launch of a kernel, or a transposing copy.

    compiled: the compiled kernel; None if torch or the interpreter runs the step.
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
        places = [recording.place(t.data_ptr()) for t in tensors]
        # Only addresses of the weight are kept, so a kept step does not keep the weight alive.
        self.grid = launch.grid
        self.arguments, slots = launch.arguments()
        #: arguments that change with each call: index of the argument, base, offset
        self.places = [
            (slot, *place) for slot, place in zip(slots, places, strict=True) if place is not None
        ]
        for slot, t, place in zip(slots, tensors, places, strict=True):
            if place is None:
                self.arguments[slot] = t.data_ptr()

    def slowly(self, memory: list[Tensor | None]) -> None:
        """Run the step through torch or the interpreter, on views of the call's memory."""
        tensors = [view(memory, t) for t in self._tensors]
        if self._launch is None:
            tensors[1].copy_(tensors[0].T)
        else:
            self._launch(*tensors)


@lru_cache(maxsize=1)
def _runtime() -> Any:
    """triton's module with the active driver; imported late, because triton may be missing."""
    return importlib.import_module("triton.runtime")


@lru_cache(maxsize=1)
def _knobs() -> Any:
    """triton's module attribute where profilers register their hooks."""
    return importlib.import_module("triton.knobs").runtime


def _hooks() -> tuple[Any, Any]:
    """The profilers' hooks before and after a launch; (None, None) if there are none."""
    knobs = _knobs()
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    # In some versions these are chains of hooks, which may be empty.
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return enter, leave
    return None, None


def _address(value: Any) -> Any:
    """Tensors as addresses: triton's launcher takes both, and need not ask a tensor for its own."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    # Only plain tuples hold tensors: NamedTuples are compile-time arguments.
    return tuple(_address(part) for part in value) if type(value) is tuple else value
