"""Print what a model of waves says of the Hopper kernel: tilings, and shares of the peak.

    python -m bench.static.waves > bench/results/waves.md

The model is `predicted_cycles` of qkernels/backends/cuda/hopper.py, by which the launcher chooses:
an SM takes for a work tile what the slowest of its tensor core, its instructions and the L2 cache
takes, and the last wave takes as long as a full one. Reading the weight from an H200's memory is
one more bound. bfloat16 is modelled alike: the best of three blocks, K not cut. No kernel reaches
its model, so only ratios of two are worth something.
"""

from __future__ import annotations

from typing import Annotated

import typer

from qkernels.backends import roofline
from qkernels.backends.cuda import hopper
from qkernels.backends.weight_only import traits_of
from qkernels.benchmark import shapes
from qkernels.quantizers.specs import parse_specs

from ..model import bytes_per_weight
from . import decode
from .jobs.base import problem_of

MODELS = ("llama-3-8b", "llama-3-70b", "qwen3-32b")
ROWS = (64, 128, 256, 512, 1024, 4096, 16384)
SMS = 132
#: bfloat16: rows of W and of x of a block
DENSE = ((128, 256), (256, 128), (128, 128))
#: multiplications of 16 bits of an SM in a cycle
PRODUCTS = decode.OPERATIONS // 2


def memory_cycles(shape: tuple[int, int], bits: float) -> float:
    """Cycles in which an H200 reads the weight."""
    (gpu,) = (gpu for gpu in roofline.GPUS if gpu.name == "H200")
    return decode.memory_us(gpu, bits, shape[0] * shape[1]) * decode.clock(gpu) * 1e-6


def dense_cycles(shape: tuple[int, int], m: int) -> float:
    """Cycles of a bfloat16 product whose blocks share half of x in clusters of two."""

    def cycles(rows: int, columns: int) -> float:
        waves = -(-(-(-shape[0] // rows) * -(-m // columns)) // SMS)
        traffic = (2 * rows + min(m, columns)) / hopper.L2_BYTES
        work = shape[1] * max(rows * columns / PRODUCTS, traffic) + hopper.BEGIN_AND_END
        return waves * work

    return max(memory_cycles(shape, 16), min(cycles(*block) for block in DENSE))


def row(shape: tuple[int, int], format: str) -> str:
    """A row of the table: for each M the tiling, the share of the peak, the ratio to bfloat16."""
    (spec,) = parse_specs(format)
    memory = memory_cycles(shape, 8 * bytes_per_weight(spec.name, spec.params))
    cells = [f"{shape[0]}x{shape[1]}"]
    for m in ROWS:
        traits = traits_of(problem_of(90, spec.name, spec.params, shape, m, "bf16"))
        tiling = hopper.tiling_for(shape, m, traits, SMS)
        cycles = max(memory, hopper.predicted_cycles(shape, m, traits.codes, SMS, tiling))
        peak = shape[0] * shape[1] * m / (PRODUCTS * SMS)
        cells.append(
            f"{tiling.columns} x {tiling.k_slices}: {peak / cycles:.2f}, "
            f"{dense_cycles(shape, m) / cycles:.2f}"
        )
    return "| " + " | ".join(cells) + " |"


def main(
    format: Annotated[str, typer.Option(help="A weight-only format.")] = "gptq:bits=4",
    models: Annotated[str, typer.Option(help="Models or shapes.")] = ",".join(MODELS),
) -> None:
    """Print the page, as Markdown."""
    print(
        f"# The Hopper kernel by its model\n\nMade by `python -m bench.static.waves`: {format}, an "
        "H200. **Nothing here was measured.** Each cell:\nrows of x of a block x split-K slices: "
        "share of the tensor cores' peak, how many times as fast as bfloat16 by the same model.\n\n"
        f"| shape | {' | '.join(f'M={m}' for m in ROWS)} |\n"
        f"| --- |{' --- |' * len(ROWS)}"
    )
    for shape in shapes.shapes_of(models):
        print(row(shape, format))


if __name__ == "__main__":
    typer.run(main)
