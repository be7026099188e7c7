"""Runs plans of the extension's kernels: a run only writes addresses into the calls.

A plan has the call structs of one product one after another in one buffer. A run copies the buffer,
because several threads may use one weight, and writes addresses and the stream into the copy.

With PDL a kernel reads its weight before the kernels before it are done. One of them may be writing
the weight: a checkpoint's loading, an update of a model that is being trained, a merge of LoRA. So
the first launch on a stream after a change runs without PDL, and waits for all kernels before it.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import counters
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
            raise _failure(self.name, error)


def start(
    plan: Plan,
    name: str,
    call: Call,
    reads: Sequence[Tensor | Symbolic],
    writes: Sequence[Tensor | Symbolic],
) -> None:
    """Add the launch of kernel `name` to a plan. The caller may change `call` afterwards."""
    plan.steps.append(Step(name, call.copy(), reads, writes))


class Changes:
    """What torch counts of changes in place of a weight's tensors. It keeps no tensor alive.

    Torch counts every operator that writes a tensor, under any name of it but `.data`; in inference
    tensors it counts nothing.

    Attributes:
        twins, counts: `counts(twins)` is equal to an earlier result if torch has counted no change
            since. It is one call of C code, because every call of a product asks.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        twins = [_twin(t) for t in {id(t): t for t in tensors}.values() if not t.is_inference()]
        names = [f"tensor{i}" for i in range(len(twins))]
        self.twins = SimpleNamespace(**dict(zip(names, twins, strict=True)))
        self.counts: Callable[[Any], Any] = (
            attrgetter(*(f"{name}._version" for name in names)) if names else _no_count
        )


def _no_count(_: Any) -> None:
    pass


def _twin(tensor: Tensor) -> Tensor:
    """An empty tensor whose changes torch counts together with those of `tensor`."""
    with torch.inference_mode(False):
        twin = tensor.detach()
        twin.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return twin


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
        #: each word with an address: index of the word, index of the base address, offset. And each
        #: with the stream, which is the last base.
        self._places: list[tuple[int, int, int]] = []
        buffer, with_pdl = array("Q"), array("Q")
        weight: list[Tensor] = []
        for step in plan.steps:
            if isinstance(step, TorchStep):
                self._starts.append(("", 0, step))
                continue
            assert isinstance(step, Step)
            call, word = step.call, len(buffer)
            emulated = None if cuda.emulator is None else step
            self._starts.append((step.name, word * _WORD, emulated))
            self._places.append((word + type(call).stream.offset // _WORD, -1, 0))
            for name, kind in call.args._fields_:
                address = getattr(call.args, name) if kind is ctypes.c_void_p else None
                place = None if address is None else plan.place(address)
                if place is not None:
                    self._places.append(
                        (word + getattr(type(call.args), name).offset // _WORD, *place)
                    )
            weight += _given(call, step.reads)
            for words, pdl in ((buffer, False), (with_pdl, supports_pdl(self._index))):
                call.pdl = pdl
                words.frombytes(bytes(call) + bytes(-ctypes.sizeof(call) % _WORD))
        self._buffer, self._with_pdl = buffer, with_pdl
        changes = Changes(weight)
        self._twins, self._counts = changes.twins, changes.counts
        #: stream -> counts of changes at the last launch there, if that had to wait
        self._seen: dict[int, Any] = {}

    def run(self, operands: Sequence[Tensor | None], addresses: list[int]) -> list[Any]:
        """As in `plan.Compiled`.

        Raises:
            RuntimeError: a kernel does not start; with CUDA's message.
        """
        stream = 0
        start: Any = None
        if cuda.emulator is None:
            if cuda.current_device() != self._index:  # the GPU that kernels start on
                with torch.cuda.device(self._index):
                    return self.run(operands, addresses)
            stream, start = cuda.stream_of(self._index), cuda.build.extension().run
        tensors, bases = self._allocation.take(operands, addresses)
        bases.append(stream)
        counts = self._counts(self._twins)
        is_new = self._seen.get(stream) != counts
        words = (self._after_change(stream, counts) if is_new else self._with_pdl)[:]
        for word, base, offset in self._places:
            words[word] = bases[base] + offset
        address = words.buffer_info()[0]
        for name, first, step in self._starts:
            if step is None:
                if error := start(name, address + first):
                    raise _failure(name, error)
            elif isinstance(step, TorchStep):
                step.run(tensors)
            else:
                step.emulate(type(step.call).from_buffer(words, first), tensors)
        if is_new and not _captures(stream):  # not before: other threads may use the stream
            self._seen[stream] = counts
        return tensors

    def _after_change(self, stream: int, counts: Any) -> array[int]:
        """The calls after a change, or on a new stream.

        While a graph is captured, an earlier launch may have waited for the last change. That is
        enough, because a graph as a whole waits for what was launched before it.
        """
        waited = counts in self._seen.values() and _captures(stream)
        return self._with_pdl if waited else self._buffer


def _given(call: Call, reads: Iterable[Tensor | Symbolic]) -> list[Tensor]:
    """The tensors of the weight that the kernel is given, of those that it may read."""
    pointers = [
        getattr(call.args, name) or 0
        for name, kind in call.args._fields_
        if kind is ctypes.c_void_p
    ]
    return [
        t
        for t in reads
        if isinstance(t, Tensor) and any(0 <= p - t.data_ptr() < t.nbytes for p in pointers)
    ]


def _failure(name: str, error: str) -> RuntimeError:
    return RuntimeError(f"qkernels: CUDA kernel {name}: {error}")


def _captures(stream: int) -> bool:
    """Whether launches on the stream only become a part of a graph."""
    return stream != 0 and counters.capture_of(stream) != 0


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
