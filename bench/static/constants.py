"""Follow values that are known before a kernel runs through its SASS, and so find dead branches.

One compiled kernel may serve several formats: its arguments say which, and its branches on them go
one way in a whole launch. With the arguments given, a conditional constant propagation (Wegman and
Zadeck, "Constant propagation with conditional branches", TOPLAS 1991) tells which edges of the
control-flow graph can be taken. Only moves, loads of arguments, sums, comparisons and logic are
computed. Any other instruction makes its result unknown, which keeps more edges, never fewer.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from itertools import product

from .assembly import Instruction, Program, basic_blocks

#: (architecture, whether a tensor map is among the arguments, which aligns them) -> address of a
#: kernel's first argument in constant bank 0
FIRST_ARGUMENT = {(90, False): 0x210, (90, True): 0x280}

#: register or predicate -> its value, for those that are known
State = dict[str, int]
_NAME = re.compile(r"(U?R|U?P)(\d+)")
_CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
_LITERAL = re.compile(r"-?0x[0-9a-f]+")
_MASK = 0xFFFFFFFF
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "EQ": operator.eq, "NE": operator.ne, "LT": operator.lt, "LE": operator.le,
    "GT": operator.gt, "GE": operator.ge,
}  # fmt: skip
#: functions of two predicates as the look-up tables of PLOP3, for operands a and c
_COMBINE = {"AND": 0xA0, "OR": 0xFA, "XOR": 0x5A}


def feasible(program: Program, known: dict[int, int]) -> list[list[int]]:
    """The blocks that can follow each block of `assembly.basic_blocks`; none after dead ones.

    known: address in constant bank 0 -> the word of 32 bits there.
    """
    blocks, following = basic_blocks(program)
    number = {block.start: i for i, block in enumerate(blocks)}
    states: dict[int, State] = {0: {}}
    taken: list[set[int]] = [set() for _ in blocks]
    waiting = [0]
    while waiting:
        b = waiting.pop()
        state = dict(states[b])
        for i in blocks[b]:
            _run(program.instructions[i], state, known)
        last = program.instructions[blocks[b][-1]]
        jump = None if last.target is None else number.get(program.labels.get(last.target, -1))
        if last.name == "CALL":
            state = {}
        for after in following[b]:
            if jump is not None and len(following[b]) > 1 and last.name != "CALL":
                goes = _goes(last, state)
                if goes is not None and goes != (after == jump):
                    continue
            taken[b].add(after)
            before = states.get(after)
            both = state if before is None else _common(before, state)
            if both != before:
                states[after] = both
                waiting.append(after)
    return [[after for after in following[b] if after in taken[b]] for b in range(len(blocks))]


def _goes(jump: Instruction, state: State) -> bool | None:
    """Whether a jump is taken; None if that is not known."""
    if jump.opcode.startswith("BRA.DIV"):
        return False  # taken by warps whose lanes go different ways; those of a full tile do not
    conditions = [jump.predicate] if jump.predicate else []
    conditions += [o for o in _operands(jump) if re.fullmatch(r"!?U?P(\d+|T)", o)]
    values = [_predicate(condition, state) for condition in conditions]
    if 0 in values:
        return False
    return None if None in values else True


def _common(a: State, b: State) -> State:
    return {name: value for name, value in a.items() if b.get(name) == value}


def _operands(instruction: Instruction) -> list[str]:
    return [part.strip().removesuffix(".reuse") for part in instruction.operands.split(",")]


def _run(instruction: Instruction, state: State, known: dict[int, int]) -> None:
    """Change `state` as the instruction does."""
    runs = _predicate(instruction.predicate, state) if instruction.predicate else 1
    if runs == 0 or instruction.target is not None:  # jumps write nothing
        return
    before = dict(state) if runs is None else state
    results = dict(_results(instruction, state, known))
    for name in _written(instruction):
        state.pop(name, None)
    state.update({name: value for name, value in results.items() if value is not None})
    if runs is None:
        for name in set(before) | set(state):
            if before.get(name) != state.get(name):
                state.pop(name, None)


def _results(
    instruction: Instruction, state: State, known: dict[int, int]
) -> Iterator[tuple[str, int | None]]:
    """(name, value) of what the instruction writes, if its value can be computed."""
    operands, parts = _operands(instruction), instruction.opcode.split(".")
    name, into = parts[0].removeprefix("U"), operands[0]

    def value(text: str) -> int | None:
        return _value(text, state, known)

    if name in ("LDC", "LDCU") and (at := _CONSTANT.fullmatch(operands[1])):
        for i, register in enumerate(_range(into, 2 if "64" in parts else 1)):
            if "U8" not in parts and "U16" not in parts and "128" not in parts:
                yield register, known.get(int(at[1], 16) + 4 * i)
    elif name in ("MOV", "R2UR") and len(operands) == 2:
        yield into, value(operands[1])
    elif name == "VIADD" or (name == "IADD3" and len(operands) == 4 and "X" not in parts):
        yield into, _sum(value(o) for o in operands[1:])
    elif name == "IMAD" and not {"HI", "WIDE", "X"} & set(parts) and len(operands) == 4:
        a, b, c = map(value, operands[1:])
        if c is not None and (0 in (a, b) or (a is not None and b is not None)):
            yield into, ((a or 0) * (b or 0) + c) & _MASK
    elif name == "ISETP":
        yield into, _compared(parts, operands, state, known)
    elif name == "PLOP3":
        inputs = [_predicate(o, state) for o in operands[2:5]]
        yield into, _looked_up(int(operands[5], 0), inputs)


def _compared(
    parts: list[str], operands: list[str], state: State, known: dict[int, int]
) -> int | None:
    a, b = (_value(o, state, known) for o in operands[2:4])
    compare = next(_COMPARE[part] for part in parts if part in _COMPARE)
    result: int | None = None
    if a is not None and b is not None:
        if "U32" not in parts:
            a, b = ((v ^ 1 << 31) - (1 << 31) for v in (a, b))
        result = int(compare(a, b))
        if "EX" in parts and a == b:  # the high words are equal: the low words decide
            result = _predicate(operands[5], state)
    combine = next(_COMBINE[part] for part in parts if part in _COMBINE)
    return _looked_up(combine, [result, 0, _predicate(operands[4], state)])


def _looked_up(table: int, inputs: list[int | None]) -> int | None:
    """The result of a function of three predicates, if unknown ones do not matter."""
    choices = [(0, 1) if one is None else (one,) for one in inputs]
    results = {table >> (a * 4 + b * 2 + c) & 1 for a, b, c in product(*choices)}
    return results.pop() if len(results) == 1 else None


def _predicate(text: str, state: State) -> int | None:
    name = text.removeprefix("!")
    value = 1 if name in ("PT", "UPT") else state.get(name)
    return None if value is None else value ^ (text != name)


def _value(text: str, state: State, known: dict[int, int]) -> int | None:
    if _LITERAL.fullmatch(text):
        return int(text, 16) & _MASK
    name = text.removeprefix("-")
    if name in ("RZ", "URZ"):
        return 0
    at = _CONSTANT.fullmatch(name)
    value = known.get(int(at[1], 16)) if at else state.get(name)
    return None if value is None else (-value if text != name else value) & _MASK


def _sum(values: Iterator[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total & _MASK


def _range(first: str, count: int) -> list[str]:
    name = _NAME.fullmatch(first)
    return [] if name is None else [f"{name[1]}{int(name[2]) + i}" for i in range(count)]


def _written(instruction: Instruction) -> list[str]:
    """All that the instruction may write, and perhaps more."""
    parts = instruction.opcode.split(".")
    operands = _operands(instruction)
    if parts[0] == "R2P":
        return [f"P{i}" for i in range(8)]
    if parts[0].endswith("GMMA"):
        return [f"R{i}" for i in range(256)]
    wide = {"64", "WIDE"} & set(parts) or parts[0] == "CS2R"
    width = 4 if "128" in parts or parts[0].endswith("MMA") or parts[0] == "LDSM" else 1
    names = [o for o in operands[:3] if re.fullmatch(r"U?P\d+", o)]
    register = next((o for o in operands if re.fullmatch(r"U?R\d+", o)), "")
    return names + _range(register, max(width, 2 if wide else 1))
