"""Facts about the compiled CUDA kernels without a GPU: registers, spills and shared memory.

    python -m bench.static_cuda                         # all kernels, all architectures; minutes
    python -m bench.static_cuda --archs 90a --sources linear4
    python -m bench.static_cuda --build build/cuda      # builds and links the extension on the way

The numbers come from ptxas -v. Exit code 1 if a kernel spills registers, or needs more shared
memory than an architecture has. The table of the last full run is bench/results/static_cuda.md.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from bench.static import assembly, hazards
from bench.static.facts import tools
from qkernels.backends.cuda import build, eight_bit, gemm, hopper, transforms
from qkernels.backends.cuda import weight_only as decode
from qkernels.backends.triton.configs import SHARED_KIB
from qkernels.layouts.codecs import cuda_kernels

THREADS = 128
#: 32-bit registers of an SM, and the most warps that it holds (CUDA programming guide)
REGISTERS = 65536
MAX_WARPS = {80: 64, 90: 64, 100: 64, 120: 48}

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)
_NAME = re.compile(
    r"weight_only_(?P<kernel>decode|gemm|hopper)INS_\d+(?P<dtype>Half|BFloat)E(?P<classes>\w+)"
)
#: `Plain` and `Grouped` with the number of scale groups in a tile; other scalers have one number
_SCALE_GROUPS = re.compile(r"\d+(?:Plain|Grouped)ILi(\d+)E")
#: the last argument of the decode kernel's template: columns of 8 rows of x, 0 for one row
_COLUMN_TILES = re.compile(r"ELi(\d)EEEvNS_\d+WeightOnlyArgsE")
#: rows of x of a block of the Hopper kernel, before whether rows have one scale
_HOPPER_COLUMNS = re.compile(r"ELi(\d+)ELb\dEEEvNS_\d+HopperArgsE")
_EIGHT_BIT = re.compile(r"eight_bit_gemmILi\d+ELb(?P<blocks>\d)ELi(?P<rows>\d+)E")
_EIGHT_GEMV = re.compile(
    r"eight_bit_gemvILi\d+ELb(?P<blocks>\d)ENS_\d+(StoredRowsILi(?P<stored>\d+)E|"
    r"QuantizedRowsINS_\d+(?P<dtype>Half|BFloat)ELb\dELi(?P<granularity>\d)ELi(?P<rows>\d+)E)"
)
_QUANTIZE = re.compile(
    r"quantize_kernelINS_\d+(?P<dtype>Half|BFloat)ELb(?P<int8>\d)ELi(?P<granularity>\d)E"
)
_HOPPER_EIGHT = re.compile(r"eight_bit_hopperILi\d+ELb(?P<blocks>\d)E")
#: ptxas serializes wgmmas if it cannot follow their registers
_SERIALIZED = re.compile(r"\(C75\d\d\) Potential Performance Loss: wgmma.* in the function '(\w+)'")
_TRANSFORM = re.compile(r"transform_kernelI.*?NS_\d+(?P<dtype>Half|BFloat)E.*?Lb(?P<after>\d)E")
#: name of a weight-only source, which the build generates -> its codes and C++ scalers
WEIGHT_ONLY = {name.removeprefix("weight_only_"): row for name, row in cuda_kernels().items()}
#: name of each source -> its folder in csrc
SOURCES = {
    **dict.fromkeys(sorted(WEIGHT_ONLY), "weight_only"),
    **dict.fromkeys(
        (*(f"eight_bit_{kind}" for kind in eight_bit.KINDS), "quantize_rows"), "eight_bit"
    ),
    "transform_rows": "transforms",
}

#: (kernel, source, scale groups in a tile, architecture) -> bytes that nvcc 13.0 is known to spill:
#: more bytes, or spills of other kernels, are a problem
KNOWN_SPILLS = {
    ("decode 1 row", "lut16", 2, "90a"): 8,
    ("decode 8 rows", "linear3", 4, "100"): 24,
    ("decode 8 rows", "linear3", 4, "120"): 8,
    ("decode 8 rows", "signed3_q3_k", -1, "80"): 24,
    ("decode 8 rows", "unsigned2_two_level", -1, "80"): 56,
    ("decode 8 rows", "unsigned2_two_level", -1, "100"): 32,
    ("decode 8 rows", "unsigned2_two_level", -1, "120"): 16,
    ("decode 8 rows", "unsigned3_two_level", -1, "80"): 80,
    ("decode 8 rows", "unsigned3_two_level", -1, "100"): 80,
    ("decode 8 rows", "unsigned3_two_level", -1, "120"): 80,
    ("decode 16 rows", "signed6_q6_k", -1, "120"): 8,
    ("gemm", "linear2", 0, "100"): 8,
    ("gemm", "linear3", 0, "100"): 16,
    ("gemm", "lut16", 1, "120"): 32,
    ("gemm", "signed6_q6_k", -1, "80"): 8,
    ("gemm", "unsigned2_q2_k", -1, "90a"): 8,
    ("gemm", "unsigned5_scale_min", -1, "80"): 8,
    ("wgmma 64 rows", "linear3", 4, "90a"): 20,
    ("wgmma 64 rows", "unsigned2_two_level", -1, "90a"): 80,
    ("wgmma 64 rows", "unsigned3_two_level", -1, "90a"): 80,
    ("wgmma 128 rows", "lut16", 4, "90a"): 144,
}


class Facts(NamedTuple):
    """One kernel on one architecture. Sizes are in bytes.

    scale_groups: scale groups in a tile for which a weight-only kernel is compiled, 0 for any
    number; -1 for kernels of one scaler or without scaler. dynamic: shared memory of the largest
    launch.
    """

    source: str
    kernel: str
    dtype: str
    scale_groups: int
    arch: str
    registers: int
    spilled: int
    stack: int
    dynamic: int
    threads: int = THREADS
    #: ptxas serialized the products of a warpgroup
    serialized: bool = False
    #: the first tensor-core instruction, or ""
    tensor: str = ""
    #: the instruction that writes registers of a product in flight (bench/static/hazards.py), or ""
    overtaken: str = ""

    @property
    def blocks(self) -> int:
        """Blocks that an SM holds at a time, by registers, shared memory and warps."""
        number = build.number_of(self.arch)
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * self.threads)
        by_shared = (SHARED_KIB[number] + 1) * 1024 // (self.dynamic + 1024)
        return min(by_registers, by_shared, MAX_WARPS[number] * 32 // self.threads)

    @property
    def problems(self) -> list[str]:
        """What is wrong with the kernel, in words."""
        expected = KNOWN_SPILLS.get((self.kernel, self.source, self.scale_groups, self.arch), 0)
        problems = [f"spills {self.spilled} bytes"] if self.spilled > expected else []
        if self.dynamic > SHARED_KIB[build.number_of(self.arch)] * 1024:
            problems.append(f"{self.dynamic} bytes of shared memory do not fit")
        instruction = (
            "GMMA"
            if self.kernel.startswith("wgmma")
            else "MMA"
            if self.kernel.startswith(("gem", "decode"))
            else ""
        )
        if instruction not in self.tensor:
            problems.append(f"no {instruction} instruction")
        problems += [self.overtaken] if self.overtaken else []
        return problems + ["its wgmma instructions are serialized"] * self.serialized


def compile_one(source: str, arch: str) -> list[Facts]:
    """Compile `source`, a name of SOURCES, for sm_`arch`; facts of each of its kernels."""
    compiler = build.nvcc()
    if compiler is None:
        raise RuntimeError("no nvcc found; set CUDA_HOME or PATH")
    with tempfile.TemporaryDirectory() as folder:
        build.write_generated(Path(folder))
        (file,) = (
            root / SOURCES[source] / f"{source}.cu"
            for root in (Path(folder), build.sources())
            if (root / SOURCES[source] / f"{source}.cu").is_file()
        )
        command = [
            compiler, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v",
            f"-I{build.sources()}", str(file), "-o", str(Path(folder) / "out.cubin"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{source} for sm_{arch}: {done.stderr[-4000:]}")
        tensor = _tensor_instructions(Path(folder) / "out.cubin", arch)
    return parse(done.stderr, source, arch, tensor)


def of_build(folder: Path, archs: tuple[str, ...]) -> list[Facts]:
    """Build the extension in `folder`, import it, and read the compiler's logs and objects."""
    target = folder / f"_cuda{build.SUFFIX}"
    build.build(target, archs, folder)
    expected = sorted({*cuda_kernels(), *SOURCES} - set(WEIGHT_ONLY))
    if (names := build.load(target).kernels()) != expected:
        raise RuntimeError(f"{target}: expected the kernels {expected}, got {names}")
    objects = [folder / f"{where}-{source}.o" for source, where in SOURCES.items()]
    parts = [
        (source, path, arch)
        for source, path in zip(SOURCES, objects, strict=True)
        for arch in archs
    ]
    with ProcessPoolExecutor() as pool:
        return [fact for facts in pool.map(_of_object, *zip(*parts, strict=True)) for fact in facts]


def _of_object(source: str, compiled: Path, arch: str) -> list[Facts]:
    """Facts of an object of the build, and of the compiler's log beside it."""
    log = Path(f"{compiled}.log").read_text()
    return parse(log, source, arch, _tensor_instructions(compiled, arch))


def _tensor_instructions(compiled: Path, arch: str) -> dict[str, tuple[str, str]]:
    """Mangled name of each kernel with tensor-core instructions -> the first, and its hazard.

    The hazard is `Facts.overtaken`.
    """
    bundled = tools() / "cuobjdump"  # triton's wheel has one
    tool = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if tool is None:
        raise RuntimeError(
            "no cuobjdump found; install triton or the CUDA toolkit's binary utilities"
        )
    command = [tool, "-arch", f"sm_{arch}", "-sass", str(compiled)]
    return tensor_instructions(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )


def tensor_instructions(text: str) -> dict[str, tuple[str, str]]:
    """`_tensor_instructions` of what cuobjdump prints."""
    instructions = {}
    for name, code in re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", text, re.S):
        if tensor := re.search(r"\b(?:UTC)?[HIQ]G?MMA[\w.]*", code):
            hazard = None
            if "GMMA" in code:
                hazard = hazards.overtaken_in(assembly.sass_with_addresses(code))
            instructions[name] = tensor[0], hazard or ""
    return instructions


def parse(text: str, source: str, arch: str, tensor: dict[str, tuple[str, str]]) -> list[Facts]:
    """The facts in the output of ptxas -v, one entry per kernel.

    tensor: the result of `_tensor_instructions`.
    """
    facts = []
    serialized = set(_SERIALIZED.findall(text))
    for entry in _ENTRY.finditer(text):
        if entry["arch"] != arch or ("_hopper" in entry["name"] and arch != "90a"):
            continue  # Hopper kernels only trap on other architectures
        kernel, dtype, scale_groups, dynamic, threads = _kernel(entry["name"], source, arch)
        spilled = int(entry["stores"]) + int(entry["loads"])
        facts.append(
            Facts(
                source, kernel, dtype, scale_groups, arch, int(entry["registers"]), spilled,
                int(entry["stack"]), dynamic, threads, entry["name"] in serialized,
                *tensor.get(entry["name"], ("", "")),
            )
        )  # fmt: skip
    if not facts:
        raise RuntimeError(
            f"{source} for sm_{arch}: ptxas said nothing of any kernel:\n{text[-2000:]}"
        )
    return facts


def _kernel(mangled: str, source: str, arch: str) -> tuple[str, str, int, int, int]:
    """Kernel, dtype, scale groups, shared memory and threads, from a kernel's mangled name."""
    if name := _NAME.search(mangled):
        return _weight_only(name, source, arch)
    if name := _EIGHT_BIT.search(mangled):
        label = f"gemm {name['rows']} rows{', blocks' * int(name['blocks'])}"
        shared = eight_bit.shared_bytes(False, int(name["rows"]))
        return label, "", -1, shared, eight_bit.GEMM_THREADS
    if name := _EIGHT_GEMV.search(mangled):
        rows = int(name["rows"] or int(name["stored"]) * 8)
        label = f"gemv {rows} rows{', blocks' * int(name['blocks'])}"
        if name["rows"]:
            label += f", quantizes per {_granularity(name['granularity'])}"
        shared = eight_bit.shared_bytes(True, -(-rows // 8) * 8, rows if name["rows"] else 0)
        return label, name["dtype"] or "", -1, shared, eight_bit.GEMV_THREADS
    if name := _HOPPER_EIGHT.search(mangled):
        kind = source.removeprefix("eight_bit_")
        label = f"wgmma{', blocks' * int(name['blocks'])}"
        return label, "", -1, eight_bit.hopper_shared_bytes(kind), eight_bit.HOPPER_THREADS
    if name := _QUANTIZE.search(mangled):
        granularity = _granularity(name["granularity"])
        label = f"{'int8' if name['int8'] == '1' else 'e4m3'} per {granularity}"
        return label, name["dtype"], -1, eight_bit.QUANTIZE_SHARED, eight_bit.GEMM_THREADS
    if name := _TRANSFORM.search(mangled):
        label = "transform after" if name["after"] == "1" else "transform before"
        return label, name["dtype"], -1, transforms.LARGEST_SHARED, transforms.THREADS
    raise RuntimeError(f"a kernel of another kind: {mangled}")


def _granularity(number: str) -> str:
    return {str(value): name for name, value in eight_bit.GRANULARITIES.items()}[number]


def _weight_only(name: re.Match[str], source: str, arch: str) -> tuple[str, str, int, int, int]:
    (codes, scalers), threads = WEIGHT_ONLY[source], THREADS
    outliers = "TwoLevel" in scalers
    kernel, groups = name["kernel"], _SCALE_GROUPS.search(name["classes"])
    if kernel == "hopper":
        rows = _HOPPER_COLUMNS.search(name.string)
        assert rows is not None
        kernel, threads = f"wgmma {rows[1]} rows", hopper.THREADS
        dynamic = hopper.shared_bytes(codes, int(rows[1]))
    elif kernel == "gemm":
        dynamic = gemm.shared_bytes(codes)
    else:
        tiles = _COLUMN_TILES.search(name["classes"])
        assert tiles is not None
        columns = 8 * int(tiles[1]) or 1
        kernel = f"decode {columns} row{'s' * (columns > 1)}"
        traits: Any = SimpleNamespace(codes=codes, outliers=outliers)
        shared = SHARED_KIB[build.number_of(arch)] * 1024
        warps = decode.warps_in(traits, shared)
        most = decode.columns_for(decode.MOST, decode.ROWS, traits, 0, False, shared)
        # Where memory is short, no launch has 16 rows.
        dynamic = decode.shared_bytes(traits, columns, columns, warps) if columns <= most else 0
        threads = 32 * warps
    return kernel, name["dtype"], int(groups[1]) if groups else -1, dynamic, threads


def table(facts: list[Facts]) -> str:
    """Markdown table: a row per kernel, for both dtypes; registers and blocks per architecture."""
    archs = sorted({f.arch for f in facts}, key=build.number_of)
    rows: dict[tuple[str, str, int], dict[str, list[Facts]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for f in facts:
        rows[f.kernel, f.source, f.scale_groups][f.arch].append(f)
    lines = [
        "| kernel | codes | scales a tile | "
        + " | ".join(f"sm_{a}" for a in archs)
        + " | spills | shared KiB | tensor core |",
        "|---|---|---|" + "---|" * (len(archs) + 3),
    ]
    for (kernel, source, scale_groups), by_arch in sorted(
        rows.items(), key=lambda item: (item[0][0][::-1], item[0])
    ):
        all_facts = [f for arch_facts in by_arch.values() for f in arch_facts]
        cells = []
        for arch in archs:
            worst = max(by_arch[arch], key=lambda f: f.registers, default=None)
            cells.append("-" if worst is None else f"{worst.registers} ({worst.blocks})")
        spilled = max(f.spilled for f in all_facts)
        shared = max(f.dynamic for f in all_facts) / 1024
        tensor = sorted({f.tensor.split(".")[0] for f in all_facts} - {""})
        columns = [
            kernel,
            source,
            "-" if scale_groups < 0 else str(scale_groups or "any"),
            *cells,
            str(spilled),
            f"{shared:.0f}",
            ", ".join(tensor) or "-",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def page(facts: list[Facts]) -> str:
    """The page with the table, and the command that made it."""
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
        f"{release[0] if release else 'of unknown version'}. Blocks have {THREADS} threads, those "
        "of decode 256, or fewer where shared memory is short, of the 8-bit GEMM, of quantize_rows "
        "and transform_rows 256, of wgmma 512, with 8 bits 384 (whose consumers take 160 or 240 "
        "registers, whatever is said here). Per architecture: registers a thread (blocks "
        "that fit on a multiprocessor), the larger of float16 and bfloat16; spills in bytes, the "
        "largest; shared memory of the largest launch.\n\n" + table(facts) + "\n"
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
        name = f"{f.kernel} {f.source} {f.dtype} runs={f.scale_groups} sm_{f.arch}"
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
