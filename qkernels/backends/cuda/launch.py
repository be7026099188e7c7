"""Runs plans of the extension's kernels: a run only writes addresses into the calls.

A plan has the call structs of one product one after another in one buffer. A run copies the buffer,
because several threads may use one weight, and writes addresses and the stream into the copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .. import cuda
from ..device import supports_pdl
from ..plan import Plan, Plans, Product, Symbolic, TorchStep, Y
from .calls import Call

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem
    from ..registry import Run

_WORD = ctypes.sizeof(ctypes.c_uint64)


class Step(NamedTuple):
    """A kernel's launch in a plan: its call struct, and the tensors that the struct points to.

    Addresses of the call's memory are symbolic.
    """

    name: str
    call: Call
    reads: Sequence[Tensor | Symbolic]
    writes: Sequence[Tensor | Symbolic]

    def emulate(self, call: Call, memory: Sequence[Tensor | None]) -> None:
        """Run `call` in the emulator, which checks every access of the kernel."""
        assert cuda.emulator is not None
        reads, writes = (
            [t if isinstance(t, Tensor) else t.within(memory) for t in tensors]
            for tensors in (self.reads, self.writes)
        )
        error = cuda.emulator(self.name, call, reads, writes)
        if error:
            raise RuntimeError(f"qkernels: CUDA kernel {self.name}: {error}")


def start(
    plan: Plan,
    name: str,
    call: Call,
    reads: Sequence[Tensor | Symbolic],
    writes: Sequence[Tensor | Symbolic],
) -> None:
    """Add the launch of kernel `name` to a plan. The caller may change `call` afterwards."""
    plan.steps.append(Step(name, call.copy(), reads, writes))


class Compiled:
    """A plan that runs.

    It keeps the addresses of the weight alone, except for the `perm` that a step of torch reads.
    """

    def __init__(self, plan: Plan) -> None:
        self._index = -1 if plan.device.type == "cpu" else plan.device.index
        self._allocation = plan.allocation()
        #: for each step: the kernel's name, the offset of its call in the buffer, and the step
        #: itself for torch and the emulator
        self._starts: list[tuple[str, int, Any]] = []
        #: each word with an address: index of the word, index of the base address, offset
        self._places: list[tuple[int, int, int]] = []
        #: indices of the words with the stream
        self._streams: list[int] = []
        buffer, later = bytearray(), bytearray()
        #: templates of this plan's calls that were not launched before
        self._templates: list[Call] = []
        for step in plan.steps:
            if isinstance(step, TorchStep):
                self._starts.append(("", 0, step))
                continue
            assert isinstance(step, Step)
            call, word = step.call, len(buffer) // _WORD
            emulated = None if cuda.emulator is None else step
            self._starts.append((step.name, len(buffer), emulated))
            self._streams.append(word + type(call).stream.offset // _WORD)
            for name, kind in call.args._fields_:
                address = getattr(call.args, name) if kind is ctypes.c_void_p else None
                place = None if address is None else plan.place(address)
                if place is not None:
                    self._places.append(
                        (word + getattr(type(call.args), name).offset // _WORD, *place)
                    )
            # With PDL a kernel reads its weight before the last kernel is done. The last kernel may
            # be the one that wrote the weight, so the first call of a weight runs without PDL.
            template = call.template or call
            if not template.launched:
                self._templates.append(template)
            padding = bytes(-ctypes.sizeof(call) % _WORD)
            call.pdl = supports_pdl(self._index)
            later += bytes(call) + padding
            call.pdl &= template.launched
            buffer += bytes(call) + padding
        self._buffer, self._later = bytes(buffer), bytes(later)
        self._words = ctypes.c_uint64 * (len(buffer) // _WORD)

    def run(self, operands: Sequence[Tensor | None], addresses: list[int]) -> list[Any]:
        """As in `plan.Compiled`."""
        tensors, bases = self._allocation.take(operands, addresses)
        words = self._words.from_buffer_copy(self._buffer)
        for word, base, offset in self._places:
            words[word] = bases[base] + offset
        if cuda.emulator is None:
            stream = cuda.stream_of(self._index)
            for word in self._streams:
                words[word] = stream
        address = ctypes.addressof(words)
        for name, first, step in self._starts:
            if step is None:
                cuda.run(name, address + first, self._index)
            elif isinstance(step, TorchStep):
                step.run(tensors)
            else:
                step.emulate(type(step.call).from_buffer(words, first), tensors)
        if self._templates:
            for template in self._templates:
                template.launched = True
            self._buffer, self._templates = self._later, []
        return tensors


#: (plan, weight, problem): declares x @ W^T + bias. The plan's operands are x (M, K) and the bias
#: (N) or None, both contiguous and of x's dtype; the weight is in the kernel's layout.
Declare = Callable[[Plan, "PackedWeight", "Problem"], None]


def product(declare: Declare) -> Product:
    """The product of one weight and problem."""

    def first(
        plans: Plans, operands: tuple[Tensor, Tensor | None], p: PackedWeight, problem: Problem
    ) -> Tensor:
        shape = (operands[0].shape[0], p.shape[0])
        y: Tensor = plans.add(Compiled, lambda plan: declare(plan, p, problem), operands, shape)[Y]
        return y

    return Product(first, cast_bias=True)


def whole(declare: Declare) -> Run:
    """A `registry.Kernel.run` that plans at every call."""

    def run(x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        return product(declare)(x, p, bias, problem)

    return run
