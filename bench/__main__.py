"""Race our kernels against torch and against everybody else's.

    python -m bench --suite weight_only --shapes square,llama-3-8b --output results/
    TRITON_INTERPRET=1 python -m bench --tiny        the same path without a GPU; its times mean nothing

Each weight is quantized by every contestant, each product is checked before it is timed, and each call is
replayed from a CUDA graph that rotates among copies of the weight, so that none is found in the L2 cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qkernels.benchmark import race, shapes

from . import peers, report


def main(
    suite: Annotated[
        str, typer.Option(help=f"all, or some of {', '.join(shapes.SUITES)}, or formats.")
    ] = "all",
    sizes: Annotated[
        str, typer.Option("--shapes", help="Models, or NxK, separated by commas.")
    ] = "square,llama-3-8b",
    rows: Annotated[str, typer.Option(help="Values of M.")] = ",".join(map(str, shapes.ROWS)),
    backend: Annotated[str, typer.Option(help="triton, cuda or reference; several with commas.")] = "triton",
    with_peers: Annotated[
        str, typer.Option("--peers", help="all, none, or some of the files in bench/peers.")
    ] = "all",
    repeats: int = 20,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Two small shapes, for machines without a GPU.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for race.json and REPORT.md.")] = None,
) -> None:
    """Race every contestant on every shape."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        raise typer.BadParameter("no CUDA device is visible; --tiny walks the same path on the CPU")
    sizes, rows, repeats = (
        ("tiny", ",".join(map(str, shapes.TINY_ROWS)), 1) if tiny else (sizes, rows, repeats)
    )
    group = {"group_size": 64} if tiny else {}
    ours = [
        race.Ours(name, {**params, **{k: v for k, v in group.items() if k in params}}, chosen)
        for chosen in backend.split(",")
        for name, params in shapes.formats_of(suite)
    ]
    others = (
        []
        if with_peers == "none"
        else peers.contestants(None if with_peers == "all" else set(with_peers.split(",")))
    )
    groups = {contestant.group for contestant in [*ours, *others] if contestant.name.startswith("qkernels")}
    others = [peer for peer in others if tiny or peer.group in groups]
    settings = race.Settings(device, repeats)
    console = Console(stderr=True)
    found = []
    for row in race.run(
        [*ours, *others], shapes.shapes_of(sizes), [int(m) for m in rows.split(",")], settings
    ):
        found.append(row)
        said = row.failed or f"{row.chain:.1f} us, {row.speedup:.2f}x bf16, {row.bandwidth:.0f} GB/s"
        console.print(f"{row.n}x{row.k} M={row.m} {row.contestant}: {said}", highlight=False)
    result = race.report_of(found, settings)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "race.json").write_text(json.dumps(result, indent=1) + "\n")
        print(report.write(result, output))
    wrong = [row for row in found if row.failed and row.contestant.startswith(("qkernels", "torch bf16"))]
    for row in wrong:
        console.print(f"[red]{row.contestant} {row.n}x{row.k} M={row.m}: {row.failed}", highlight=False)
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
