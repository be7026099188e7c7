"""Count the instructions that a warp issues in one pass of a kernel's main loop.

The length of a loop's text counts both sides of every branch. Here one way through the loop is
counted, that of a full tile: of all ways from the loop's head back to it,

1. those with most tensor-core instructions, because a tile that is multiplied has them all;
2. of these, those with most wide loads (16 bytes a lane, or bulk), because a tile that is not the
   last one loads the next;
3. of these the longest one. So the count is an upper bound.

Ways that the kernel's arguments rule out are left out (constants.py).

An instruction that a predicate switches off takes its slot, so it counts. A loop inside the way
counts for one trip: waits, which repeat only when data is late, and copies that are not unrolled.
A subroutine counts with its body, by the same rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from . import assembly, constants
from .assembly import Program

#: loads that move 16 bytes a lane, or whole lines
_WIDE = re.compile(r"(LDG|LDGSTS)\.(?:\w+\.)*128|UBLKCP|UTMALDG")
#: jumps to addresses that only a register knows
_INDIRECT = ("BRX", "JMX")


class Pass(NamedTuple):
    """What a warp issues in one pass of a loop, in the order in which ways are compared."""

    tensor: int = 0
    wide_loads: int = 0
    instructions: int = 0

    def and_then(self, other: Pass) -> Pass:
        return Pass(*map(sum, zip(self, other, strict=True)))


def main_pass(program: Program, known: dict[int, int] | None = None) -> Pass:
    """One pass of the main loop (`assembly.main_loop`).

    known: arguments, as `constants.feasible` takes them.

    Raises:
        ValueError: there is no loop, or its jumps cannot be followed.
    """
    body = assembly.main_body(program)
    if not body:
        raise ValueError("program: expected a loop, got none")
    return _Graph(program, known or {}).loop(body)


def per_weight(
    program: Program, mma_per_tile: int, weights: float, known: dict[int, int] | None = None
) -> float:
    """Instructions of a lane per weight that it decodes, in the main loop.

    mma_per_tile: tensor-core instructions of a warp for one tile. weights: weights of a tile that a
    warp has, divided by its 32 lanes. The loop may have several copies of the code for a tile; the
    tensor-core instructions tell how many. known: as in `main_pass`.

    Raises:
        ValueError: as `main_pass`, or the loop has no whole number of tiles.
    """
    one = main_pass(program, known)
    tiles, rest = divmod(one.tensor, mma_per_tile)
    if rest or not tiles:
        raise ValueError(
            f"mma_per_tile: expected a divisor of the loop's {one.tensor} tensor-core "
            f"instructions, got {mma_per_tile}"
        )
    return one.instructions / (tiles * weights)


class _Graph:
    """A program's basic blocks, with what each issues."""

    def __init__(self, program: Program, known: dict[int, int]) -> None:
        self.code = program.instructions
        self.blocks, _ = assembly.basic_blocks(program)
        self.following = constants.feasible(program, known)
        self.dominators = assembly.dominators_of(self.following)
        self.calls: dict[int, int] = {}  # block that ends with a call -> first block of the body
        at = {block.start: number for number, block in enumerate(self.blocks)}
        for number, block in enumerate(self.blocks):
            last = self.code[block[-1]]
            if last.name == "CALL" and last.target in program.labels:
                first = at[program.labels[last.target]]
                if any(self._returns(b) for b in self._reached(first)):
                    self.calls[number] = first
                    self.following[number] = [b for b in self.following[number] if b != first]

    def loop(self, body: set[int]) -> Pass:
        """One pass of a natural loop, given the indices of its instructions."""
        inside = {b for b in self.dominators if self.blocks[b].start in body}
        (head,) = (b for b in inside if all(b in self.dominators[other] for other in inside))
        return self._best(head, inside, lambda b: head in self._after(b, inside))

    def _returns(self, block: int) -> bool:
        return self.code[self.blocks[block][-1]].name == "RET"

    def _reached(self, first: int) -> set[int]:
        reached, waiting = {first}, [first]
        while waiting:
            after = set(self.following[waiting.pop()]) - reached
            reached |= after
            waiting += after
        return reached

    def _after(self, block: int, inside: set[int]) -> set[int]:
        """The blocks of `inside` after a block.

        A jump back inside of the loop becomes one to where the loop ends, so each has one trip.
        """
        after, done, waiting = set(), {block}, list(self.following[block])
        while waiting:
            b = waiting.pop()
            if b in self.dominators[block] and b in inside and not self._is_first(b, inside):
                if b not in done:
                    done.add(b)
                    waiting += self._exits(b)
            elif b in inside:
                after.add(b)
        return after

    def _is_first(self, block: int, inside: set[int]) -> bool:
        return all(block in self.dominators[other] for other in inside)

    def _exits(self, head: int) -> list[int]:
        """The blocks to which jumps lead from the loop of this head."""
        body, waiting = {head}, [b for b in self.dominators if head in self.following[b]]
        while waiting:
            b = waiting.pop()
            if b not in body and head in self.dominators[b]:
                body.add(b)
                waiting += [p for p in self.dominators if b in self.following[p]]
        return [after for b in body for after in self.following[b] if after not in body]

    def _best(self, first: int, inside: set[int], is_end: Callable[[int], bool]) -> Pass:
        """The way from `first` to an end that comes first by the module's rule."""
        after = {b: self._after(b, inside) - {first} for b in inside}
        before = {b: sum(b in following for following in after.values()) for b in inside}
        best: dict[int, Pass] = {first: self._issued(first)}
        waiting, ends = [b for b in inside if not before[b]], []
        visited = 0
        while waiting:
            b = waiting.pop()
            visited += 1
            if b in best and is_end(b):
                ends.append(best[b])
            for other in after[b]:
                if b in best:
                    way = best[b].and_then(self._issued(other))
                    best[other] = max(best.get(other, way), way)
                before[other] -= 1
                if not before[other]:
                    waiting.append(other)
        if visited < len(inside) or not ends:
            raise ValueError("program: expected loops with one entry each, got others")
        return max(ends)

    def _issued(self, block: int) -> Pass:
        """What a block issues, with the subroutine that it calls."""
        total = Pass()
        for i in self.blocks[block]:
            instruction = self.code[i]
            if instruction.name in _INDIRECT:
                raise ValueError(f"program: expected jumps to labels, got {instruction.opcode}")
            wide = bool(_WIDE.match(instruction.opcode))
            total = total.and_then(Pass(int(assembly.is_tensor(instruction)), int(wide), 1))
        if block in self.calls:
            first = self.calls[block]
            total = total.and_then(self._best(first, self._reached(first), self._returns))
        return total
