"""Finds registers of a wgmma that machine code writes while the tensor core may still read them.

A wgmma that takes its first operand from registers reads them some time after it was issued. PTX
calls it undefined to write them before a wait for its group; a compiler that does so by mistake
gives sums that are wrong now and then, or always. Seen on an H200 on 2026-11-27: triton 3.6
(triton-lang/triton issue 9433, there until 3.8) and our own QuIP# kernel, which had let a decoder
write into operands.
"""

from __future__ import annotations

import re

from .assembly import Instruction

_PRODUCT = re.compile(r"[HIQ]GMMA")
_REGISTER = re.compile(r"R(\d+)\b")
#: what has no register of its own as its first operand
_NO_RESULT = re.compile(
    r"[A-Z]+SETP|ST|RED|BAR|BRA|SYNCS|UTMA|UBLKCP|LDGSTS|LDGDEPBAR|DEPBAR|WARPGROUP|FENCE|MEMBAR|CCTL|R2UR"
)
#: registers of an operand of 64 x 16 elements of 16 bits, or 64 x 32 of 8
_OPERAND = 4


def overtaken(loop: list[Instruction]) -> str | None:
    """The first instruction that writes an operand of a product under way, in words; None without
    one.

    loop: the main loop in order (`assembly.main_loop`). It is walked twice, for what one round
    leaves under way the next one overtakes.
    """
    under_way: list[set[int]] = []  # of each group of products that was committed
    group: set[int] = set()
    for found in (*loop, *loop):
        if _PRODUCT.fullmatch(found.name):
            operands = found.operands.split(",")
            if register := _REGISTER.match(operands[1].strip()):
                group |= set(range(int(register[1]), int(register[1]) + _OPERAND))
            if "gsb0" in found.operands:
                under_way.append(group)
                group = set()
        elif found.opcode == "WARPGROUP.DEPBAR.LE":
            pending = int(found.operands.split(",")[1], 0)
            under_way = (
                under_way[len(under_way) - pending :] if pending < len(under_way) else under_way
            )
        elif taken := _written(found) & group.union(*under_way):
            return f"{found.opcode} writes R{min(taken)}, which a product under way reads"
    return None


def _written(found: Instruction) -> set[int]:
    """The registers that an instruction writes: from its first operand on, past predicates."""
    if _NO_RESULT.match(found.name):
        return set()
    for operand in found.operands.split(","):
        if register := _REGISTER.match(operand.strip()):
            first = int(register[1])
            return set(range(first, first + _width(found.opcode)))
        if not re.fullmatch(r"!?U?P[\dT]", operand.strip()):
            return set()
    return set()


def _width(opcode: str) -> int:
    """Registers of a result."""
    parts = opcode.split(".")
    if "128" in parts or (parts[0] == "LDSM" and "4" in parts):
        return 4
    wide = "64" in parts or "WIDE" in parts or (parts[0] == "CS2R" and "32" not in parts)
    return 2 if wide or (parts[0] == "LDSM" and "2" in parts) else 1
