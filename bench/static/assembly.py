"""Read SASS and PTX text: control flow, the main loop, tensor-core instructions, widths of loads.

The main loop is found in the control-flow graph, not as the text between a label and a jump back to
it, because compilers move wait loops and exits out of line, so that such text may belong elsewhere.

- A *loop* is a natural loop: an edge from a block to a block that dominates it (every path passes
  it), with all blocks that reach the edge without passing the head of the loop.
- The *main loop* is the innermost loop with most tensor-core instructions. In a kernel without
  tensor cores it is the innermost loop with most global loads.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

#: the tensor-core instructions with which an architecture reaches its full speed: `HMMA` also runs
#: on sm_90, at about half the speed of `HGMMA`, so it does not count there
_WARP = r"[HIQO]MMA"
_NATIVE = {90: r"[HIQ]GMMA", 100: r"UTC[HIQO]MMA", 103: r"UTC[HIQO]MMA", 110: r"UTC[HIQO]MMA"}
_SASS_TENSOR = re.compile(r"(UTC)?[DHIQO]G?MMA")
_PTX_TENSOR = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")
#: SASS of griddepcontrol.wait, and of accesses to global memory other than prefetches
_SASS_WAIT = "ACQBULK"
_SASS_GLOBAL = re.compile(
    r"(LDG|LDGSTS|LD|STG|ST|ATOM|ATOMG|RED|REDG|UBLKCP|UBLKRED|UTMALDG|UTMASTG|UTMAREDG)$"
)
_SASS_LOAD = re.compile(r"LDG|UBLKCP|UTMALDG")
#: a bulk copy (TMA) moves whole lines
BULK_BYTES = 128


class Instruction(NamedTuple):
    """One instruction of SASS or PTX.

    opcode: with its suffixes. target: the label that a jump names. conditional: whether a predicate
    decides that it runs. predicate: the one before the opcode, such as "!P0", or "".
    """

    opcode: str
    operands: str
    target: str | None
    conditional: bool
    predicate: str = ""

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


class Program(NamedTuple):
    """Instructions in order. labels: label -> index of the instruction after it."""

    instructions: list[Instruction]
    labels: dict[str, int]


# ---------------------------------------------------------------------- reading
_SASS_LABEL = re.compile(r"([.$\w]+):\s*$")
_SASS_LINE = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?\w+\s+)?([A-Z][\w.:]*)\s*(.*?)\s*;?\s*$"
)
_SASS_TARGET = re.compile(r"`\(([^()]+)\)")


def sass(text: str) -> Program:
    """Parse the output of `nvdisasm -c`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif line_parts := _SASS_LINE.match(line):
            predicate, opcode, operands = line_parts.groups()
            target = _SASS_TARGET.search(operands)
            # the predicate can be an operand, too: BRA.U UP0, `(.L_x_1)
            has_operand = bool(target and operands[: target.start()].strip())
            conditional = bool(predicate) or (has_operand and opcode.startswith("BRA"))
            label_of = target[1] if target else None
            before = (predicate or "").strip().removeprefix("@")
            instructions.append(Instruction(opcode, operands, label_of, conditional, before))
    return Program(instructions, labels)


_ENCODING = re.compile(r"\s*/\* 0x[0-9a-f]{16} \*/")
_ADDRESS = re.compile(r"\s+/\*0*([0-9a-f]+)\*/")
_JUMP = re.compile(r"(\b(?:BRA|CALL)\b.*?)0x([0-9a-f]+)")


def sass_with_addresses(text: str) -> Program:
    """Parse the output of `cuobjdump -sass` for one kernel, whose jumps name addresses."""
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
    """Parse triton's PTX. Labels in inline assembly, which start no basic block, are ignored."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _PTX_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif line_parts := _PTX_LINE.match(line):
            predicate, opcode, operands = line_parts.groups()
            target = _PTX_TARGET.search(operands) if opcode.startswith("bra") else None
            instructions.append(
                Instruction(opcode, operands, target[1] if target else None, bool(predicate))
            )
    return Program(instructions, labels)


# ---------------------------------------------------------------------- loops
_JUMPS = ("BRA", "JMP", "CALL", "WARPSYNC", "bra")
_ENDS = ("BRA", "JMP", "RET", "EXIT", "bra", "ret", "exit")


def basic_blocks(program: Program) -> tuple[list[range], list[list[int]]]:
    """Basic blocks as ranges of instructions, and the successors of each."""
    code, labels = program
    starts = {0, *labels.values()}
    starts |= {i + 1 for i, instruction in enumerate(code) if instruction.name in (*_JUMPS, *_ENDS)}
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


def dominators_of(following: list[list[int]]) -> dict[int, set[int]]:
    """Block -> the blocks on every path to it from the first. Unreachable blocks are left out."""
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
    dominators = {b: set(reached) for b in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(reached - {0}):
            new = {b} | set.intersection(*(dominators[p] for p in before[b]))
            if new != dominators[b]:
                dominators[b], changed = new, True
    return dominators


def loops(program: Program) -> list[set[int]]:
    """Each natural loop as the indices of its instructions."""
    if not program.instructions:
        return []
    blocks, following = basic_blocks(program)
    dominators = dominators_of(following)
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


def is_tensor(instruction: Instruction) -> bool:
    return bool(_SASS_TENSOR.fullmatch(instruction.name) or _PTX_TENSOR.match(instruction.opcode))


def main_loop(program: Program) -> list[Instruction]:
    """The instructions of the main loop (see the module's docstring); empty without a loop."""
    return [program.instructions[i] for i in sorted(main_body(program))]


def main_body(program: Program) -> set[int]:
    """The indices of the instructions of `main_loop`."""
    code = program.instructions
    bodies = loops(program)
    for matches in (is_tensor, lambda i: bool(_SASS_LOAD.match(i.opcode))):
        counts = [sum(matches(code[i]) for i in body) for body in bodies]
        matching = [(body, n) for body, n in zip(bodies, counts, strict=True) if n]
        inner = [(n, body) for body, n in matching if not any(b < body for b, _ in matching)]
        if inner:
            return max(inner, key=lambda pair: (pair[0], len(pair[1])))[1]
    return set()


def steps(sass_loop: list[Instruction], ptx_loop: list[Instruction]) -> int:
    """How often ptxas unrolled the main loop: tensor-core instructions in SASS over those in PTX.

    The instructions of SASS and PTX correspond one to one. The loop in PTX is one step of the
    kernel's loop, because triton peels steps off but does not unroll, and LLVM cannot unroll past a
    barrier.
    """
    in_sass, in_ptx = (sum(map(is_tensor, loop)) for loop in (sass_loop, ptx_loop))
    return max(1, round(in_sass / in_ptx)) if in_ptx else 1


# ---------------------------------------------------------------------- tensor cores and loads
def tensor_core(code: list[Instruction]) -> str | None:
    """The most frequent tensor-core instruction, with its suffixes; None without one."""
    counts = Counter(instruction.opcode for instruction in code if is_tensor(instruction))
    return counts.most_common(1)[0][0] if counts else None


def too_early(program: Program) -> str | None:
    """The first access to global memory before the wait, in a kernel with PDL, which is an error.

    See triton_kernels/pdl.py. None if there is no such access.
    """
    waits = [
        i for i, instruction in enumerate(program.instructions) if instruction.name == _SASS_WAIT
    ]
    if not waits:
        return "no wait for the kernel before"
    before = program.instructions[: waits[0]]
    return next(
        (instruction.opcode for instruction in before if _SASS_GLOBAL.match(instruction.name)), None
    )


def is_native(opcode: str, arch: int) -> bool:
    """Whether this is a tensor-core instruction with which `arch` reaches its full speed."""
    return bool(re.fullmatch(_NATIVE.get(arch, _WARP), opcode.split(".")[0]))


_REGISTER = re.compile(r"%rd\d+")
_PARAMETER = re.compile(r"_param_(\d+)\b")
_GLOBAL_LOAD = re.compile(r"ld\.(?:[\w:]+\.)*global\.(?:[\w:]+\.)*?(?:v(\d)\.)?[busf](\d+)$")


def load_bytes(program: Program) -> dict[int, int]:
    """Position of a parameter in PTX -> bytes of the widest global load through that pointer.

    PTX shows which pointer an address comes from, and ptxas keeps the widths of loads.
    """
    sources: dict[str, set[int]] = {}
    changed = True
    while changed:  # because a register may come from the iteration before
        changed = False
        for instruction in program.instructions:
            into, _, operands = instruction.operands.partition(",")
            if not (register := _REGISTER.fullmatch(into.strip())):
                continue
            origin = {int(n) for n in _PARAMETER.findall(operands)}
            if instruction.name != "ld":  # a loaded value is no address derived from the pointer
                origin = origin.union(*(sources.get(r, set()) for r in _REGISTER.findall(operands)))
            if not origin <= sources.get(register[0], set()):
                sources.setdefault(register[0], set()).update(origin)
                changed = True
    widest: dict[int, int] = {}
    for instruction in program.instructions:
        if width := _width(instruction):
            for register_name in _REGISTER.findall(_address(instruction)):
                for parameter in sources.get(register_name, ()):
                    widest[parameter] = max(widest.get(parameter, 0), width)
    return widest


def _address(instruction: Instruction) -> str:
    """The operand that holds the address in global memory."""
    addresses = re.findall(r"\[[^\]]*\]", instruction.operands)
    return addresses[1 if instruction.name == "cp" else 0] if addresses else ""


def _width(instruction: Instruction) -> int:
    """Bytes that a global load fetches for one thread; 0 for any other instruction."""
    if instruction.opcode.startswith("cp.async.bulk"):
        return BULK_BYTES if len(re.findall(r"\[", instruction.operands)) > 2 else 0
    if instruction.opcode.startswith(("cp.async.ca.", "cp.async.cg.")):
        return int(instruction.operands.split("],")[2].split(",")[0], 0)
    if load := _GLOBAL_LOAD.match(instruction.opcode):
        return int(load[1] or 1) * int(load[2]) // 8
    return 0
