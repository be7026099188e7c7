"""Launches a kernel again and again without asking triton each time what its arguments mean.

`kernel[grid](...)` costs the host tens of microseconds: it binds 40 arguments, derives the specialization
and looks the compiled kernel up by it. Where all but a few tensors stay the same from call to call, the
compiled kernel and its list of arguments can be kept, and a call only puts the addresses in.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class Launch:
    """A kernel with its grid and all its arguments but some tensors.

    kernel: the @triton.jit function. fixed: argument -> value, launch options (num_warps, ...) too; tensors
    in it must stay alive and in place, which holding them here sees to. slots: the arguments that calls
    give, tensors of the same dtypes at every call.

    The compiled kernel depends on which pointers are divisible by 16, so one is kept a pattern of that.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int], fixed: dict[str, Any], slots: tuple[str, ...]
    ) -> None:
        self.kernel, self.grid, self.fixed, self.slots = kernel, grid, fixed, slots
        #: pattern of alignment -> compiled kernel, and its arguments once they are needed
        self._ready: dict[int, tuple[Any, list[Any] | None]] = {}
        self._places: list[int] = []

    def __call__(self, *tensors: Tensor) -> None:
        """Start the kernel on the current stream of the tensors' device."""
        pointers = [t.data_ptr() for t in tensors]
        together = pattern = 0
        for pointer in pointers:
            together |= pointer
        if together & 15:
            pattern = sum((pointer & 15 != 0) << place for place, pointer in enumerate(pointers))
        compiled, arguments = self._ready.get(pattern, (None, None))
        if compiled is None:
            self._first(pattern, tensors)
            return
        active, index = _runtime().driver.active, tensors[0].get_device()
        current = active.get_current_device()
        if index not in (-1, current):  # triton launches on the current device, whatever its arguments say
            with torch.cuda.device(index):
                self(*tensors)
            return
        arguments = self._arguments(pattern, compiled) if arguments is None else arguments.copy()
        for place, pointer in zip(self._places, pointers):  # noqa: B905  # a keyword costs here
            arguments[place] = pointer
        _start(compiled, self.grid, active.get_current_stream(current), arguments)

    def _first(self, pattern: int, tensors: tuple[Tensor, ...]) -> None:
        """Through triton, which compiles if need be; keeps what it compiled."""
        with torch.cuda.device_of(tensors[0]):
            compiled = self.kernel[self.grid](**dict(zip(self.slots, tensors, strict=True)), **self.fixed)
        if compiled is not None:  # the interpreter has nothing to keep
            self._ready[pattern] = (compiled, None)

    def _arguments(self, pattern: int, compiled: Any) -> list[Any]:
        """In the kernel's order, with holes for the slots."""
        names = list(self.kernel.signature.parameters)
        self._places = [names.index(slot) for slot in self.slots]
        found = [None if name in self.slots else _address(self.fixed[name]) for name in names]
        self._ready[pattern] = (compiled, found)
        return found.copy()


@lru_cache(maxsize=1)
def _runtime() -> Any:
    """triton's module with the active driver; imported late, for triton may not be there."""
    return importlib.import_module("triton.runtime")


@lru_cache(maxsize=1)
def _hooks() -> Any:
    """Where profilers put theirs."""
    return importlib.import_module("triton.knobs").runtime


def _start(compiled: Any, grid: tuple[int, int], stream: int, arguments: list[Any]) -> None:
    """What triton does at the end of `kernel[grid](...)`, in 3.6 to 3.9. Hooks are a profiler's."""
    hooks = _hooks()
    enter, leave, metadata = hooks.launch_enter_hook, hooks.launch_exit_hook, None
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        metadata = compiled.launch_metadata(grid, stream, *arguments)
    else:
        enter = leave = None
    compiled.run(
        grid[0], grid[1], 1, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave,
        *arguments,
    )  # fmt: skip


def _address(value: Any) -> Any:
    """Tensors as addresses, which the launcher takes as well and need not ask for."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(_address(part) for part in value) if isinstance(value, tuple) else value
