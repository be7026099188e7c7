"""Compile one job ahead of time, read its facts from the machine code, and find faults in them."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkernels.backends.triton.configs import SHARED_KIB

from . import assembly, dynamic, hazards
from . import jobs as job_modules
from .occupancy import occupancy

if TYPE_CHECKING:
    from .jobs.base import CompileJob

#: bytes of registers that a kernel may spill outside of the main loop, which costs once a block
SPILLS_OUTSIDE = 8
#: spills allowed to blocks of 256 rows of x, whose sums take half of all registers: bytes, and
#: loads and stores in the main loop. An H200 ran these blocks 1.1 to 1.4 times as fast as narrower
#: ones that spill nothing (triton 3.6; bench/results/2026-11-27-h200/configurations.md). Triton
#: 3.9, which was not measured, spills fewer bytes, but more in the loop.
SPILLS_WIDE, LOOP_SPILLS_WIDE = 512, 18
ARCHITECTURES = (80, 89, 90, 100, 120)
#: names of the kernels' pointers to packed weights; weight_args begins with qdata and qhigh
_WEIGHT_POINTER = re.compile(r"(w|weight)_ptr|weight_args\[[01]\]")


@dataclass
class Facts:
    """Facts about one compiled job.

    - error: why it does not compile.
    - columns: rows of x of a block (BLOCK_M).
    - spills: bytes of local memory per thread. loop_spills: its loads and stores in the main loop.
    - shared: bytes of shared memory per block. tensor_columns: columns of tensor memory per block.
    - blocks, warps: how many fit on an SM. limit: the resource that allows no more.
    - loads: pointer argument -> bytes of the widest load through it. weight_load: the smallest of
      these among pointers to packed weights.
    - steps: how often ptxas unrolled the main loop. loop: opcode -> count in the main loop.
    - per_weight: instructions of all threads of a block in one step, per weight decoded in it:
      those of the way that a full tile takes (dynamic.py).
    - too_early: an access to memory before the wait for the previous kernel (with PDL).
    - overtaken: a write to registers that an unfinished wgmma reads.
    """

    family: str
    kernel: str
    label: str
    arch: int
    needs_tensor_core: bool = True
    error: str | None = None
    columns: int = 0
    registers: int = 0
    spills: int = 0
    loop_spills: int = 0
    shared: int = 0
    tensor_columns: int = 0
    num_warps: int = 0
    num_stages: int = 0
    blocks: int = 0
    warps: int = 0
    limit: str = ""
    tensor_core: str | None = None
    loads: dict[str, int] = field(default_factory=dict)
    weight_load: int | None = None
    steps: int = 1
    loop_instructions: int = 0
    loop: dict[str, int] = field(default_factory=dict)
    per_weight: float | None = None
    too_early: str | None = None
    overtaken: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kernel} sm_{self.arch} {self.label}"


def failures(facts: Facts) -> list[str]:
    """The faults of a compiled job, one line each."""
    if facts.error:
        return [f"{facts.name}: does not compile: {facts.error}"]
    faults = []
    most, most_in_loop = (
        (SPILLS_WIDE, LOOP_SPILLS_WIDE) if facts.columns >= 256 else (SPILLS_OUTSIDE, 0)
    )
    if facts.spills > most or facts.loop_spills > most_in_loop:
        often = f"{facts.loop_spills} loads and stores" if facts.loop_spills else "none"
        faults.append(
            f"spills {facts.spills} bytes of registers per thread ({often} in the main loop)"
        )
    if facts.shared > (limit := SHARED_KIB[facts.arch] * 1024):
        faults.append(f"needs {facts.shared} bytes of shared memory, a block may have {limit}")
    elif facts.blocks == 0:
        faults.append(f"no block fits on a multiprocessor: too many {facts.limit}")
    if facts.too_early:
        faults.append(f"starts before the last kernel is done, and then: {facts.too_early}")
    if facts.overtaken:
        faults.append(facts.overtaken)
    if facts.needs_tensor_core:
        if facts.tensor_core is None:
            faults.append("has no tensor-core instruction")
        elif not assembly.is_native(facts.tensor_core, facts.arch):
            faults.append(
                f"has only {facts.tensor_core}, not the architecture's own tensor-core instruction"
            )
    return [f"{facts.name}: {fault}" for fault in faults]


# ---------------------------------------------------------------------- jobs
def families() -> list[str]:
    """Names of the modules in `jobs` that have jobs to compile."""
    names = sorted(module.name for module in pkgutil.iter_modules(job_modules.__path__))
    return [name for name in names if hasattr(_module(name), "compile_jobs")]


def jobs(family: str, arch: int, subset: bool) -> list[CompileJob]:
    """The jobs of a family. subset: only the few that tests compile."""
    iterator: Iterator[CompileJob] = _module(family).compile_jobs(arch, subset=subset)
    return list(iterator)


def _module(name: str) -> Any:
    return importlib.import_module(f"{job_modules.__name__}.{name}")


# ---------------------------------------------------------------------- compiling
def facts_of(family: str, job: CompileJob, keep: Path | None = None) -> Facts:
    """Compile `job` and read its facts. keep: folder to write its TTGIR, PTX and SASS to."""
    facts = Facts(family, job.kernel, job.label, job.arch, job.tensor_core)
    facts.num_warps, facts.num_stages = job.num_warps, job.num_stages
    facts.columns = job.constants.get("BLOCK_M", 0)
    try:
        kernel = _compiled(job)
    except Exception as error:  # that a job does not compile is a fact, too
        facts.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return facts
    sass_text, usage = _disassembled(kernel.asm["cubin"])
    if keep:
        stem = re.sub(r"[^\w.=-]+", "_", facts.name)
        for suffix, text in (
            ("ttgir", kernel.asm["ttgir"]),
            ("ptx", kernel.asm["ptx"]),
            ("sass", sass_text),
        ):
            (keep / f"{stem}.{suffix}").write_text(text)

    facts.registers = int(usage["REG"])
    facts.spills = int(usage["STACK"]) + int(usage["LOCAL"])
    facts.shared = kernel.metadata.shared
    facts.tensor_columns = getattr(kernel.metadata, "tmem_size", None) or 0
    fit = occupancy(job.arch, facts.registers, facts.shared, job.num_warps, facts.tensor_columns)
    facts.blocks, facts.warps, facts.limit = fit

    program, source = assembly.sass(sass_text), assembly.ptx(kernel.asm["ptx"])
    if job.constants.get("PDL"):
        facts.too_early = assembly.too_early(program)
    loop = assembly.main_loop(program)
    facts.overtaken = hazards.overtaken(loop)
    facts.tensor_core = assembly.tensor_core(loop) or assembly.tensor_core(program.instructions)
    facts.steps = assembly.steps(loop, assembly.main_loop(source))
    facts.loop_instructions = len(loop)
    facts.loop = dict(Counter(instruction.opcode for instruction in loop).most_common())
    facts.loop_spills = sum(instruction.name in ("LDL", "STL") for instruction in loop)
    if job.weights:
        issued = dynamic.main_pass(program).instructions * 32 * job.num_warps
        facts.per_weight = round(issued / (facts.steps * job.weights), 3)

    names = _parameters(job)
    facts.loads = {names[i]: width for i, width in sorted(assembly.load_bytes(source).items())}
    weight = [width for name, width in facts.loads.items() if _WEIGHT_POINTER.fullmatch(name)]
    facts.weight_load = min(weight, default=None)
    return facts


def _compiled(job: CompileJob) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = job.fn.arg_names
    source = ASTSource(
        job.fn,
        signature={name: job.types.get(name, "constexpr") for name in order},
        constexprs=job.constants,
        attrs={_place(order, name): [["tt.divisibility", 16]] for name in job.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=job.options)


def _place(order: list[str], name: str) -> tuple[int, ...]:
    """The place of an argument, as triton counts: "weight_args[1]" is part 1 of a tuple."""
    name, _, part = name.partition("[")
    return (order.index(name), int(part.rstrip("]"))) if part else (order.index(name),)


def _parameters(job: CompileJob) -> list[str]:
    """Names of the kernel's parameters as PTX numbers them.

    The last two are triton's scratch memory.
    """
    names = []
    for name in job.fn.arg_names:
        kind = job.types.get(name)
        if isinstance(kind, tuple):
            names += [f"{name}[{i}]" for i in range(len(kind))]
        elif kind is not None:
            names.append(name)
    return [*names, "global scratch", "profile scratch"]


@lru_cache(maxsize=1)
def tools() -> Path:
    """The folder of the CUDA toolkit's programs in triton's wheel."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _disassembled(cubin: bytes) -> tuple[str, dict[str, str]]:
    """SASS text and the numbers of `cuobjdump -res-usage`, by the tools in triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(name: str, option: str) -> str:
            command = [str(tools() / name), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return tool("nvdisasm", "-c"), dict(
            re.findall(r"(\w+):(\d+)", tool("cuobjdump", "-res-usage"))
        )
