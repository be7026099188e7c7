"""Compile the weight-only CUDA kernels, one format at a time, and read their machine code."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from qkernels.backends.cuda import build, hopper
from qkernels.backends.cuda import weight_only as launcher
from qkernels.backends.cuda.calls import SCALINGS, WeightOnlyArgs
from qkernels.backends.triton.configs import SHARED_KIB
from qkernels.backends.weight_only import traits_of
from qkernels.layouts import codecs
from qkernels.layouts.codecs import CodeKind
from qkernels.layouts.weight_only import WeightOnlyTraits

from . import assembly, constants, dynamic
from .facts import tools
from .jobs.base import DTYPES, problem_of, weight

ARCH, SHAPE, SMS = "90a", (8192, 8192), 132
_SHARED = SHARED_KIB[90] * 1024
CPP_TYPES = {"fp16": "Half", "bf16": "BFloat"}
#: features along K of one m16n8k16, and the rows of x that are its columns
_FEATURES, _COLUMNS = 16, 8
#: fields of the arguments that are known for a weight and M
_OF_WEIGHT = (
    "qdata", "qhigh", "perm", "slice_group", "table", "scaler0", "scaler1", "scaler2", "scaler3",
    "row_offsets", "col_vals", "n", "k", "kp", "tiles", "group", "shift", "row_group",
    "scale_group", "scaling", "scale_type", "is_float", "m", "x_chunks", "x_tail",
    "stage_bytes", "last_group",
)  # fmt: skip


class Decoder(NamedTuple):
    """The kernel that takes M rows of x, in the terms of `dynamic.per_weight`.

    template: its C++ name; T, D and S stand for the type, the decoder and the scaler. rows: rows of
    W that a warp has. columns: rows of x. sums: further products of a slice and 8 rows of x, which
    put sums right. hopper: whether one product has all columns.
    """

    template: str
    rows: int
    columns: int
    sums: int = 0
    hopper: bool = False

    def mma_per_tile(self, codes: CodeKind) -> int:
        """Tensor-core instructions of a warp for one tile."""
        columns = 1 if self.hopper else max(1, self.columns // _COLUMNS)
        return codes.tile // _FEATURES * (self.rows // 16 + self.sums) * columns


def decoder_of(m: int, traits: WeightOnlyTraits, scale_groups: int) -> Decoder:
    """The kernel for m rows of x.

    scale_groups: scale groups in a tile that the decode kernel is compiled for.
    """
    codes = traits.codes
    if m <= launcher.MOST:
        columns = launcher.columns_for(m, SHAPE[0], traits, scale_groups, False, _SHARED)
        sums = int(traits.scales.zero != "none" or launcher.has_constants(codes))
        template = f"weight_only_decode<T, D, S, {columns // _COLUMNS}>"
        return Decoder(template, launcher.rows_for(traits, columns), columns, sums)
    columns = hopper.tiling_for(SHAPE, m, traits, SMS).columns
    row_scale = str(traits.transform_scales is not None).lower()
    template = f"weight_only_hopper<T, D, S, {columns}, {row_scale}>"
    return Decoder(template, 16, columns, hopper=True)


def counts(
    name: str, params: dict[str, Any], rows: tuple[int, ...], cache: Path | None = None
) -> dict[tuple[str, int], float]:
    """(dtype, M) -> instructions a weight, for each dtype and each M of `rows`.

    cache: a folder that keeps compiled kernels.

    Raises:
        RuntimeError: there is no nvcc, it fails, or the format has no CUDA kernel.
    """
    problem = problem_of(90, name, params, SHAPE, 1, "fp16")
    if why := launcher.unsupported(problem):
        raise RuntimeError(f"{name}: {why}")
    traits = traits_of(problem)
    codes = traits.codes
    call = launcher._call_template(weight(name, params, SHAPE), traits, DTYPES["fp16"])
    call.args.x_chunks = 1
    groups = launcher.decode_groups(traits, call)
    decoders = {m: decoder_of(m, traits, groups) for m in rows}
    instances = {
        (dtype, m): _instance(decoder.template, CPP_TYPES[dtype], traits, call.scale_groups)
        for m, decoder in decoders.items()
        for dtype in CPP_TYPES
    }
    programs = _programs(tuple(sorted(set(instances.values()))), cache)
    result = {}
    for (dtype, m), instance in instances.items():
        weights = decoders[m].rows * codes.tile / 32
        mma = decoders[m].mma_per_tile(codes)
        decoder = decoders[m]
        call.args.m = m
        call.args.stage_bytes = launcher.stage_bytes(
            traits, decoder.columns, min(m, decoder.columns)
        )
        known = dict(_words(call.args, constants.FIRST_ARGUMENT[90, decoder.hopper]))
        result[dtype, m] = dynamic.per_weight(programs[instance], mma, weights, known)
    return result


def _words(args: WeightOnlyArgs, first: int) -> Iterator[tuple[int, int]]:
    """The arguments that are known, as `constants.feasible` takes them. first: their place."""
    for field in _OF_WEIGHT:
        place, value = getattr(WeightOnlyArgs, field), getattr(args, field) or 0
        for byte in range(0, place.size, 4):
            word = value >> 8 * byte & 0xFFFFFFFF
            yield first + place.offset + byte, word


def _instance(template: str, dtype: str, traits: Any, scale_groups: int) -> str:
    """A template's instance in C++, such as "weight_only_decode<Half, E5M2, Grouped<1, 1>, 1>"."""
    kernel = launcher.kernel_of(traits)
    codes, scalers = codecs.cuda_kernels()[kernel]
    scaler = re.sub(r"^Only<(.*?)(, true)?>$", r"\1", scalers)
    if scaler == "Plain<1>" and "decode" in template:
        scaler = f"Grouped<1, {SCALINGS['none', False, False]}>"
    if scalers.startswith("AnyPlain"):  # as in csrc/weight_only/launch.h
        scales = traits.scales
        if scales.flat or not scale_groups:
            scaler = "Plain<0>"
        else:
            kind = SCALINGS[scales.zero, scales.flat, scales.nested]
            scaler = f"Grouped<{scale_groups}, {kind}>"
    words = {"T": dtype, "D": re.sub(r"\bT\b", dtype, codes.cuda), "S": scaler}
    return re.sub(r"\b[TDS]\b", lambda match: words[match[0]], template)


def _programs(instances: tuple[str, ...], cache: Path | None) -> dict[str, assembly.Program]:
    """Each kernel's machine code."""
    text = '#include "weight_only/launch.h"\nusing namespace qk;\n' + "".join(
        f"const void* kernel{i} = reinterpret_cast<const void*>({instance});\n"
        for i, instance in enumerate(instances)
    )
    sass = _sass(text, cache)
    pieces = re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", sass, re.S)
    demangle = shutil.which("c++filt")
    if demangle is None:
        raise RuntimeError("no c++filt found; install binutils")
    names = subprocess.run(
        [demangle, *(mangled for mangled, _ in pieces)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    codes = {_plain(name): code for name, (_, code) in zip(names, pieces, strict=True)}
    return {
        instance: assembly.sass_with_addresses(codes[_plain(instance)]) for instance in instances
    }


def _plain(name: str) -> str:
    """A C++ name without namespaces, arguments and blanks."""
    name = re.sub(r"^void |\(qk::\w+\)$|qk::|\s", "", name)
    return name.replace("(int)", "").replace("(bool)0", "false").replace("(bool)1", "true")


def _sass(text: str, cache: Path | None) -> str:
    """SASS of a source file. cache: as in `counts`."""
    compiler = build.nvcc()
    if compiler is None:
        raise RuntimeError("no nvcc found; set CUDA_HOME or PATH")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        key = repr((text, _headers(), build.compiler_digest(compiler), ARCH))
        kept = (cache or folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.sass"
        if kept.is_file():
            return kept.read_text()
        source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
        source.write_text(text)
        command = [
            compiler, "-std=c++17", "-O3", f"-arch=sm_{ARCH}", "-cubin", f"-I{build.sources()}",
            str(source), "-o", str(cubin),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc fails:\n{text}{done.stderr[-4000:]}")
        command = [str(tools() / "cuobjdump"), "-sass", str(cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(re.sub(r"\s*/\* 0x[0-9a-f]{16} \*/", "", sass))
        return kept.read_text()


@lru_cache(maxsize=1)
def _headers() -> str:
    """A hash of the headers of the kernels."""
    digest = hashlib.sha256()
    for file in sorted(build.sources().rglob("*.h")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
