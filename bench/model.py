"""Print the roofline's time of each product on known GPUs, or compare a race's results with it.

python -m bench.model --shapes llama-3-8b --formats "nf4,w8a8"
python -m bench.model --results RESULTS.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import qkernels as qk
from qkernels import formats
from qkernels.backends import roofline
from qkernels.benchmark import shapes
from qkernels.quantizers.specs import FormatSpec


def bytes_per_weight(name: str, params: dict[str, object]) -> float:
    """Packed bytes of a large matrix, divided by its number of weights."""
    side = 1024
    return qk.quantize(torch.randn(side, side), name, **params).nbytes / side**2


def predicted(sizes: str, names: str, rows: str) -> Table:
    """Microseconds at best and what limits them, for each shape, format, M and GPU."""
    table = Table(
        "format", "N", "K", "M", *(gpu.name for gpu in roofline.GPUS), title="least time, us"
    )
    for n, k in shapes.shapes_of(sizes):
        for name, params in shapes.formats_of(names):
            fmt = formats.get(name)
            kind = roofline.operands(name, (n, k), {**fmt.defaults, **params})
            nbytes = int(bytes_per_weight(name, params) * n * k)
            for m in (int(part) for part in rows.split(",")):
                estimates = [
                    roofline.estimate(gpu, (n, k), m, nbytes, kind=kind) for gpu in roofline.GPUS
                ]
                cells = [f"{one.seconds * 1e6:.1f} {one.limit}" for one in estimates]
                table.add_row(str(FormatSpec(name, params)), str(n), str(k), str(m), *cells)
    return table


def compared(results: Path) -> Table:
    """Predicted and measured time of each row of a race, the worst ratio first."""
    report = json.loads(results.read_text())
    gpu = report["environment"]["gpu"]
    table = Table(
        "contestant",
        "N",
        "K",
        "M",
        "predicted us",
        "measured us",
        "measured / predicted",
        title=gpu,
    )
    rows = [row for row in report["results"] if row["chain"] and row["predicted"]]
    for row in sorted(rows, key=lambda row: row["chain"] / row["predicted"], reverse=True):
        table.add_row(
            row["contestant"], str(row["n"]), str(row["k"]), str(row["m"]),
            f"{row['predicted']:.1f}", f"{row['chain']:.1f}",
            f"{row['chain'] / row['predicted']:.2f}",
        )  # fmt: skip
    if not rows:
        raise typer.BadParameter(f"{results}: no predictions in it: measured on {gpu or 'no GPU'}")
    return table


def main(
    sizes: Annotated[str, typer.Option("--shapes")] = "square",
    names: Annotated[str, typer.Option("--formats", help="Suites, or formats.")] = "all",
    rows: str = "1,16,64,256,4096",
    results: Annotated[Path | None, typer.Option(help="Results of a race on a known GPU.")] = None,
) -> None:
    Console(width=150).print(compared(results) if results else predicted(sizes, names, rows))


if __name__ == "__main__":
    typer.run(main)
