"""What limits decoding by SASS alone: instructions to issue beside bytes to move, for one row of x.

    python -m bench.static.decode [--gpu H200] [--shape 8192x8192]

A multiprocessor starts four warps' instructions a cycle, so a product takes at least

    instructions per weight * N * K / (multiprocessors * 4 * 32 * clock)

whatever the memory does. That is a bound, not a prediction: kernels reach neither limit. No GPU is
needed.
"""

from __future__ import annotations

from typing import Annotated

import typer

from qkernels.backends import roofline
from qkernels.benchmark import shapes
from qkernels.quantizers.specs import FormatSpec

from ..model import bytes_per_weight
from . import facts

#: lanes of the instructions that a multiprocessor starts in a cycle; operations of bf16 in one on
#: sm_90
_LANES, _OPERATIONS = 128, 4096


def clock(gpu: roofline.Gpu) -> float:
    """Hz, from the peak that the data sheet gives for it; of sm_90."""
    return gpu.bf16 * 1e12 / (gpu.sm_count * _OPERATIONS)


def rows(
    gpu: roofline.Gpu, shape: tuple[int, int], only: set[str] | None = None
) -> list[tuple[str, float, float, float]]:
    """Job, instructions per weight, least us to issue them, least us to move the weight; the worst
    ratio first.
    """
    found = []
    for job in facts.jobs("weight_only", 90, False):
        if not job.label.endswith("bf16 M=1"):
            continue
        spec = FormatSpec(job.label.split()[0], dict(_pairs(job.label)))
        if only is not None and str(spec) not in only:
            continue
        made = facts.facts_of("weight_only", job)
        if made.error or made.per_weight is None:
            raise RuntimeError(f"{job.label}: {made.error}")
        weights = shape[0] * shape[1]
        issue = made.per_weight * weights / (gpu.sm_count * _LANES * clock(gpu))
        memory = bytes_per_weight(spec.name, spec.params) * weights
        memory /= gpu.bandwidth * 1e9 * roofline.COPY_FRACTION
        found.append((str(spec), made.per_weight, issue * 1e6, memory * 1e6))
    return sorted(found, key=lambda row: row[3] / row[2])


def _pairs(label: str) -> list[tuple[str, object]]:
    """The parameters in a job's label."""
    found: list[tuple[str, object]] = []
    for name, _, value in (part.partition("=") for part in label.split()[1:-2]):
        found.append(
            (
                name,
                int(value)
                if value.isdigit()
                else value == "True"
                if value in ("True", "False")
                else value,
            )
        )
    return found


def main(
    gpu: Annotated[str, typer.Option(help="H100 or H200.")] = "H200",
    shape: Annotated[str, typer.Option(help="NxK")] = "8192x8192",
) -> None:
    """Instructions and bytes of each weight-only format at M = 1, as Markdown."""
    known = roofline.find(gpu)
    if known is None or known.name not in ("H100", "H200"):
        raise typer.BadParameter(f"--gpu: expected H100 or H200, got {gpu!r}")
    (size,) = shapes.shapes_of(shape)
    print(f"{known.name}, {shape}, M = 1, bfloat16\n")
    print(
        "| format | instr/weight | issue, us | memory, us | limit |\n| --- | ---: | ---: | ---: | --- |"
    )
    for name, per_weight, issue, memory in rows(known, size):
        limit = "issue" if issue > memory else "memory"
        print(f"| {name} | {per_weight:.2f} | {issue:.1f} | {memory:.1f} | {limit} |")


if __name__ == "__main__":
    typer.run(main)
