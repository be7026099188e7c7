"""Print what limits decoding at M = 1, by SASS: instructions to issue, or bytes to move.

    python -m bench.static.decode [--gpu H200] [--shape 8192x8192]

An SM issues instructions of four warps in a cycle, so a product takes at least

    instructions per weight * N * K / (SMs * 4 * 32 * clock)

however fast the memory is. That is a bound, not a prediction: kernels reach neither limit. No GPU
is needed.
"""

from __future__ import annotations

from typing import Annotated

import typer

from qkernels.backends import roofline
from qkernels.benchmark import shapes
from qkernels.quantizers.specs import FormatSpec

from ..model import bytes_per_weight
from . import facts

#: of an SM of sm_90 in one cycle: lanes of the instructions that it issues, bf16 operations of its
#: tensor cores
_LANES, _OPERATIONS = 128, 4096


def clock(gpu: roofline.Gpu) -> float:
    """The clock in Hz at which the data sheet's peak of an sm_90 GPU is reached."""
    return gpu.bf16 * 1e12 / (gpu.sm_count * _OPERATIONS)


def rows(
    gpu: roofline.Gpu, shape: tuple[int, int], only: set[str] | None = None
) -> list[tuple[str, float, float, float]]:
    """Rows of the table, those that wait longest for instructions first.

    Each has the format, instructions per weight, least microseconds to issue them, and least
    microseconds to move the packed weight. only: the formats to compile; None for all.
    """
    table = []
    for job in facts.jobs("weight_only", 90, False):
        if not job.label.endswith("bf16 M=1"):
            continue
        spec = FormatSpec(job.label.split()[0], dict(_pairs(job.label)))
        if only is not None and str(spec) not in only:
            continue
        fact = facts.facts_of("weight_only", job)
        if fact.error or fact.per_weight is None:
            raise RuntimeError(f"{job.label}: {fact.error}")
        weights = shape[0] * shape[1]
        issue = fact.per_weight * weights / (gpu.sm_count * _LANES * clock(gpu))
        memory = bytes_per_weight(spec.name, spec.params) * weights
        memory /= gpu.bandwidth * 1e9 * roofline.COPY_FRACTION
        table.append((str(spec), fact.per_weight, issue * 1e6, memory * 1e6))
    return sorted(table, key=lambda row: row[3] / row[2])


def _pairs(label: str) -> list[tuple[str, object]]:
    """The parameters in a job's label, as (name, value)."""
    pairs: list[tuple[str, object]] = []
    for name, _, text in (part.partition("=") for part in label.split()[1:-2]):
        value = {"True": True, "False": False}.get(text, text)
        pairs.append((name, int(text) if text.isdigit() else value))
    return pairs


def main(
    gpu: Annotated[str, typer.Option(help="H100 or H200.")] = "H200",
    shape: Annotated[str, typer.Option(help="NxK")] = "8192x8192",
) -> None:
    """Print instructions and bytes of each weight-only format at M = 1, as Markdown."""
    model = roofline.find(gpu)
    if model is None or model.name not in ("H100", "H200"):
        raise typer.BadParameter(f"--gpu: expected H100 or H200, got {gpu!r}")
    (size,) = shapes.shapes_of(shape)
    print(f"{model.name}, {shape}, M = 1, bfloat16\n")
    print("| format | instr/weight | issue, us | memory, us | limit |")
    print("| --- | ---: | ---: | ---: | --- |")
    for name, per_weight, issue, memory in rows(model, size):
        limit = "issue" if issue > memory else "memory"
        print(f"| {name} | {per_weight:.2f} | {issue:.1f} | {memory:.1f} | {limit} |")


if __name__ == "__main__":
    typer.run(main)
