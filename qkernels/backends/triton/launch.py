"""Runs plans of Triton kernels, from the second time on without triton's work on the host.

`kernel[grid](...)` costs the host tens of microseconds: triton binds the arguments, derives the
specialization and looks up the compiled kernel. All arguments except a few addresses stay the same
from call to call. So the compiled kernels and their argument lists are kept, and a call only fills
in the addresses.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device import supports_pdl
from ..plan import OPERANDS, Plan, Symbolic, TorchStep

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


class Step(NamedTuple):
    """A kernel's launch in a plan: all its arguments, launch options (num_warps, ...) included.

    Tensors of the call among the arguments are symbolic.
    """

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]

    def run(self, memory: Sequence[Tensor | None]) -> Any:
        """Start the kernel through triton, on the current stream of the tensors' device.

        triton compiles it if necessary. Returns the compiled kernel; None from the interpreter.
        """
        arguments = {
            name: value.within(memory) if isinstance(value, Symbolic) else value
            for name, value in self.arguments.items()
        }
        with torch.cuda.device_of(memory[OPERANDS]):
            return self.kernel[self.grid](**arguments)


def start(plan: Plan, kernel: Any, grid: tuple[int, int], arguments: dict[str, Any]) -> None:
    """Add the launch of a @triton.jit function to a plan."""
    plan.steps.append(Step(kernel, grid, {**arguments, **pdl(plan.device)}))


class Compiled:
    """A plan that runs, for operands of the same shapes, dtypes, device and alignment.

    Its first run goes through triton, which compiles the kernels. From then on it starts the
    compiled kernels, and keeps only the addresses of the weight.
    """

    def __init__(self, plan: Plan) -> None:
        self._index = -1 if plan.device.type == "cpu" else plan.device.index
        self._allocation = plan.allocation()
        #: the steps until they are compiled: the interpreter never compiles
        self._steps: list[Any] | None = plan.steps
        self._launches: list[_Launch] = []

    def run(self, operands: Sequence[Tensor | None], addresses: list[int]) -> list[Any]:
        """As in `plan.Compiled`."""
        steps = self._steps
        if steps is not None:
            return self._first(steps, operands, addresses)
        active = _runtime().driver.active
        current = active.get_current_device()
        if self._index not in (-1, current):  # triton launches on the current device
            with torch.cuda.device(self._index):
                return self.run(operands, addresses)
        stream = active.get_current_stream(current)
        enter, leave = _hooks()
        tensors, bases = self._allocation.take(operands, addresses)
        for launch in self._launches:
            if launch.compiled is None:
                launch.step.run(tensors)
                continue
            arguments = launch.arguments.copy()
            for place, base, offset in launch.places:
                arguments[place] = bases[base] + offset
            # The same as triton's own code at the end of `kernel[grid](...)`, in 3.6 to 3.9.
            compiled, (blocks_x, blocks_y) = launch.compiled, launch.grid
            metadata = None
            if enter is not None:
                metadata = compiled.launch_metadata(launch.grid, stream, *arguments)
            compiled.run(
                blocks_x, blocks_y, 1, stream, compiled.function, compiled.packed_metadata,
                metadata, enter, leave, *arguments,
            )  # fmt: skip
        return tensors

    def _first(
        self, steps: list[Any], operands: Sequence[Tensor | None], addresses: list[int]
    ) -> list[Any]:
        """`run` through triton."""
        tensors, _ = self._allocation.take(operands, addresses)
        launches = [_Launch(step, step.run(tensors)) for step in steps]
        if all(one.compiled is not None or isinstance(one.step, TorchStep) for one in launches):
            self._launches = launches
            self._steps = None  # last, because another thread may be in `run`
        return tensors


class _Launch:
    """A step as later runs start it.

    compiled: the compiled kernel; None for a step of torch, and from the interpreter.
    """

    def __init__(self, step: Any, compiled: Any) -> None:
        self.compiled = compiled
        if compiled is None:
            self.step = step
            return
        # Only addresses of the weight are kept, so a kept step does not keep the weight alive.
        self.grid = step.grid
        values = [step.arguments[name] for name in step.kernel.signature.parameters]
        self.arguments = [_address(value) for value in values]
        #: arguments that change with each call: index of the argument, base, offset
        self.places = [
            (i, value.base, value.offset)
            for i, value in enumerate(values)
            if isinstance(value, Symbolic)
        ]


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
