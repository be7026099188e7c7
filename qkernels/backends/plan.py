"""What a product allocates and launches: declared once, run at every call.

A launcher does the same at every call, except that its operands, y and scratch memory have other
addresses. So it runs once, on symbolic tensors: it takes scratch memory from a `Plan` and adds
steps to it. A symbolic tensor has a shape, a dtype and a device, but no memory: it is (base,
offset).

    bases of a call   Y   COUNTERS   SCRATCH   ZEROS   OPERANDS: x, bias
                                     | codes | scale | partial |  parts, one after another

A call allocates y and the scratch memory in one piece each, fills in the addresses, and starts the
kernels. That is the `Compiled` of each language, in triton/launch.py and cuda/launch.py.

    Symbolic    a tensor of a plan
    Plan        scratch memory and steps
    Allocation  what a call allocates
    Plans       the plans of one product, by alignment of the operands
    Product     `Plans` as a `registry.Bound`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import counters
from . import workspace

if TYPE_CHECKING:
    from ..weights.packed import PackedWeight
    from .problem import Problem

Y, COUNTERS, SCRATCH, ZEROS, OPERANDS = range(5)
#: parts of the scratch memory begin at multiples of this, as torch's own allocations do
_ALIGNMENT = 512
#: marks addresses of symbolic tensors: base << _BASE_BIT, and the offset. That is room for 2^15
#: bases: a fused product has two for each weight
_SYMBOLIC, _BASE_BIT = 1 << 63, 48


@dataclass(frozen=True, slots=True)
class Symbolic:
    """A contiguous tensor of a plan: `offset` bytes after the address of `base` at each call.

    Its methods are those of a tensor. low: the last four bits of the base's address.
    """

    base: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    low: int = 0

    @property
    def nbytes(self) -> int:
        return self.numel() * self.dtype.itemsize

    def numel(self) -> int:
        return math.prod(self.shape)

    def data_ptr(self) -> int:
        """What stands for the address in a CUDA call, where `Plan.place` finds it.

        It equals the address modulo 16.
        """
        return _SYMBOLIC | self.base << _BASE_BIT | self.offset + self.low

    def view(self, *shape: Any) -> Symbolic:
        """As another shape, in which one size may be -1, or as another dtype of the same size."""
        if isinstance(shape[0], torch.dtype):
            return replace(self, dtype=shape[0])
        known = -math.prod(shape)
        return replace(self, shape=tuple(self.numel() // known if n < 0 else n for n in shape))

    def __getitem__(self, rows: slice) -> Symbolic:
        """Rows start..stop-1, as in torch."""
        first, stop, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(
            self, offset=self.offset + first * row, shape=(stop - first, *self.shape[1:])
        )

    def within(self, memory: Sequence[Tensor | None]) -> Tensor:
        """The tensor of one call. memory: its bases."""
        whole = memory[self.base]
        assert whole is not None
        if (self.offset, self.dtype, self.shape) == (0, whole.dtype, whole.shape):
            return whole
        bytes_ = whole.view(-1).view(torch.uint8)[self.offset : self.offset + self.nbytes]
        return bytes_.view(self.dtype).view(self.shape)


class TorchStep(NamedTuple):
    """A function that computes by torch, on tensors of the plan."""

    function: Callable[..., object]
    tensors: tuple[Symbolic | Tensor, ...]

    def run(self, memory: Sequence[Tensor | None]) -> None:
        """Call it on the tensors of one call. memory: the call's bases."""
        self.function(*(t if isinstance(t, Tensor) else t.within(memory) for t in self.tensors))


class Plan:
    """What a product allocates and launches.

    A launcher declares it once, on symbolic tensors: it takes scratch memory from the plan and adds
    steps to it. Nothing is allocated or started before the plan runs.

    Attributes:
        operands: the call's operands, None for those it does not have.
        y: the output, or None.
        steps: in order: the language's `Step` for a kernel, and `TorchStep`.
    """

    def __init__(
        self, operands: Sequence[Tensor | None], shape: tuple[int, ...] | None = None
    ) -> None:
        """operands: of one call, x first. shape: of y, which has x's dtype; None for no y."""
        x = operands[0]
        assert x is not None
        self.device = x.device
        self.operands: list[Any] = [
            None
            if t is None
            else Symbolic(OPERANDS + i, 0, tuple(t.shape), t.dtype, t.device, low=t.data_ptr() & 15)
            for i, t in enumerate(operands)
        ]
        self.y: Any = None if shape is None else Symbolic(Y, 0, shape, x.dtype, x.device)
        self.steps: list[Any] = []
        self._now = self._most = _Sizes()
        self._counters = 0

    @property
    def used(self) -> int:
        """Bytes of scratch memory in use at this point of the plan, of the workspace.BYTES."""
        return self._now.limited

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, limited: bool = True
    ) -> Symbolic:
        """The next part of the scratch memory. limited: whether it counts for workspace.BYTES."""
        part = Symbolic(SCRATCH, self._now.scratch, shape, dtype, self.device)
        return self._add(part, _Sizes(scratch=part.nbytes, limited=part.nbytes * limited))

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Symbolic:
        """The next part of the scratch memory that is zero when a call starts.

        Not again where it is reused: a slice of rows leaves its zeros to the next slice.
        """
        part = Symbolic(ZEROS, self._now.zeros, shape, dtype, self.device)
        return self._add(part, _Sizes(zeros=part.nbytes, limited=part.nbytes))

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Scratch memory that is taken in this context is free again after it."""
        now = self._now
        yield
        self._now = now

    def counters(self, count: int) -> Symbolic:
        """`counters.region`: int32 zeros, which every launch leaves zero."""
        self._counters = max(self._counters, count)
        return Symbolic(COUNTERS, 0, (count,), torch.int32, self.device)

    def by_torch(self, function: Callable[..., object], *tensors: Symbolic | Tensor) -> None:
        """Add a step that calls `function(*tensors)`, which computes by torch."""
        self.steps.append(TorchStep(function, tensors))

    def by_rows(
        self,
        declare: Callable[..., None],
        *tensors: Symbolic | None,
        before_slices: Callable[[], Any] | None = None,
    ) -> None:
        """`declare(*tensors)`; if that needs more than workspace.BYTES, slices of their rows.

        The slices use the same scratch memory, one after another. before_slices: declares what all
        slices need. `declare` is given its result as `shared`, and no `shared` for whole rows.
        """
        steps, now, most = len(self.steps), self._now, self._most
        rows, fixed = self.operands[0].shape[0], now.limited
        with self.reused():
            declare(*tensors)
        excess = self._most.limited - workspace.BYTES
        row_bytes = -(-(self._most.limited - fixed) // rows)
        parts = [slice(0, rows)]
        # What slices need is not quite proportional to their rows.
        while excess > 0 and len(parts) < rows:
            del self.steps[steps:]
            self._now, self._most = now, most
            shared = {} if before_slices is None else {"shared": before_slices()}
            parts = list(workspace.slices(rows, row_bytes, fixed))
            for part in parts:
                with self.reused():
                    declare(*(None if t is None else t[part] for t in tensors), **shared)
            excess = self._most.limited - workspace.BYTES
            fixed += excess

    def place(self, address: int) -> tuple[int, int] | None:
        """(base, offset) of a symbolic tensor's `data_ptr`; None for other addresses."""
        if address < _SYMBOLIC:
            return None
        base, offset = divmod(address - _SYMBOLIC, 1 << _BASE_BIT)
        return base, offset - (self.operands[base - OPERANDS].low if base >= OPERANDS else 0)

    def allocation(self) -> Allocation:
        """What a call allocates."""
        return Allocation(self.device, self.y, self._most, self._counters)

    def _add(self, part: Symbolic, size: _Sizes) -> Symbolic:
        self._now = _Sizes(
            *(n + -(-s // _ALIGNMENT) * _ALIGNMENT for n, s in zip(self._now, size, strict=True))
        )
        self._most = _Sizes(*map(max, self._most, self._now))
        return part


class _Sizes(NamedTuple):
    """Bytes of scratch memory, by base, and those of them that count for workspace.BYTES."""

    scratch: int = 0
    zeros: int = 0
    limited: int = 0


class Allocation:
    """What a call allocates: y, and the scratch memory in one piece."""

    def __init__(
        self, device: torch.device, y: Symbolic | None, sizes: _Sizes, counters: int
    ) -> None:
        self._device, self._y = device, y
        self._scratch, self._zeros, self._counters = sizes.scratch, sizes.zeros, counters

    def take(
        self, operands: Sequence[Tensor | None], addresses: list[int]
    ) -> tuple[list[Tensor | None], list[int]]:
        """The bases as tensors, which own the memory, and as addresses.

        A base that the call does not use is None and 0.
        """
        device = self._device
        tensors: list[Tensor | None] = [None, None, None, None, *operands]
        bases = [0, 0, 0, 0, *addresses]
        if self._y is not None:
            tensors[Y] = y = torch.empty(self._y.shape, dtype=self._y.dtype, device=device)
            bases[Y] = y.data_ptr()
        if self._scratch:
            tensors[SCRATCH] = scratch = torch.empty(
                self._scratch, dtype=torch.uint8, device=device
            )
            bases[SCRATCH] = scratch.data_ptr()
        if self._zeros:
            tensors[ZEROS] = zeros = torch.zeros(self._zeros, dtype=torch.uint8, device=device)
            bases[ZEROS] = zeros.data_ptr()
        if self._counters:
            tensors[COUNTERS] = region = counters.region(device, self._counters)
            bases[COUNTERS] = region.data_ptr()
        return tensors, bases


class Compiled(Protocol):
    """A plan that runs, for operands of the same shapes, dtypes, device and alignment."""

    def __init__(self, plan: Plan) -> None: ...

    def run(self, operands: Sequence[Tensor | None], addresses: list[int]) -> list[Any]:
        """Allocate and start everything. Returns the tensors of the call's memory, by base."""


class Plans:
    """The plans of one product, for operands of certain shapes, dtypes and device.

    There is one for each alignment of the operands, because kernels are compiled for the pointers
    that are divisible by 16. The alignment is not part of the key of a plan in ops/matmul.py,
    because addresses are read only here.
    """

    def __init__(self) -> None:
        self._plans: dict[int, Compiled] = {}

    def start(self, *operands: Tensor | None) -> list[Any] | None:
        """Run the plan of these contiguous operands; None if there is none yet.

        Returns the tensors of the call's memory, by base.
        """
        addresses = addresses_of(operands)
        together = 0
        for address in addresses:
            together |= address
        plan = self._plans.get(_alignment(addresses) if together & 15 else 0)
        return None if plan is None else plan.run(operands, addresses)

    def add(
        self,
        compiled: Callable[[Plan], Compiled],
        declare: Callable[[Plan], None],
        operands: Sequence[Tensor | None],
        shape: tuple[int, ...] | None = None,
    ) -> list[Any]:
        """Declare a plan, run it, and keep it for operands of this alignment.

        compiled: the language's `Compiled`. shape: of y, as in `Plan`. Returns what `start` does.
        """
        plan = Plan(operands, shape)
        declare(plan)
        runs = compiled(plan)
        memory = runs.run(operands, addresses_of(operands))
        self.keep(operands, runs)
        return memory

    def keep(self, operands: Sequence[Tensor | None], plan: Compiled) -> None:
        """Run operands of this alignment by `plan` from now on."""
        self._plans[_alignment(addresses_of(operands))] = plan


def addresses_of(operands: Sequence[Tensor | None]) -> list[int]:
    """The operands' addresses; 0 for None."""
    return [0 if t is None else t.data_ptr() for t in operands]


def _alignment(addresses: Sequence[int]) -> int:
    """The last four bits of each address."""
    return sum((address & 15) << 4 * i for i, address in enumerate(addresses))


class Product(Plans):
    """A product for one weight and problem, a `registry.Bound`. It does not keep the weight alive.

    first: (plans, (x, bias), weight, problem) -> y of the first call with operands of an alignment;
        it keeps the plan of later calls in `plans`.
    cast_bias: whether the kernels take the bias in x's dtype.
    """

    def __init__(self, first: Callable[..., Tensor], cast_bias: bool = False) -> None:
        super().__init__()
        self._first, self._cast_bias = first, cast_bias

    def __call__(self, x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        y = self.run(x, bias)
        if y is not None:
            return y
        if not x.shape[0]:
            return x.new_empty(0, p.shape[0])
        return self._first(self, (x, self._operand(bias, x)), p, problem)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The product without the weight; None if there is no plan for these operands yet."""
        memory = self.start(x, None if bias is None else self._operand(bias, x))
        return None if memory is None else memory[Y]

    def _operand(self, bias: Tensor | None, x: Tensor) -> Tensor | None:
        """The bias as the kernels take it."""
        if bias is None:
            return None
        return (bias.to(x.dtype) if self._cast_bias else bias).contiguous()
