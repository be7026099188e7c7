"""A product's scratch memory and kernel launches: recorded once, then replayed.

A launcher does the same at every call, except that its operands, y and scratch memory have other
addresses. So it runs once with a `Recording`, which notes the kernels it starts and writes down
each of their addresses as (base, offset):

    bases of a call   Y   COUNTERS   SCRATCH   ZEROS   OPERANDS: x, bias
                                     | codes | scale | partial |  parts, one after another

From then on a call allocates y and the scratch memory in one piece each, fills in the addresses,
and starts the kernels.

    Work        the scratch memory and the launches of a call; NOW is the one that records nothing
    Recording   a Work that also notes them
    Replay      the launches of one recording, as each language starts them
    Replays     the recordings of one product, by alignment of the operands
    Recorded    `Replays` as a `registry.Bound`: run, then record, then replay
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
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


class Place(NamedTuple):
    """An address in a call's memory: the base's address plus `offset` bytes."""

    base: int
    offset: int


class Moving(NamedTuple):
    """A tensor whose address changes from call to call."""

    place: Place
    dtype: torch.dtype
    shape: tuple[int, ...]


class Work:
    """Scratch memory and kernel launches of a call.

    Memory comes from torch's allocator, so it is safe on every stream and in CUDA graphs. Kernels
    start at once.
    """

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def counters(self, count: int, device: torch.device) -> Tensor:
        """`counters.region`: int32 zeros (count or more), which the kernels leave zero."""
        return counters.region(device, count)

    def by_torch(self, t: Tensor) -> Tensor:
        """`t`, a tensor that torch computed, so that the call cannot be replayed."""
        return t

    def slices(self, rows: int, row_bytes: int, fixed_bytes: int = 0) -> list[slice]:
        """`workspace.slices`."""
        return list(workspace.slices(rows, row_bytes, fixed_bytes))

    def start(self, launch: Any, *tensors: Tensor) -> None:
        """Call `launch` (of triton/launch.py or cuda/launch.py) with the tensors."""
        launch(*tensors)

    def transposed(self, x: Tensor) -> Tensor:
        """x (M, K) -> (K, M), contiguous."""
        y = self.empty((x.shape[1], x.shape[0]), x.dtype, x.device)
        y.copy_(x.T)
        return y


#: for a call that is not recorded
NOW = Work()


class _Span(NamedTuple):
    """Bytes start..end-1 of memory; place is None for tensors that keep their address."""

    start: int
    end: int
    place: Place | None


class Recording(Work):
    """A `Work` that notes the launches.

    Attributes:
        steps: in order, (launch, its tensors, its result), or (None, (x, its transpose), None).
    """

    def __init__(
        self, operands: Sequence[Tensor | None], y: Tensor, constants: Iterable[Tensor]
    ) -> None:
        """constants: the weight's tensors, which keep their addresses from call to call."""
        self.steps: list[Any] = []
        self._sizes = {SCRATCH: 0, ZEROS: 0}
        self._counters, self._possible, self._y = 0, True, y
        #: all memory of the call, sorted
        self._spans: list[_Span] = []
        #: keeps all that memory alive, so that no address is given out twice during the recording
        self._alive: list[Any] = [operands, y, *constants]
        for t in self._alive[2:]:
            self._add(t, None)
        for i, operand in enumerate(operands):
            if operand is not None:
                self._add(operand, Place(OPERANDS + i, 0))
        self._add(y, Place(Y, 0))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._part(super().empty(shape, dtype, device), SCRATCH)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._part(super().zeros(shape, dtype, device), ZEROS)

    def counters(self, count: int, device: torch.device) -> Tensor:
        t = super().counters(count, device)
        if self._possible:
            self._counters = max(self._counters, count)
            if all(span.start != t.data_ptr() for span in self._spans):
                self._alive.append(t)
                self._add(t, Place(COUNTERS, 0))
        return t

    def start(self, launch: Any, *tensors: Tensor) -> None:
        result = launch(*tensors)
        if self._possible:
            self.steps.append((launch, tensors, result))

    def by_torch(self, t: Tensor) -> Tensor:
        self._give_up()
        return t

    def slices(self, rows: int, row_bytes: int, fixed_bytes: int = 0) -> list[slice]:
        parts = super().slices(rows, row_bytes, fixed_bytes)
        if len(parts) > 1:  # a replay would allocate the scratch memory of all slices at once
            self._give_up()
        return parts

    def transposed(self, x: Tensor) -> Tensor:
        y = super().transposed(x)
        if self._possible:
            self.steps.append((None, (x, y), None))
        return y

    def replayable(self) -> bool:
        """Whether an address alone says which tensor a kernel was given.

        It does not if memory that moves from call to call overlaps other memory.
        """
        return self._possible and not any(
            low.end > high.start and not (low.place is None and high.place is None)
            for low, high in pairwise(self._spans)
        )

    def place(self, address: int) -> Place | None:
        """Where an address lies in a call's memory; None in a tensor that keeps its address.

        ValueError if it is in neither.
        """
        i = bisect_right(self._spans, (address, float("inf"))) - 1
        if i < 0 or address >= self._spans[i].end:
            raise ValueError(f"address {address:#x} is in no memory that a call has")
        start, _, place = self._spans[i]
        if place is None:
            return None
        return Place(place.base, place.offset + address - start)

    def moving(self, t: Tensor) -> Moving | Tensor:
        """How a replay finds `t`; `t` itself if it keeps its address."""
        place = self.place(t.data_ptr())
        return t if place is None else Moving(place, t.dtype, tuple(t.shape))

    def memory(self) -> Memory:
        """What a replay allocates."""
        return Memory(self._y, self._sizes[SCRATCH], self._sizes[ZEROS], self._counters)

    def _give_up(self) -> None:
        """The call cannot be replayed: note nothing more, and keep nothing alive."""
        self._possible = False
        self._alive.clear()

    def _part(self, t: Tensor, base: int) -> Tensor:
        """`t`, noted as the next part of `base`."""
        if not self._possible:
            return t
        offset = -(-self._sizes[base] // _ALIGNMENT) * _ALIGNMENT
        self._sizes[base] = offset + t.numel() * t.element_size()
        self._alive.append(t)
        self._add(t, Place(base, offset))
        return t

    def _add(self, t: Tensor, place: Place | None) -> None:
        if t.numel():
            end = t.data_ptr() + t.numel() * t.element_size()
            self._spans.append(_Span(t.data_ptr(), end, place))
            self._spans.sort(key=lambda span: span[:2])


class Memory:
    """All that a replay allocates: y, and the scratch memory in one piece."""

    def __init__(self, y: Tensor, scratch: int, zeros: int, counters: int) -> None:
        self._shape, self._dtype, self._device = tuple(y.shape), y.dtype, y.device
        self._scratch, self._zeros, self._counters = scratch, zeros, counters

    def take(
        self, operands: tuple[Tensor | None, ...], addresses: list[int]
    ) -> tuple[list[Tensor | None], list[int]]:
        """The bases as tensors, which own the memory, and as addresses.

        A base that the call does not use is None and 0.
        """
        device = self._device
        y = torch.empty(self._shape, dtype=self._dtype, device=device)
        tensors: list[Tensor | None] = [y, None, None, None, *operands]
        bases = [y.data_ptr(), 0, 0, 0, *addresses]
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


def view(memory: list[Tensor | None], tensor: Moving | Tensor) -> Tensor:
    """A tensor of `Recording.moving` in a call's memory, the tensors of `Memory.take`."""
    if isinstance(tensor, Tensor):
        return tensor
    (base, offset), dtype, shape = tensor
    whole = memory[base]
    assert whole is not None
    if base not in (SCRATCH, ZEROS):
        assert offset == 0
        return whole
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return whole[offset : offset + size].view(dtype).view(shape)


class Replay(Protocol):
    """A recording's launches, for operands of the same shapes, dtypes, device and alignment."""

    def __init__(self, recording: Recording, y: Tensor) -> None: ...

    def __call__(self, operands: tuple[Tensor | None, ...], addresses: list[int]) -> Tensor: ...


class Replays:
    """The recordings of one product, for operands of certain shapes, dtypes and device.

    Triton compiles a kernel for the pointers that are divisible by 16, so there is one recording
    for each pattern of those; it is None where a call could not be replayed. The pattern is not
    part of the key of a plan (ops/matmul.py), because addresses are read only here.
    """

    def __init__(self, replay: type[Replay]) -> None:
        self._replay, self._tuned = replay, False
        self._replays: dict[int, Replay | None] = {}

    def replay(self, *operands: Tensor | None) -> Tensor | None:
        """y of these contiguous operands; None if no recording fits them."""
        addresses = [0 if t is None else t.data_ptr() for t in operands]
        together = 0
        for address in addresses:
            together |= address
        replay = self._replays.get(_pattern(addresses) if together & 15 else 0)
        return None if replay is None else replay(operands, addresses)

    def call(
        self,
        operands: tuple[Tensor | None, ...],
        shape: tuple[int, ...],
        constants: Iterable[Tensor],
        run: Callable[[], Tensor],
        compute: Callable[[Tensor, Work], object],
    ) -> Tensor:
        """A call that no recording fits.

        Args:
            operands: x first.
            shape: of y.
            constants: as in `Recording`.
            run: () -> y. The first call is `run`, because it tunes and compiles.
            compute: (y, work). The second call is `compute` into a new y, and is recorded. Operands
                whose second call could not be recorded always take `run`.
        """
        pattern = _pattern([0 if t is None else t.data_ptr() for t in operands])
        if not self._tuned or pattern in self._replays:
            y = run()
            self._tuned = True
            return y
        x = operands[0]
        assert x is not None
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
        recording = Recording(operands, y, constants)
        compute(y, recording)
        self._replays[pattern] = self._replay(recording, y) if recording.replayable() else None
        return y


def _pattern(addresses: list[int]) -> int:
    """Bit i is set if address i is not divisible by 16."""
    pattern = 0
    for i, address in enumerate(addresses):
        pattern |= (address & 15 != 0) << i
    return pattern


#: (x, weight, bias, problem, y, work): writes x @ W^T + bias to y. x (M, K) is contiguous, the
#: weight in the kernel's layout, bias (N) in x's dtype or None, y (M, N) in x's dtype. `work`
#: allocates scratch memory and starts kernels.
Compute = Callable[[Tensor, "PackedWeight", "Tensor | None", "Problem", Tensor, Work], None]


class Recorded(Replays):
    """A product for one weight and problem, a `registry.Bound`.

    Its first call tunes and compiles, the second is recorded, and all later ones are replayed.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        compute: Compute,
        replay: type[Replay],
        cast_bias: bool = False,
    ) -> None:
        """cast_bias: whether the kernels take the bias in x's dtype."""
        super().__init__(replay)
        self._run, self._compute, self._cast_bias = run, compute, cast_bias

    def __call__(self, x: Tensor, p: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        y = self.replay(x, bias)
        if y is not None:
            return y
        bias = self._operand(bias, x)
        return self.call(
            (x, bias), (x.shape[0], p.shape[0]), p.storage.values(),
            lambda: self._run(x, p, bias, problem),
            lambda y, work: self._compute(x, p, bias, problem, y, work),
        )  # fmt: skip

    def replay(self, x: Tensor, bias: Tensor | None) -> Tensor | None:  # type: ignore[override]
        """The product without the weight; None if no recording fits these operands."""
        return Replays.replay(self, x, None if bias is None else self._operand(bias, x))

    def _operand(self, bias: Tensor | None, x: Tensor) -> Tensor | None:
        """The bias as the kernels take it."""
        if bias is None:
            return None
        return (bias.to(x.dtype) if self._cast_bias else bias).contiguous()
