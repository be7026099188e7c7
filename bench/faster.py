"""Print which of our backends was faster in a race, as the table of qkernels/backends/measured.py.

    python -m bench.faster bench/results/2026-11-27-h200/race.json

An entry (M, backend) covers every M up to it, down to the entry before. Where several formats or
shapes share a kind of kernel, the geometric mean of their ratios decides. CUDA must win by MARGIN,
because the CUDA extension has to be compiled.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from qkernels import formats
from qkernels.backends import measured
from qkernels.backends.problem import Problem
from qkernels.benchmark import race
from qkernels.quantizers.specs import parse_specs

#: speed of CUDA over Triton above which CUDA is chosen
MARGIN = 1.03


def table(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, str]]]:
    """Kind of kernel -> [(largest M, faster backend)], from the rows of races.

    Neighbouring M with the same faster backend share one entry.
    """
    times: dict[tuple[str, int], dict[str, dict[tuple[str, int, int], float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        place = race.ours(row["contestant"])
        if row["chain"] is None or place is None or place[0] not in ("cuda", "triton"):
            continue
        backend, spec = place
        kind = _kind(spec, (row["n"], row["k"]), row["m"])
        if kind is not None:
            times[kind, row["m"]][backend][spec, row["n"], row["k"]] = row["chain"]
    faster: dict[str, list[tuple[int, str]]] = {}
    for (kind, m), by_backend in sorted(times.items()):
        in_both = by_backend["cuda"].keys() & by_backend["triton"].keys()
        if not in_both:
            continue
        logs = [
            math.log(by_backend["triton"][place] / by_backend["cuda"][place]) for place in in_both
        ]
        winner = "cuda" if math.exp(sum(logs) / len(logs)) > MARGIN else "triton"
        entries = faster.setdefault(kind, [])
        if entries and entries[-1][1] == winner:
            entries.pop()
        entries.append((m, winner))
    return faster


def _kind(spec: str, shape: tuple[int, int], m: int) -> str | None:
    """The kind of kernel that multiplies this format on Hopper; None for a format without one."""
    parsed = parse_specs(spec)[0]
    fmt = formats.get(parsed.name)
    stored = {key: value for key, value in parsed.params.items() if key not in fmt.quantize_only}
    params = tuple(sorted(fmt.resolve(shape, stored).items()))
    return measured.kind_of(Problem(parsed.name, params, shape, m, torch.bfloat16, "cuda", (9, 0)))


def main(
    results: Annotated[list[Path], typer.Argument(help="Results of races on one GPU.")],
) -> None:
    reports = [json.loads(file.read_text()) for file in results]
    gpu = reports[0]["environment"]["gpu"]
    print(f'RUN, GPU, CAPABILITY = "{results[0].parent}", "{gpu}", (9, 0)')
    print("FASTER: dict[str, tuple[tuple[int, str], ...]] = {")
    for kind, entries in table([row for report in reports for row in report["results"]]).items():
        pairs = ", ".join(f'({m}, "{backend}")' for m, backend in entries) + "," * (
            len(entries) == 1
        )
        print(f'    "{kind}": ({pairs}),')
    print("}")


if __name__ == "__main__":
    typer.run(main)
