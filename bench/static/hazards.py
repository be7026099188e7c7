"""Find writes to registers of a wgmma while the tensor core may still read them.

A wgmma that takes its first operand from registers reads them some time after it was issued. By the
PTX specification a write to them before a wait for its group is undefined behaviour. If a compiler
makes such a write by mistake, sums are wrong now and then, or always. Two cases were seen on an
H200 on 2026-11-27: triton 3.6 (triton-lang/triton issue 9433, in versions up to 3.8), and our own
QuIP# kernel, in which a decoder wrote into operands.
"""

from __future__ import annotations

import re

from .assembly import Instruction, Program, loops

_PRODUCT = re.compile(r"[HIQ]GMMA")
_REGISTER = re.compile(r"R(\d+)\b")
#: instructions whose first operand is no register that they write
_NO_RESULT = re.compile(
    r"[A-Z]+SETP|ST|RED|BAR|BRA|SYNCS|UTMA|UBLKCP|LDGSTS|LDGDEPBAR|DEPBAR|WARPGROUP|FENCE|MEMBAR"
    r"|CCTL|R2UR"
)
#: registers of an operand of 64 x 16 elements of 16 bits, or 64 x 32 of 8
_OPERAND = 4


def overtaken_in(program: Program) -> str | None:
    """The same as `overtaken` for a whole kernel: all its code in order, and each of its loops."""
    code = program.instructions
    bodies = [[code[i] for i in sorted(body)] for body in loops(program)]
    with_products = [b for b in bodies if any(_PRODUCT.fullmatch(i.name) for i in b)]
    return next(filter(None, map(overtaken, [code, *with_products])), None)


def overtaken(loop: list[Instruction]) -> str | None:
    """The first instruction that writes an operand of an unfinished wgmma, in words.

    None if there is no such instruction. loop: the main loop in order (`assembly.main_loop`). The
    loop is walked twice, because an iteration may overwrite operands of the one before.
    """
    under_way: list[set[int]] = []  # registers of each committed group that may be unfinished
    group: set[int] = set()
    for instruction in (*loop, *loop):
        if _PRODUCT.fullmatch(instruction.name):
            operands = instruction.operands.split(",")
            if register := _REGISTER.match(operands[1].strip()):
                group |= set(range(int(register[1]), int(register[1]) + _OPERAND))
            if "gsb0" in instruction.operands:
                under_way.append(group)
                group = set()
        elif instruction.opcode == "WARPGROUP.DEPBAR.LE":
            pending = int(instruction.operands.split(",")[1], 0)
            under_way = (
                under_way[len(under_way) - pending :] if pending < len(under_way) else under_way
            )
        elif overlap := _written(instruction) & group.union(*under_way):
            return f"{instruction.opcode} writes R{min(overlap)}, which a product under way reads"
    return None


def _written(instruction: Instruction) -> set[int]:
    """The registers that an instruction writes: its first operand that is no predicate."""
    if _NO_RESULT.match(instruction.name):
        return set()
    for operand in instruction.operands.split(","):
        if register := _REGISTER.match(operand.strip()):
            first = int(register[1])
            return set(range(first, first + _width(instruction.opcode)))
        if not re.fullmatch(r"!?U?P[\dT]", operand.strip()):
            return set()
    return set()


def _width(opcode: str) -> int:
    """The number of registers of a result."""
    parts = opcode.split(".")
    if "128" in parts or (parts[0] == "LDSM" and "4" in parts):
        return 4
    wide = "64" in parts or "WIDE" in parts or (parts[0] == "CS2R" and "32" not in parts)
    return 2 if wide or (parts[0] == "LDSM" and "2" in parts) else 1
