"""What a race on a GPU should show: the roofline's time for each product, printed before anything is timed.

    python -m bench.predictions --gpu H200 > bench/results/predictions.md

No kernel reaches these times. How far above them a kernel must lie by its instructions at M = 1 is in
bench/results/static_decode.md.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import qkernels as qk
from qkernels import roofline
from qkernels.benchmark import shapes
from qkernels.presets import parse_specs

FORMATS = "bf16,gptq:bits=4,group_size=128,nf4,q4_k,w8a8,fp8:activation=dynamic"
ROWS = (1, 16, 64, 256, 1024, 4096)


def bits_of(name: str, params: dict[str, object]) -> float:
    """Bits a weight, scales and all: of a small weight, since they are the same for every size."""
    return qk.quantize(torch.randn(256, 4096), name, **params).bits_per_weight


def main(
    gpu: Annotated[str, typer.Option(help="A name in qkernels/roofline.py.")] = "H200",
    sizes: Annotated[str, typer.Option("--shapes", help="Models, or NxK.")] = "square,llama-3-8b",
) -> None:
    found = roofline.find(gpu)
    if found is None:
        raise typer.BadParameter(f"--gpu: expected a GPU of qkernels/roofline.py, got {gpu!r}")
    print(f"Least microseconds on an {found.name}, and what limits them, by M.\n")
    print("| shape | format | " + " | ".join(f"M={m}" for m in ROWS) + " |")
    print("| --- | --- |" + " ---: |" * len(ROWS))
    for spec in parse_specs(FORMATS):
        bits = bits_of(spec.name, spec.params)
        kind = {"w8a8": "int8", "fp8": "fp8"}.get(spec.name, "bf16")
        for n, k in shapes.shapes_of(sizes):
            cells = []
            for m in ROWS:
                at_best = roofline.estimate(found, (n, k), m, int(n * k * bits / 8), kind=kind)
                cells.append(f"{at_best.seconds * 1e6:.1f} {at_best.limit}")
            print(f"| {n}x{k} | {spec} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
