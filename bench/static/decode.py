"""Print instructions per weight, and memory bounds of decoding, CUDA and Triton side by side.

    python -m bench.static.decode --output bench/results/static_decode.md
    python -m bench.static.decode --only gptq --only q4_k

An SM issues instructions of four warps in a cycle, so a product takes at least

    instructions per weight * N * K / (SMs * 4 * 32 * clock)

however fast the memory is. That is a bound, not a prediction: kernels reach neither limit.
dynamic.py says which instructions count. This needs nvcc and triton, but no GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from qkernels.backends import roofline
from qkernels.backends.cuda import build
from qkernels.benchmark import shapes
from qkernels.quantizers.specs import FormatSpec

from ..model import bytes_per_weight
from . import cuda_kernels, facts
from .jobs import weight_only as jobs
from .jobs.base import DTYPES
from .workers import start_worker

ROWS = (1, 8, 16, 64, 1024)
GPUS = ("H100", "H200")
#: of an SM of sm_90 in one cycle: lanes of the instructions that it issues, bf16 operations of its
#: tensor cores
_LANES, OPERATIONS = 128, 4096

#: format -> dtype -> instructions a weight that its CUDA kernels may have, for each M of ROWS.
#: tests/kernels/test_decode_counts.py compiles these and fails above a figure. The figures are what
#: was measured last, and only ever sink; bench/targets.md has what they are to become.
CEILINGS: dict[str, dict[str, tuple[float, ...]]] = {
    "gptq:bits=4,group_size=128": {
        "fp16": (1.69, 2.27, 3.14, 4.33, 4.38), "bf16": (1.8, 2.38, 3.27, 4.92, 4.97),
    },
    "nf4:block_size=64": {
        "fp16": (1.89, 2.71, 3.33, 6.0, 6.09), "bf16": (1.89, 2.71, 3.33, 4.89, 4.89),
    },
    "q4_k": {
        "fp16": (2.43, 4.04, 5.32, 7.45, 7.58), "bf16": (2.55, 4.16, 5.41, 7.45, 7.59),
    },
    "gptq:bits=8,group_size=128": {
        "fp16": (2.19, 3.03, 3.95, 5.38, 5.5), "bf16": (4.11, 4.84, 5.64, 7.84, 8.0),
    },
    "fp8:float_format=e4m3": {
        "fp16": (3.59, 4.2, 4.81, 8.28, 8.31), "bf16": (4.04, 4.64, 5.25, 6.88, 6.91),
    },
    "gptq:bits=2,group_size=128": {
        "fp16": (1.49, 1.89, 1.89, 3.98, 3.98), "bf16": (1.49, 1.89, 1.89, 4.57, 4.57),
    },
    "gptq:bits=3,group_size=128": {
        "fp16": (2.4, 2.7, 2.7, 5.04, 5.04), "bf16": (2.37, 2.66, 2.66, 5.63, 5.63),
    },
    "q5_k": {
        "fp16": (3.64, 5.02, 6.38, 8.66, 8.73), "bf16": (3.91, 5.3, 6.54, 8.66, 8.73),
    },
    "q6_k": {
        "fp16": (2.93, 4.74, 6.26, 8.22, 8.3), "bf16": (3.3, 5.16, 6.7, 7.69, 7.8),
    },
    "iq4_xs": {
        "fp16": (2.06, 3.49, 4.31, 6.88, 6.94), "bf16": (2.06, 3.49, 4.31, 5.88, 5.94),
    },
    "spqr": {
        "fp16": (6.11, 6.11, 6.11, 9.48, 9.48), "bf16": (6.02, 6.02, 6.02, 9.48, 9.48),
    },
    "quip_sharp:bits=2": {
        "fp16": (3.88, 4.13, 4.13, 5.32, 5.32), "bf16": (4.02, 4.29, 4.29, 5.32, 5.32),
    },
    "quip_sharp:bits=4": {
        "fp16": (13.04, 13.29, 13.29, 13.84, 13.84), "bf16": (13.04, 13.29, 13.29, 13.84, 13.84),
    },
}  # fmt: skip


class Row(NamedTuple):
    """One format. cuda, triton: (dtype, M) -> instructions a weight. cuda is empty without a
    kernel. bits: packed bits of a weight, scales included.
    """

    format: str
    bits: float
    cuda: dict[tuple[str, int], float]
    triton: dict[tuple[str, int], float]


def clock(gpu: roofline.Gpu) -> float:
    """The clock in Hz at which the data sheet's peak of an sm_90 GPU is reached."""
    return gpu.bf16 * 1e12 / (gpu.sm_count * OPERATIONS)


def issue_us(gpu: roofline.Gpu, per_weight: float, weights: int) -> float:
    """Least microseconds to issue the instructions."""
    return per_weight * weights / (gpu.sm_count * _LANES * clock(gpu)) * 1e6


def memory_us(gpu: roofline.Gpu, bits: float, weights: int) -> float:
    """Least microseconds to read the packed weight."""
    return bits / 8 * weights / (gpu.bandwidth * 1e9 * roofline.COPY_FRACTION) * 1e6


def row_of(name: str, params: dict[str, Any], cache: Path) -> Row:
    """The row of a format. cache: a folder that keeps compiled kernels."""
    cuda = cuda_kernels.counts(name, params, ROWS, cache)
    triton = {}
    for dtype in DTYPES:
        for m in ROWS:
            fact = facts.facts_of("weight_only", jobs.job(90, name, params, m, dtype))
            if fact.error or fact.per_weight is None:
                raise RuntimeError(f"{fact.name}: {fact.error}")
            triton[dtype, m] = fact.per_weight
    bits = 8 * bytes_per_weight(name, params)
    return Row(str(FormatSpec(name, params)), bits, cuda, triton)


def too_many(format: str, counts: dict[tuple[str, int], float]) -> list[str]:
    """A line for each count above the format's figure in CEILINGS."""
    return [
        f"{format} {dtype} M={m}: expected at most {ceiling} instructions a weight, got {count:.2f}"
        for (dtype, m), count in counts.items()
        if count > (ceiling := CEILINGS[format][dtype][ROWS.index(m)]) + 0.005
    ]


def page(rows: list[Row], shape: tuple[int, int]) -> str:
    """The table as Markdown, those that wait longest for instructions first."""
    import triton

    weights = shape[0] * shape[1]
    gpus = [gpu for gpu in roofline.GPUS if gpu.name in GPUS]
    languages = [f"{language} {dtype}" for language in ("CUDA", "Triton") for dtype in DTYPES]
    headings = [
        "format", "bits", *languages, "issue CUDA, us", "issue Triton, us",
        *(f"memory {gpu.name}, us" for gpu in gpus),
    ]  # fmt: skip
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    for row in sorted(rows, key=lambda row: row.bits / row.cuda["bf16", 1]):
        cells = [row.format, f"{row.bits:.2f}"]
        for counts in (row.cuda, row.triton):
            cells += [" / ".join(f"{counts[dtype, m]:.2f}" for m in ROWS) for dtype in DTYPES]
        for counts in (row.cuda, row.triton):
            cells.append(f"{issue_us(gpus[0], counts['bf16', 1], weights):.1f}")
        cells += [f"{memory_us(gpu, row.bits, weights):.1f}" for gpu in gpus]
        lines.append("| " + " | ".join(cells) + " |")
    slow = {
        language: sum(
            issue_us(gpus[-1], counts(row)["bf16", 1], weights)
            > memory_us(gpus[-1], row.bits, weights)
            for row in rows
        )
        for language, counts in (("CUDA", lambda r: r.cuda), ("Triton", lambda r: r.triton))
    }
    words = (
        f"Made by `python -m bench.static.decode` (nvcc {_nvcc()}, triton {triton.__version__}, "
        f"sm_90a, {time.strftime('%Y-%m-%d')}). **No GPU took part.** Instructions of a lane per "
        "weight, in one pass of the main loop, by the way that a full tile takes "
        f"(`bench/static/dynamic.py`), with M = {' / '.join(map(str, ROWS))} rows of x. Times are "
        f"for a {shape[0]}x{shape[1]} matrix, bfloat16, M = 1: to issue the instructions, on "
        f"{' and '.join(GPUS)} alike, and to read the packed weight at "
        f"{roofline.COPY_FRACTION:.0%} of the data sheet's bandwidth. Both are bounds that no "
        "kernel reaches. Those that wait longest for instructions come first. From M = 17 on "
        "the CUDA kernel uses wgmma: one instruction multiplies a slice by all rows of x."
    )
    end = (
        f"Of these {len(rows)} formats, {slow['CUDA']} in CUDA and {slow['Triton']} in "
        f"Triton wait for instructions rather than for the memory of an {GPUS[-1]}."
    )
    parts = ["# What limits decoding, by SASS", textwrap.fill(words, 120), "\n".join(lines), end]
    return "\n\n".join(parts) + "\n"


def _nvcc() -> str:
    """The version of nvcc."""
    command = [str(build.nvcc()), "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    release = re.search(r"V([\d.]+)", text)
    return release[1] if release else "of unknown version"


def main(
    only: Annotated[list[str] | None, typer.Option(help="Formats with this in their name.")] = None,
    shape: Annotated[str, typer.Option(help="NxK")] = "8192x8192",
    output: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep compiled kernels here.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that compile.")] = 2,
) -> None:
    """Print the page of all weight-only formats, as Markdown."""
    (size,) = shapes.shapes_of(shape)
    chosen = [
        (name, params)
        for name, params in jobs.formats_of_jobs()
        if any(text in str(FormatSpec(name, params)) for text in only or [""])
    ]
    if not chosen:
        raise typer.BadParameter(f"--only: expected a part of a format's name, got {only}")
    with tempfile.TemporaryDirectory() as empty:
        kept = cache or Path(empty)
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = str(kept)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, start_worker) as pool:
            rows = list(pool.map(row_of, *zip(*chosen, strict=True), [kept] * len(chosen)))
    text = page(rows, size)
    if output:
        output.write_text(text)
    print(text)
    wrong = [
        line for row in rows if row.format in CEILINGS for line in too_many(row.format, row.cuda)
    ]
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
