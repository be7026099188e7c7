"""A small interpreter for the straight-line integer PTX of triton_kernels/decoders.py.

Triton's own interpreter cannot run inline PTX, so the kernels have the same arithmetic in triton
operations for it. This interpreter runs the PTX itself, so that tests can compare both with the
same expected values. Semantics: PTX ISA, `prmt` (generic mode), `and`, `or`, `shr`, all on 32-bit
registers.
"""

from __future__ import annotations

import re

WORD = 0xFFFFFFFF


def run(source: str, inputs: dict[str, int], outputs: list[str]) -> list[int]:
    """Values of the registers `outputs` ("$0", ...) after `source`, which starts from `inputs`."""
    registers = {k: v & WORD for k, v in inputs.items()}
    for line in re.split(r"[;{}]", source):
        words = line.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        operation, target, *operands = words
        values = [registers[o] if o in registers else int(o, 0) for o in operands]
        registers[target] = _OPERATIONS[operation](*values) & WORD
    return [registers[o] for o in outputs]


def _prmt(a: int, b: int, selector: int) -> int:
    data = [(a | b << 32) >> (8 * i) & 0xFF for i in range(8)]
    result = 0
    for i in range(4):
        pick = selector >> (4 * i) & 15
        byte = data[pick & 7]
        if pick & 8:  # replicates the sign
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << (8 * i)
    return result


_OPERATIONS = {
    "prmt.b32": _prmt,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, b: a >> b,
}
