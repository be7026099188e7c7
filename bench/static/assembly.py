"""Reads SASS and PTX text: control flow, the main loop, tensor-core instructions, widths of loads.

The main loop is found in the control-flow graph, not by looking for a label and a jump back to it:
compilers move wait loops and exits out of line, so that text between a label and a branch can
belong elsewhere. A *loop* is a natural loop: an edge from a block to one that dominates it (every
path passes it), together with all blocks that reach that edge without passing the loop's head. The
*main loop* is, among loops with a tensor-core instruction and no smaller such loop inside, the one
with most of them; in a kernel without tensor cores, the innermost loop with most global loads.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

#: the tensor-core instructions an architecture has for matrices of its own size: `HMMA` also runs
#: on
#: sm_90, at about half the speed of `HGMMA`, so there it does not count
_WARP = r"[HIQO]MMA"
_NATIVE = {90: r"[HIQ]GMMA", 100: r"UTC[HIQO]MMA", 103: r"UTC[HIQO]MMA", 110: r"UTC[HIQO]MMA"}
_SASS_TENSOR = re.compile(r"(UTC)?[DHIQO]G?MMA")
_PTX_TENSOR = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")
#: what griddepcontrol.wait becomes, and accesses to global memory but for prefetches
_SASS_WAIT = "ACQBULK"
_SASS_GLOBAL = re.compile(
    r"(LDG|LDGSTS|LD|STG|ST|ATOM|ATOMG|RED|REDG|UBLKCP|UBLKRED|UTMALDG|UTMASTG|UTMAREDG)$"
)
_SASS_LOAD = re.compile(r"LDG|UBLKCP|UTMALDG")
#: a bulk copy (TMA) moves whole lines
BULK_BYTES = 128


class Instruction(NamedTuple):
    """opcode with its suffixes; target: the label it names; conditional: whether it may be passed
    over.
    """

    opcode: str
    operands: str
    target: str | None
    conditional: bool

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


class Program(NamedTuple):
    """Instructions in order, and label -> index of the instruction after it."""

    instructions: list[Instruction]
    labels: dict[str, int]


# ---------------------------------------------------------------------- reading
_SASS_LABEL = re.compile(r"([.$\w]+):\s*$")
_SASS_LINE = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?\w+\s+)?([A-Z][\w.:]*)\s*(.*?)\s*;?\s*$"
)
_SASS_TARGET = re.compile(r"`\(([^()]+)\)")


def sass(text: str) -> Program:
    """What `nvdisasm -c` prints."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _SASS_LINE.match(line):
            predicate, opcode, operands = found.groups()
            target = _SASS_TARGET.search(operands)
            # BRA.U UP0, `(.L_x_1): the predicate can be an operand, too
            conditional = bool(predicate) or bool(target and operands[: target.start()].strip())
            instructions.append(
                Instruction(opcode, operands, target[1] if target else None, conditional)
            )
    return Program(instructions, labels)


_ENCODING = re.compile(r"\s*/\* 0x[0-9a-f]{16} \*/")
_ADDRESS = re.compile(r"\s+/\*0*([0-9a-f]+)\*/")
_JUMP = re.compile(r"(\b(?:BRA|CALL)\b.*?)0x([0-9a-f]+)")


def sass_with_addresses(text: str) -> Program:
    """What `cuobjdump -sass` prints of one kernel: jumps name addresses, not labels."""
    text = _ENCODING.sub("", text)
    targets = {target for _, target in _JUMP.findall(text)}
    lines = []
    for line in text.splitlines():
        if (at := _ADDRESS.match(line)) and at[1] in targets:
            lines.append(f".at_{at[1]}:")
        lines.append(_JUMP.sub(r"\1`(.at_\2)", line))
    return sass("\n".join(lines))


_PTX_LABEL = re.compile(r"(\$L__BB\w+):")
_PTX_LINE = re.compile(r"\s+(@!?%?\w+\s+)?([a-z][\w.:]*)\s*(.*?);")
_PTX_TARGET = re.compile(r"(\$L__BB\w+)")


def ptx(text: str) -> Program:
    """What triton makes; labels that are not basic blocks' (in inline assembly) are passed over."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _PTX_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _PTX_LINE.match(line):
            predicate, opcode, operands = found.groups()
            target = _PTX_TARGET.search(operands) if opcode.startswith("bra") else None
            instructions.append(
                Instruction(opcode, operands, target[1] if target else None, bool(predicate))
            )
    return Program(instructions, labels)


# ---------------------------------------------------------------------- loops
_JUMPS = ("BRA", "JMP", "CALL", "WARPSYNC", "bra")
_ENDS = ("BRA", "JMP", "RET", "EXIT", "bra", "ret", "exit")


def _blocks(program: Program) -> tuple[list[range], list[list[int]]]:
    """Basic blocks as ranges of instructions, and the successors of each."""
    code, labels = program
    starts = {0, *labels.values()}
    starts |= {i + 1 for i, found in enumerate(code) if found.name in (*_JUMPS, *_ENDS)}
    ordered = sorted(s for s in starts if s < len(code))
    blocks = [range(a, b) for a, b in zip(ordered, [*ordered[1:], len(code)], strict=True)]
    number = {block.start: i for i, block in enumerate(blocks)}
    following: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = code[block[-1]]
        after = []
        if last.name in _JUMPS and last.target in labels and labels[last.target] in number:
            after.append(number[labels[last.target]])
        if (last.conditional or last.name not in _ENDS) and i + 1 < len(blocks):
            after.append(i + 1)
        following.append(after)
    return blocks, following


def _dominators(following: list[list[int]]) -> dict[int, set[int]]:
    """Block -> the blocks on every path to it from the first; blocks without a path are left out."""
    reached, waiting = {0}, [0]
    while waiting:
        for after in following[waiting.pop()]:
            if after not in reached:
                reached.add(after)
                waiting.append(after)
    before: dict[int, set[int]] = {b: set() for b in reached}
    for b in reached:
        for after in following[b]:
            before[after].add(b)
    found = {b: set(reached) for b in reached}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(reached - {0}):
            new = {b} | set.intersection(*(found[p] for p in before[b]))
            if new != found[b]:
                found[b], changed = new, True
    return found


def loops(program: Program) -> list[set[int]]:
    """Each natural loop as the indices of its instructions."""
    if not program.instructions:
        return []
    blocks, following = _blocks(program)
    dominators = _dominators(following)
    bodies: dict[int, set[int]] = {}  # head -> blocks; loops that share a head are one
    for tail in dominators:
        for head in following[tail]:
            if head not in dominators[tail]:
                continue
            body = bodies.setdefault(head, {head})
            waiting = [tail]
            while waiting:
                b = waiting.pop()
                if b not in body:
                    body.add(b)
                    waiting += [p for p in dominators if b in following[p]]
    return [{i for b in body for i in blocks[b]} for body in bodies.values()]


def _is_tensor(found: Instruction) -> bool:
    return bool(_SASS_TENSOR.fullmatch(found.name) or _PTX_TENSOR.match(found.opcode))


def main_loop(program: Program) -> list[Instruction]:
    """The instructions of the main loop (see the module's docstring); empty without a loop."""
    code = program.instructions
    found = loops(program)
    for wanted in (_is_tensor, lambda i: bool(_SASS_LOAD.match(i.opcode))):
        counts = [sum(wanted(code[i]) for i in body) for body in found]
        holding = [(body, n) for body, n in zip(found, counts, strict=True) if n]
        inner = [(n, body) for body, n in holding if not any(other < body for other, _ in holding)]
        if inner:
            _, body = max(inner, key=lambda pair: (pair[0], len(pair[1])))
            return [code[i] for i in sorted(body)]
    return []


def steps(sass_loop: list[Instruction], ptx_loop: list[Instruction]) -> int:
    """How often ptxas unrolled the main loop: tensor-core instructions there per one of PTX's loop.

    They correspond one to one, and PTX has one step of the kernel's loop in its own: triton peels
    steps off but does not unroll, and LLVM cannot unroll past a barrier.
    """
    have, of = (sum(map(_is_tensor, loop)) for loop in (sass_loop, ptx_loop))
    return max(1, round(have / of)) if of else 1


# ---------------------------------------------------------------------- tensor cores and loads
def tensor_core(code: list[Instruction]) -> str | None:
    """The tensor-core instruction that occurs most, with its suffixes."""
    counts = Counter(found.opcode for found in code if _is_tensor(found))
    return counts.most_common(1)[0][0] if counts else None


def too_early(program: Program) -> str | None:
    """What SASS of a kernel that starts early (triton_kernels/pdl.py) does before it has waited,
    and must not.
    """
    waits = [i for i, found in enumerate(program.instructions) if found.name == _SASS_WAIT]
    if not waits:
        return "no wait for the kernel before"
    before = program.instructions[: waits[0]]
    return next((found.opcode for found in before if _SASS_GLOBAL.match(found.name)), None)


def is_native(opcode: str, arch: int) -> bool:
    """Whether this is the instruction `arch` reaches its full speed with."""
    return bool(re.fullmatch(_NATIVE.get(arch, _WARP), opcode.split(".")[0]))


_REGISTER = re.compile(r"%rd\d+")
_PARAMETER = re.compile(r"_param_(\d+)\b")
_GLOBAL_LOAD = re.compile(r"ld\.(?:[\w:]+\.)*global\.(?:[\w:]+\.)*?(?:v(\d)\.)?[busf](\d+)$")


def load_bytes(program: Program) -> dict[int, int]:
    """Position of a parameter in PTX -> bytes of the widest global load through that pointer.

    From PTX, where it can be told which pointer an address comes from; ptxas keeps the widths.
    """
    sources: dict[str, set[int]] = {}
    changed = True
    while changed:  # registers of one loop round come from the one before
        changed = False
        for found in program.instructions:
            into, _, operands = found.operands.partition(",")
            if not (register := _REGISTER.fullmatch(into.strip())):
                continue
            origin = {int(n) for n in _PARAMETER.findall(operands)}
            if found.name != "ld":  # what is loaded is no address derived from the pointer
                origin = origin.union(*(sources.get(r, set()) for r in _REGISTER.findall(operands)))
            if not origin <= sources.get(register[0], set()):
                sources.setdefault(register[0], set()).update(origin)
                changed = True
    widest: dict[int, int] = {}
    for found in program.instructions:
        if width := _width(found):
            for register_name in _REGISTER.findall(_address(found)):
                for parameter in sources.get(register_name, ()):
                    widest[parameter] = max(widest.get(parameter, 0), width)
    return widest


def _address(found: Instruction) -> str:
    """The operand that holds the address in global memory."""
    addresses = re.findall(r"\[[^\]]*\]", found.operands)
    return addresses[1 if found.name == "cp" else 0] if addresses else ""


def _width(found: Instruction) -> int:
    """Bytes one thread's global load fetches; 0: not a global load."""
    if found.opcode.startswith("cp.async.bulk"):
        return BULK_BYTES if len(re.findall(r"\[", found.operands)) > 2 else 0
    if found.opcode.startswith(("cp.async.ca.", "cp.async.cg.")):
        return int(found.operands.split("],")[2].split(",")[0], 0)
    if load := _GLOBAL_LOAD.match(found.opcode):
        return int(load[1] or 1) * int(load[2]) // 8
    return 0
