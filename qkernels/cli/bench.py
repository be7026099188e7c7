"""`qkernels bench`: times the products of each format on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import common

COLUMNS = [
    "format",
    "N",
    "K",
    "M",
    "kernel",
    "us",
    "x bf16",
    "GB/s",
    "TFLOP/s",
    "predicted us",
    "error",
]


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    formats: Annotated[
        str,
        typer.Option(
            help='Suites (weight_only, eight_bit, gguf, lowbit, all) or a list such as "nf4,awq".'
        ),
    ] = "weight_only,eight_bit",
    shapes: Annotated[
        str, typer.Option(help="square, llama-3-8b, llama-3-70b, qwen3-32b, tiny, or NxK.")
    ] = "square",
    rows: Annotated[str, typer.Option(help="Rows of x, M.")] = "1,16,64,256,4096",
    backend: Annotated[str, typer.Option(help="triton, cuda, reference or auto.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1)] = 20,
    json: common.JsonOption = False,
) -> None:
    """Time fused products against torch's bf16 matmul and the roofline. Each is checked before it
    is timed.

    Without a GPU it times the reference on the CPU, which tells nothing about kernels.

    Example: qkernels bench --formats "nf4,gptq:bits=4,group_size=128" --shapes llama-3-8b --rows 1
    """
    import torch

    from ..benchmark import race, timing
    from ..benchmark import shapes as cases

    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = _rows(rows)
    contestants = [race.Ours(name, params, backend) for name, params in cases.formats_of(formats)]
    sizes = cases.shapes_of(shapes)
    settings = race.Settings(device, repeats)
    total = len(sizes) * len(counts) * (len(contestants) + 1)
    results = []
    with common.progress(f"Timing {len(contestants)} formats on {len(sizes)} shapes") as report:
        for row in race.run(contestants, sizes, counts, settings):
            results.append(row)
            report(len(results), total)
    if json:
        common.write_json(race.report_of(results, timing.copy_bandwidth(device)))
    else:
        common.write_table(f"on {device}", COLUMNS, [_cells(row) for row in results])
    failed = [row for row in results if row.failed]
    if failed:
        first = failed[0]
        raise ValueError(f"{first.contestant} {first.n}x{first.k} M={first.m}: {first.failed}")


def _rows(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise ValueError(f"--rows: expected numbers from 1, separated by commas, got {text!r}")
    return counts


def _cells(row: Any) -> list[str]:
    def number(name: str, form: str) -> str:
        value = getattr(row, name)
        return "" if value is None else format(value, form)

    return [
        row.contestant.split(" ", 2)[-1],
        *(number(name, "d") for name in ("n", "k", "m")),
        number("kernel", "s"),
        number("chain", ".1f"),
        number("speedup", ".2f"),
        number("bandwidth", ".0f"),
        number("tflops", ".1f"),
        number("predicted", ".1f"),
        number("error", ".1e"),
    ]
