"""Predict the results of the plan's calls to a GPU; afterwards, compare results with predictions.

    python -m bench.predictions > bench/results/predictions.md
    python -m bench.predictions --beside OUT/race.json --beside OUT/llama.json

"at best" is the roofline: bytes, operations, one launch. "expected" is "at best" times a factor
from the last race (--last), for the same format and the nearest M: the time of the faster of the
CUDA and the Triton kernel there, over the roofline's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from qkernels import formats
from qkernels.backends import roofline
from qkernels.benchmark import race, shapes
from qkernels.quantizers.specs import parse_specs

from . import llm
from .gpu import plan
from .model import bytes_per_weight

LAST = Path(__file__).parent / "results" / "2026-11-27-h200" / "race.json"
#: seconds that the rest of a layer (attention, norms) takes for one token in a CUDA graph: eight
#: small kernels
BESIDE_LINEARS = 16e-6


class Time(NamedTuple):
    """Seconds at best, expected seconds, and what limits the time at best."""

    best: float
    expected: float
    limit: str


@lru_cache(maxsize=32)
def _bits(spec: str) -> tuple[float, str]:
    """Bytes per weight of a format, and the dtype that the tensor cores multiply."""
    parsed = parse_specs(spec)[0]
    params = {**formats.get(parsed.name).defaults, **parsed.params}
    return bytes_per_weight(parsed.name, parsed.params), roofline.operands(
        parsed.name, (1024, 1024), params
    )


class Predictor:
    """Predicts times on `gpu`.

    last: report of a race, which gives the factors between measured times and the roofline's.
    """

    def __init__(self, gpu: roofline.Gpu, last: dict[str, Any]) -> None:
        self.gpu = gpu
        measured_on = roofline.find(str(last["environment"]["gpu"])) or gpu
        #: format -> M -> measured time over the roofline's
        self.factors: dict[str, dict[int, float]] = {}
        for row in last["results"]:
            spec = _spec_of(row["contestant"])
            if spec is None or row["chain"] is None:
                continue
            best = self._roofline(spec, (row["n"], row["k"]), row["m"], measured_on)
            by_rows = self.factors.setdefault(spec, {})
            by_rows[row["m"]] = min(
                by_rows.get(row["m"], math.inf), row["chain"] * 1e-6 / best.seconds
            )

    def _roofline(
        self, spec: str, shape: tuple[int, int], m: int, gpu: roofline.Gpu | None = None
    ) -> roofline.Estimate:
        nbytes, kind = _bits(spec)
        return roofline.estimate(
            gpu or self.gpu, shape, m, int(nbytes * shape[0] * shape[1]), kind=kind
        )

    def product(self, spec: str, shape: tuple[int, int], m: int) -> Time:
        """Time of one product; `expected` is NaN for a format that the last race had not."""
        best = self._roofline(spec, shape, m)
        factors = self.factors.get(spec)
        if not factors:
            return Time(best.seconds, math.nan, best.limit)
        nearest = min(factors, key=lambda rows: abs(math.log(rows / m)))
        return Time(best.seconds, best.seconds * factors[nearest], best.limit)

    def model(self, spec: str, batch: int, rows: int) -> tuple[float, float]:
        """Seconds of one forward pass of plan.MODEL_SIZE, at best and expected.

        rows: tokens in all. rows == batch is a decode step after PROMPT tokens; otherwise the pass
        is a prefill.
        """
        sizes = llm.SIZES[plan.MODEL_SIZE]
        hidden, layers, heads = (
            sizes["hidden_size"],
            sizes["num_hidden_layers"],
            sizes["num_attention_heads"],
        )
        times = [self.product(spec, shape, rows) for shape in llm.linear_shapes(plan.MODEL_SIZE)]
        each = [2, 2, 2, 1]  # query and output, key and value, gate and up, down
        head = self.product("bf16", (sizes["vocab_size"], hidden), batch)
        slower = 2.0
        if rows == batch:  # decode reads the keys and values of the prompt
            # With a mask, transformers copies them for each query head: reads them once, writes
            # and reads 4 copies.
            slower = 1 + 2 * heads / sizes["num_key_value_heads"]
            width = hidden // heads * sizes["num_key_value_heads"]
            attention = (
                4
                * width
                * plan.PROMPT
                * batch
                / (self.gpu.bandwidth * 1e9 * roofline.COPY_FRACTION)
            )
        else:  # causal attention: two products for half of all pairs
            attention = (
                2 * plan.PROMPT * rows * hidden / (self.gpu.bf16 * 1e12 * roofline.MATMUL_FRACTION)
            )
        best = sum(n * time.best for n, time in zip(each, times, strict=True)) + attention
        expected = (
            sum(n * time.expected for n, time in zip(each, times, strict=True)) + slower * attention
        )
        return layers * best + head.best, layers * (expected + BESIDE_LINEARS) + head.expected


def _spec_of(contestant: str) -> str | None:
    """The format of our kernel, or "bf16" for torch's dense product.

    None for a peer and for the reference backend.
    """
    if contestant == race.Dense.name:
        return "bf16"
    place = race.ours(contestant)
    return place[1] if place is not None and place[0] != "reference" else None


def races(predictor: Predictor) -> Iterator[str]:
    """Lines of Markdown: microseconds at best and expected, for each product of the call "race"."""
    for name in plan.CALLS["race"]:
        raced = plan.PARTS[name].race
        if raced is None:
            continue
        yield "| shape | format | " + " | ".join(f"M={m}" for m in raced.counts) + " |"
        yield "| --- | --- |" + " ---: |" * len(raced.counts)
        for shape in shapes.shapes_of(raced.sizes):
            for spec in ("bf16", *map(str, parse_specs(raced.suite))):
                times = [predictor.product(spec, shape, m) for m in raced.counts]
                cells = [f"{t.best * 1e6:.1f} / {t.expected * 1e6:.1f}" for t in times]
                yield f"| {shape[0]}x{shape[1]} | {spec} | " + " | ".join(cells) + " |"
        yield ""


def models(predictor: Predictor) -> Iterator[str]:
    """Lines of Markdown: tokens a second at best and expected, for the call "model"."""
    heads = [f"decode, batch {batch}" for batch in plan.BATCHES]
    yield "| format | " + " | ".join(heads) + f" | prefill of {plan.PROMPT} |"
    yield "| --- |" + " ---: |" * (len(heads) + 1)
    for spec in plan.MODEL_FORMATS:
        passes = [(batch, batch) for batch in plan.BATCHES] + [(1, plan.PROMPT)]
        cells = []
        for batch, rows in passes:
            best, expected = predictor.model(spec, batch, rows)
            cells.append(f"{rows / best:.0f} / {rows / expected:.0f}")
        yield f"| {spec} | " + " | ".join(cells) + " |"


def instructions(gpu: roofline.Gpu) -> Iterator[str]:
    """Lines of Markdown: microseconds to issue the instructions of Triton kernels at M = 1.

    Beside them, the microseconds to move the bytes.
    """
    from .static import decode

    yield "| format | instructions a weight | to issue, us | bytes, us |"
    yield "| --- | ---: | ---: | ---: |"
    specs = {"gptq:bits=4,group_size=128", "nf4:block_size=64", "q4_k"}
    for spec, count, issue, memory in decode.rows(gpu, (8192, 8192), specs):
        yield f"| {spec} | {count:.2f} | {issue:.1f} | {memory:.1f} |"


def beside(predictor: Predictor, report: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """Pairs of (measured over expected time, line that says so).

    Of a race, for the faster of our two kernels of each product; of bench.llm's results, for each
    model.
    """
    fastest: dict[tuple[str, int, int, int], dict[str, Any]] = {}
    for row in report["results"]:
        if "decode" in row:
            yield from _beside_model(predictor, row)
            continue
        spec = _spec_of(row["contestant"])
        if spec is None or row["chain"] is None:
            continue
        place = (spec, row["n"], row["k"], row["m"])
        if place not in fastest or row["chain"] < fastest[place]["chain"]:
            fastest[place] = row
    for (spec, n, k, m), row in fastest.items():
        expected = predictor.product(spec, (n, k), m).expected * 1e6
        text = f"{row['contestant']} {n}x{k} M={m}: {expected:.1f} us, {row['chain']:.1f}"
        yield row["chain"] / expected, text


def _beside_model(predictor: Predictor, row: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """The pairs of `beside` for one row of bench.llm's results."""
    passes = [("decode", row["batch"], row["decode"].get("graph"))]
    if row["batch"] == 1:
        passes.append(("prefill", row["prompt"], row["prefill"]))
    for what, rows, speed in passes:
        if speed:
            expected = rows / predictor.model(row["format"], row["batch"], rows)[1]
            text = (
                f"{row['format']} {what}, batch {row['batch']}: "
                f"{expected:.0f} tokens/s, {speed:.0f}"
            )
            yield expected / speed, text


def main(
    gpus: Annotated[
        str, typer.Option("--gpu", help="Names in qkernels/backends/roofline.py.")
    ] = "H200,H100",
    last: Annotated[Path, typer.Option(help="Race that the factors come from.")] = LAST,
    runs: Annotated[
        list[Path], typer.Option("--beside", help="Results to compare with predictions.")
    ] = [],  # noqa: B006
) -> None:
    report = json.loads(last.read_text())
    if runs:
        _print_beside(report, [json.loads(run.read_text()) for run in runs])
        return
    where = report["environment"]
    print("Predictions by `python -m bench.predictions`: at best / expected. Factors are of")
    print(f"`{last.parent.name}/{last.name}` ({where['gpu']}, {where['date']}).")
    for name in gpus.split(","):
        gpu = roofline.find(name)
        if gpu is None:
            raise typer.BadParameter(
                f"--gpu: expected GPUs of qkernels/backends/roofline.py, got {name!r}"
            )
        predictor = Predictor(gpu, report)
        print(f"\n## {gpu.name}: microseconds a product, in a chain\n")
        print("\n".join(races(predictor)))
        print(f"## {gpu.name}: what machine code says of M = 1 (Triton, sm_90)\n")
        print("\n".join(instructions(gpu)))
        print(f"\n## {gpu.name}: tokens a second of Llama-3-{plan.MODEL_SIZE}'s shape\n")
        print("\n".join(models(predictor)))


def _print_beside(last: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    """Print each result beside its prediction for the same GPU, the largest miss first."""
    lines: list[tuple[float, str]] = []
    for report in reports:
        gpu = roofline.find(str(report["environment"]["gpu"]))
        if gpu is None:
            raise typer.BadParameter(
                f"--beside: measured on {report['environment']['gpu'] or 'no GPU'}"
            )
        lines += beside(Predictor(gpu, last), report)
    print("measured / expected time; then the expected value, and the measured one:")
    for ratio, text in sorted(lines, key=lambda line: -abs(math.log(line[0]))):
        print(f"{ratio:5.2f}  {text}")


if __name__ == "__main__":
    typer.run(main)
