"""What a product takes from the host: scratch memory, and kernels started. Recorded once, it is
only replayed.

A launcher does the same at every call but for where its operands, y and scratch memory lie. So it
runs once with a `Recording`, which notes the kernels it starts and each address they are given as
(base, offset):

    bases of a call   Y   COUNTERS   SCRATCH   ZEROS   OPERANDS: x, bias
                                     | codes | scale | partial |  parts, one after another

From then on a call allocates y and the scratch memory in one piece each, puts the addresses in, and
starts the kernels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import workspace

if TYPE_CHECKING:
    from ..weights.packed import PackedWeight
    from .problem import Problem

Y, COUNTERS, SCRATCH, ZEROS, OPERANDS = range(5)
#: parts of the scratch memory begin at multiples of this, as torch's own allocations do
_ALIGNMENT = 512


class Place(NamedTuple):
    """An address of a call: that of a base, plus bytes."""

    base: int
    offset: int


class Moving(NamedTuple):
    """A tensor of a call."""

    place: Place
    dtype: torch.dtype
    shape: tuple[int, ...]


class Work:
    """Scratch memory from torch's allocator, safe on every stream and in graphs; kernels started at
    once.
    """

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def made(self, t: Tensor) -> Tensor:
        """`t`, which has come from an operation of torch's, or is computed in pieces: none of it
        can be replayed.
        """
        return t

    def slices(self, rows: int, row_bytes: int, held: int = 0) -> list[slice]:
        """`workspace.slices`."""
        return list(workspace.slices(rows, row_bytes, held))

    def start(self, launch: Any, *tensors: Tensor) -> None:
        """`launch` is called with the tensors: triton/launch.py, cuda/launch.py."""
        launch(*tensors)

    def transposed(self, x: Tensor) -> Tensor:
        """x (M, K) -> (K, M), contiguous."""
        y = self.empty((x.shape[1], x.shape[0]), x.dtype, x.device)
        y.copy_(x.T)
        return y


#: for who records nothing
NOW = Work()


class Recording(Work):
    """Notes what is done, too.

    steps: in order, (launch, its tensors, what it returned), or (None, (x, its transpose), None).
    """

    def __init__(
        self, operands: Sequence[Tensor | None], y: Tensor, kept: Iterable[Tensor]
    ) -> None:
        """kept: tensors that stay alive and in place from call to call: the weight's."""
        self.steps: list[Any] = []
        self._sizes = {SCRATCH: 0, ZEROS: 0}
        self._counts, self._possible, self._y = False, True, y
        #: all memory there is, so that none is used twice while this runs: start, end, place or
        #: None if kept
        self._spans: list[tuple[int, int, Place | None]] = []
        self._held: list[Any] = [operands, y, *kept]
        for t in self._held[2:]:
            self._add(t, None)
        for i, operand in enumerate(operands):
            if operand is not None:
                self._add(operand, Place(OPERANDS + i, 0))
        self._add(y, Place(Y, 0))
        self._add(workspace.counters(y.device), Place(COUNTERS, 0))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._part(super().empty(shape, dtype, device), SCRATCH)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._part(super().zeros(shape, dtype, device), ZEROS)

    def start(self, launch: Any, *tensors: Tensor) -> None:
        found = launch(*tensors)
        if self._possible:
            self.steps.append((launch, tensors, found))

    def made(self, t: Tensor) -> Tensor:
        self._possible = False
        self._held.clear()  # nothing more is noted
        return t

    def slices(self, rows: int, row_bytes: int, held: int = 0) -> list[slice]:
        found = super().slices(rows, row_bytes, held)
        if len(found) > 1:  # they would all have memory of their own
            self.made(self._y)
        return found

    def transposed(self, x: Tensor) -> Tensor:
        y = super().transposed(x)
        if self._possible:
            self.steps.append((None, (x, y), None))
        return y

    def replayable(self) -> bool:
        """Whether addresses tell all: not if memory that moves from call to call overlaps other
        memory.
        """
        return self._possible and not any(
            a[1] > b[0] and not (a[2] is None and b[2] is None) for a, b in pairwise(self._spans)
        )

    def place(self, address: int) -> Place | None:
        """Where in a call's memory that is; None if it is kept memory. ValueError if it is neither."""
        at = bisect_right(self._spans, (address, float("inf"))) - 1
        if at < 0 or address >= self._spans[at][1]:
            raise ValueError(f"address {address:#x} is in no memory that a call has")
        start, _, place = self._spans[at]
        if place is None:
            return None
        if place.base == COUNTERS:
            self._counts = True
        return Place(place.base, place.offset + address - start)

    def moving(self, t: Tensor) -> Moving | Tensor:
        """`t` as a call has it: itself if it is kept."""
        place = self.place(t.data_ptr())
        return t if place is None else Moving(place, t.dtype, tuple(t.shape))

    def memory(self) -> Memory:
        """What a call allocates; of what has been placed."""
        return Memory(self._y, self._sizes[SCRATCH], self._sizes[ZEROS], self._counts)

    def _part(self, t: Tensor, base: int) -> Tensor:
        if not self._possible:
            return t
        offset = -(-self._sizes[base] // _ALIGNMENT) * _ALIGNMENT
        self._sizes[base] = offset + t.numel() * t.element_size()
        self._held.append(t)
        self._add(t, Place(base, offset))
        return t

    def _add(self, t: Tensor, place: Place | None) -> None:
        if t.numel():
            self._spans.append((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), place))
            self._spans.sort(key=lambda span: span[:2])


class Memory:
    """All that a call allocates: y, and its scratch memory in one piece."""

    def __init__(self, y: Tensor, scratch: int, zeros: int, counts: bool) -> None:
        self._shape, self._dtype, self._device = tuple(y.shape), y.dtype, y.device
        self._scratch, self._zeros, self._counts = scratch, zeros, counts

    def take(
        self, operands: tuple[Tensor | None, ...], addresses: list[int]
    ) -> tuple[list[Tensor | None], list[int]]:
        """The bases as tensors, which hold the memory, and as addresses. What there is none of is
        not used.
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
        if self._counts:
            tensors[COUNTERS] = counters = workspace.counters(device)
            bases[COUNTERS] = counters.data_ptr()
        return tensors, bases


def view(memory: list[Tensor | None], wanted: Moving | Tensor) -> Tensor:
    """That tensor, of a call with these bases."""
    if isinstance(wanted, Tensor):
        return wanted
    (base, offset), dtype, shape = wanted
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
    """What a recording has noted, for operands of the same shapes, dtypes, device and alignment."""

    def __init__(self, recording: Recording, y: Tensor) -> None: ...

    def __call__(self, operands: tuple[Tensor | None, ...], addresses: list[int]) -> Tensor: ...


class Replays:
    """Recordings of what is done with some weight, for operands of certain shapes, dtypes and
    device.

    Kernels depend on which pointers are divisible by 16: there is one recording a pattern of that,
    or None where it could not be replayed.
    """

    def __init__(self, replay: type[Replay]) -> None:
        self._replay, self._tuned = replay, False
        self._replays: dict[int, Replay | None] = {}

    def replay(self, *operands: Tensor | None) -> Tensor | None:
        """y of these operands, contiguous; None if there is no recording of such."""
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
        kept: Iterable[Tensor],
        run: Callable[[], Tensor],
        compute: Callable[[Tensor, Work], object],
    ) -> Tensor:
        """A call that cannot be replayed. The first is `run`, which tunes and compiles; the second,
        `compute` into a new y of `shape`, is recorded; operands whose second call could not be are
        always run. kept: as in `Recording`."""
        pattern = _pattern([0 if t is None else t.data_ptr() for t in operands])
        if not self._tuned or pattern in self._replays:
            y = run()
            self._tuned = True
            return y
        x = operands[0]
        assert x is not None
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
        recording = Recording(operands, y, kept)
        compute(y, recording)
        self._replays[pattern] = self._replay(recording, y) if recording.replayable() else None
        return y


def _pattern(addresses: list[int]) -> int:
    """Which of them are not divisible by 16."""
    pattern = 0
    for i, address in enumerate(addresses):
        pattern |= (address & 15 != 0) << i
    return pattern


#: (x, weight, bias, problem, y, work): a product into y, with scratch memory and kernel starts by
#: `work`
Compute = Callable[[Tensor, "PackedWeight", "Tensor | None", "Problem", Tensor, Work], None]


class Recorded(Replays):
    """A product for one weight and problem: its first call tunes and compiles, the second is
    recorded, the others are replayed.

    cast_bias: kernels want it in x's dtype.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        compute: Compute,
        replay: type[Replay],
        cast_bias: bool = False,
    ) -> None:
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
        """The product without the weight; None if there is no recording of such operands."""
        return Replays.replay(self, x, None if bias is None else self._operand(bias, x))

    def _operand(self, bias: Tensor | None, x: Tensor) -> Tensor | None:
        if bias is None:
            return None
        return (bias.to(x.dtype) if self._cast_bias else bias).contiguous()
