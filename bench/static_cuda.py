"""What can be told of the CUDA kernels without a GPU: registers, spills and shared memory, from
ptxas -v.

    python -m bench.static_cuda                         # all kernels, all architectures; minutes
    python -m bench.static_cuda --archs 90a --sources linear4
    python -m bench.static_cuda --build build/cuda      # builds and links the extension on the way

Exit code 1 if a kernel spills registers or asks for more shared memory than an architecture has.
The table of the last full run is bench/results/static_cuda.md.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from bench.static import assembly, hazards
from bench.static.facts import tools
from qkernels.backends.cuda import build, eight_bit, gemm, hopper, transforms
from qkernels.backends.cuda import weight_only as gemv
from qkernels.backends.cuda.calls import CODES, OWN
from qkernels.backends.triton.configs import SHARED_KIB

THREADS = 128
#: 32-bit registers of a multiprocessor, and warps it can hold at most (CUDA programming guide)
REGISTERS = 65536
MAX_WARPS = {80: 64, 90: 64, 100: 64, 120: 48}

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)
_NAME = re.compile(
    r"weight_only_(?P<kernel>gem[vm]|hopper)INS_\d+(?P<dtype>Half|BFloat)ELi\d+ENS_(?P<scaler>\w+)"
)
#: `Plain` for so many scales of a tile; other scalers have a number of their own
_RUNS = re.compile(r"\d+PlainILi(\d+)E")
_EIGHT_BIT = re.compile(r"eight_bit_(?P<kernel>gem[vm])ILi\d+ELb(?P<blocks>\d)ELi(?P<rows>\d+)E")
_QUANTIZE = re.compile(
    r"quantize_kernelINS_\d+(?P<dtype>Half|BFloat)ELb(?P<int8>\d)ELi(?P<shared>\d)E"
)
_HOPPER_EIGHT = re.compile(r"eight_bit_hopperILi\d+ELb(?P<blocks>\d)E")
#: ptxas lets one wgmma wait for the next where it cannot follow their registers
_SERIALIZED = re.compile(r"\(C75\d\d\) Potential Performance Loss: wgmma.* in the function '(\w+)'")
_TRANSFORM = re.compile(r"transform_kernelI.*?NS_\d+(?P<dtype>Half|BFloat)E.*?Lb(?P<after>\d)E")
#: decoder and bits of a weight-only source's codes
DECODED = {name: codes for codes, name in CODES.items()} | {
    name: own[:2] for own, name in OWN.items()
}
#: every source, by its name, with its folder in csrc
SOURCES = {
    **dict.fromkeys(sorted(DECODED), "weight_only"),
    **dict.fromkeys(
        (*(f"eight_bit_{kind}" for kind in eight_bit.KINDS), "quantize_rows"), "eight_bit"
    ),
    "transform_rows": "transforms",
}

#: (kernel, source, scales a tile, architecture) -> bytes that nvcc 13.0 is known to spill there: a
#: value or
#: two around a call or a wait, in kernels for groups that hardly a checkpoint has, but for the
#: third and fourth.
#: More, or elsewhere, is a problem.
KNOWN_SPILLS = {
    **{("gemv", f"e{kind}", 0, arch): 16 for kind in ("4m3", "5m2") for arch in ("100a", "120a")},
    ("gemv", "e5m2", 1, "90a"): 12,
    ("gemm", "unsigned4_two_level", -1, "90a"): 8,
    **{("gemm", f"e{kind}", 0, "120a"): 8 for kind in ("4m3", "5m2")},
    ("gemv", "linear8", 0, "120a"): 16,
}


class Facts(NamedTuple):
    """One kernel on one architecture. Sizes in bytes; dynamic: shared memory a launch asks for at
    most.

    runs: scales of a tile that a weight-only kernel is made for, 0 for any number; -1 for kernels
    that are made for one scaler, or have none.
    """

    source: str
    kernel: str
    dtype: str
    runs: int
    arch: str
    registers: int
    spilled: int
    stack: int
    dynamic: int
    threads: int = THREADS
    #: products of a warpgroup wait for one another
    serialized: bool = False
    #: the tensor-core instruction, "" if there is none
    tensor: str = ""
    #: what writes registers that a product under way reads (bench/static/hazards.py)
    overtaken: str = ""

    @property
    def blocks(self) -> int:
        """Blocks on a multiprocessor at a time, by registers, shared memory and warps."""
        number = int(self.arch.rstrip("a"))
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * self.threads)
        by_shared = (SHARED_KIB[number] + 1) * 1024 // (self.dynamic + 1024)
        return min(by_registers, by_shared, MAX_WARPS[number] * 32 // self.threads)

    @property
    def problems(self) -> list[str]:
        known = KNOWN_SPILLS.get((self.kernel, self.source, self.runs, self.arch), 0)
        found = [f"spills {self.spilled} bytes"] if self.spilled > known else []
        if self.dynamic > SHARED_KIB[int(self.arch.rstrip("a"))] * 1024:
            found.append(f"{self.dynamic} bytes of shared memory do not fit")
        wanted = (
            "GMMA"
            if self.kernel.startswith("wgmma")
            else "MMA"
            if self.kernel.startswith("gem")
            else ""
        )
        if wanted not in self.tensor:
            found.append(f"no {wanted} instruction")
        found += [self.overtaken] if self.overtaken else []
        return found + ["its wgmma instructions are serialized"] * self.serialized


def compile_one(source: str, arch: str) -> list[Facts]:
    """Every kernel of `source`, a name of SOURCES, for sm_`arch`."""
    compiler = build.nvcc()
    if compiler is None:
        raise RuntimeError("no nvcc found; set CUDA_HOME or PATH")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            compiler, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v",
            str(build.sources() / SOURCES[source] / f"{source}.cu"), "-o", str(Path(folder) / "out.cubin"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{source} for sm_{arch}: {done.stderr[-4000:]}")
        tensor = _tensor_instructions(Path(folder) / "out.cubin", arch)
    return parse(done.stderr, source, arch, tensor)


def of_build(folder: Path, archs: tuple[str, ...]) -> list[Facts]:
    """Builds the extension in `folder`, imports it, and reads what the compiler left there."""
    target = folder / f"_cuda{build.SUFFIX}"
    build.build(target, archs, folder)
    build.load(target)
    facts = []
    for source, where in SOURCES.items():
        compiled = folder / f"{where}-{source}.o"
        log = Path(f"{compiled}.log").read_text()
        for arch in archs:
            facts += parse(log, source, arch, _tensor_instructions(compiled, arch))
    return facts


def _tensor_instructions(compiled: Path, arch: str) -> dict[str, tuple[str, str]]:
    """Mangled name of each kernel with tensor-core instructions -> the first of them, and
    `Facts.overtaken`.
    """
    own = tools() / "cuobjdump"  # triton's wheel has one
    tool = str(own) if own.is_file() else shutil.which("cuobjdump")
    if tool is None:
        raise RuntimeError(
            "no cuobjdump found; install triton or the CUDA toolkit's binary utilities"
        )
    command = [tool, "-arch", f"sm_{arch}", "-sass", str(compiled)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {}
    for name, code in re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", done.stdout, re.S):
        if tensor := re.search(r"\b(?:UTC)?[HIQ]G?MMA[\w.]*", code):
            loop = (
                assembly.main_loop(assembly.sass_with_addresses(code))
                if "GMMA" in tensor[0]
                else []
            )
            found[name] = tensor[0], hazards.overtaken(loop) or ""
    return found


def parse(text: str, source: str, arch: str, tensor: dict[str, tuple[str, str]]) -> list[Facts]:
    """What ptxas -v says, one entry a kernel; `tensor`: what `_tensor_instructions` found."""
    found = []
    serialized = set(_SERIALIZED.findall(text))
    for entry in _ENTRY.finditer(text):
        if entry["arch"] != arch or ("_hopper" in entry["name"] and arch != "90a"):
            continue  # Hopper's kernels are empty elsewhere
        kernel, dtype, runs, dynamic, threads = _kernel(entry["name"], source)
        spilled = int(entry["stores"]) + int(entry["loads"])
        found.append(
            Facts(
                source, kernel, dtype, runs, arch, int(entry["registers"]), spilled, int(entry["stack"]),
                dynamic, threads, entry["name"] in serialized, *tensor.get(entry["name"], ("", "")),
            )
        )  # fmt: skip
    if not found:
        raise RuntimeError(
            f"{source} for sm_{arch}: ptxas said nothing of any kernel:\n{text[-2000:]}"
        )
    return found


def _kernel(mangled: str, source: str) -> tuple[str, str, int, int, int]:
    """Of a kernel's mangled name: kernel, dtype, runs, shared memory, threads."""
    if name := _NAME.search(mangled):
        return _weight_only(name, source)
    if name := _EIGHT_BIT.search(mangled):
        is_gemv, rows = name["kernel"] == "gemv", int(name["rows"])
        rows = rows * 8 if is_gemv else rows
        label = f"{name['kernel']} {rows} rows{', blocks' * int(name['blocks'])}"
        threads = eight_bit.GEMV_THREADS if is_gemv else eight_bit.GEMM_THREADS
        return label, "", -1, eight_bit.shared_bytes(is_gemv, rows), threads
    if name := _HOPPER_EIGHT.search(mangled):
        kind = source.removeprefix("eight_bit_")
        label = f"wgmma{', blocks' * int(name['blocks'])}"
        return label, "", -1, eight_bit.hopper_shared_bytes(kind), eight_bit.HOPPER_THREADS
    if name := _QUANTIZE.search(mangled):
        shared = {number: what for what, number in eight_bit.SHARED.items()}[int(name["shared"])]
        label = f"{'int8' if name['int8'] == '1' else 'e4m3'} per {shared}"
        return label, name["dtype"], -1, eight_bit.QUANTIZE_SHARED, eight_bit.GEMM_THREADS
    if name := _TRANSFORM.search(mangled):
        label = "transform after" if name["after"] == "1" else "transform before"
        return label, name["dtype"], -1, transforms.LARGEST_SHARED, transforms.THREADS
    raise RuntimeError(f"a kernel of another kind: {mangled}")


def _weight_only(name: re.Match[str], source: str) -> tuple[str, str, int, int, int]:
    codes, threads = DECODED[source], THREADS
    outliers = any(own == source and scaler == "two_level" for (_, _, scaler), own in OWN.items())
    kernel, found = name["kernel"], _RUNS.match(name["scaler"])
    if kernel == "hopper":
        kernel, dynamic, threads = "wgmma", hopper.shared_bytes(*codes, outliers), hopper.THREADS
    elif kernel == "gemm":
        dynamic = gemm.shared_bytes(*codes)
    else:
        dynamic = gemv.shared_bytes(*codes, outliers=outliers)
    return kernel, name["dtype"], int(found[1]) if found else -1, dynamic, threads


def table(facts: list[Facts]) -> str:
    """Markdown: a row for a kernel, both dtypes together; registers and blocks per architecture."""
    archs = sorted({f.arch for f in facts}, key=lambda a: int(a.rstrip("a")))
    rows: dict[tuple[str, str, int], dict[str, list[Facts]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for f in facts:
        rows[f.kernel, f.source, f.runs][f.arch].append(f)
    lines = [
        "| kernel | codes | scales a tile | "
        + " | ".join(f"sm_{a}" for a in archs)
        + " | spills | shared KiB | tensor core |",
        "|---|---|---|" + "---|" * (len(archs) + 3),
    ]
    for (kernel, source, runs), by_arch in sorted(
        rows.items(), key=lambda item: (item[0][0][::-1], item[0])
    ):
        all_of = [f for found in by_arch.values() for f in found]
        cells = []
        for arch in archs:
            worst = max(by_arch[arch], key=lambda f: f.registers, default=None)
            cells.append("-" if worst is None else f"{worst.registers} ({worst.blocks})")
        spilled, shared = max(f.spilled for f in all_of), max(f.dynamic for f in all_of) / 1024
        shown = [
            kernel,
            source,
            "-" if runs < 0 else str(runs or "any"),
            *cells,
            str(spilled),
            f"{shared:.0f}",
            ", ".join(sorted({f.tensor.split(".")[0] for f in all_of} - {""})) or "-",
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def page(facts: list[Facts]) -> str:
    """The table, with how it was made."""
    compiler = subprocess.run(
        [str(build.nvcc()), "--version"], capture_output=True, text=True, check=False
    )
    sources = {f.source for f in facts}
    chosen = (
        ""
        if sources == SOURCES.keys()
        else " --sources " + " ".join(n for n in SOURCES if n in sources)
    )
    release = re.search(r"release [\d.]+, V[\d.]+", compiler.stdout)
    return (
        f"# CUDA kernels, by ptxas\n\nMade by `python -m bench.static_cuda{chosen}`, nvcc "
        f"{release[0] if release else 'of unknown version'}. Blocks have {THREADS} threads, those of the 8-bit GEMM, of quantize_rows and transform_rows 256, of wgmma 384 (whose consumers take 240 registers, whatever is said here). Per architecture: "
        "registers a thread (blocks that fit on a multiprocessor), the larger of float16 and bfloat16; spills "
        "in bytes, the largest; shared memory of the largest launch.\n\n" + table(facts) + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", default=list(build.DEFAULT_ARCHS), metavar="ARCH")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--output", type=Path, help="write the table to this file")
    parser.add_argument(
        "--build", type=Path, help="build the whole extension in this folder, and read that"
    )
    options = parser.parse_args()
    facts: list[Facts] = []
    if options.build:
        facts = of_build(options.build.resolve(), tuple(options.archs))
    for source in [] if options.build else options.sources:
        for arch in options.archs:
            facts += compile_one(source, arch)
            print(f"{source} sm_{arch}", file=sys.stderr, flush=True)
    if options.output:
        options.output.write_text(page(facts))
    print(page(facts))
    bad = [(f, why) for f in facts for why in f.problems]
    for f, why in bad:
        print(f"{f.kernel} {f.source} {f.dtype} runs={f.runs} sm_{f.arch}: {why}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
