"""A page of pictures and tables from a race's results: REPORT.md and PNG files beside the JSON.

python -m bench.report RESULTS.json [--output FOLDER]
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import targets

Rows = list[dict[str, Any]]
#: name, least and most rows of x
CLASSES = (("decode", 1, 16), ("middle", 17, 256), ("prefill", 257, 10**9))


def timed(rows: Rows) -> Rows:
    return [row for row in rows if row["chain"] is not None]


def mean_speedups(rows: Rows) -> dict[str, dict[str, float]]:
    """Contestant -> class of M -> geometric mean of the speedups over bf16, all shapes."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in timed(rows):
        name = next(name for name, low, high in CLASSES if low <= row["m"] <= high)
        found[row["contestant"]][name].append(math.log(row["speedup"]))
    return {
        contestant: {name: math.exp(sum(logs) / len(logs)) for name, logs in by_class.items()}
        for contestant, by_class in found.items()
    }


def against_peers(rows: Rows) -> list[tuple[str, str, float, str]]:
    """(group, ours and the peer, our worst speed against it, where), worst first."""
    places: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in timed(rows):
        places[row["group"], row["n"], row["k"], row["m"]].append(row)
    worst: dict[tuple[str, str, str], tuple[float, str]] = {}
    for (group, n, k, m), found in places.items():
        ours = [row for row in found if row["contestant"].startswith("qkernels")]
        for peer in (row for row in found if not row["contestant"].startswith("qkernels")):
            for mine in ours:
                ratio = peer["chain"] / mine["chain"]
                key = (group, mine["contestant"], peer["contestant"])
                worst[key] = min(worst.get(key, (math.inf, "")), (ratio, f"{n}x{k}, M={m}"))
    listed = [(g, f"{mine} / {peer}", *value) for (g, mine, peer), value in worst.items()]
    return sorted(listed, key=lambda item: item[2])


def against_targets(report: dict[str, Any]) -> list[str]:
    """What falls short of DESIGN section 6, worst first, what reaches it, and what nobody measured."""
    lines = ["## What falls short", ""]
    if report["environment"]["gpu"] is None:
        return [*lines, "No GPU measured, so nothing can be said about the targets of DESIGN section 6.", ""]
    found = targets.findings(report)
    headings = ["target", "format", "measured", "of the target", "worst at", "kernel"]
    body = [
        [str(one.target), one.format, f"{one.measured:.2f}", f"{one.reached:.0%}", one.where, one.kernel]
        for one in found
    ]
    short = [row for one, row in zip(found, body, strict=True) if one.reached < 1]
    met = [row for one, row in zip(found, body, strict=True) if one.reached >= 1]
    lines += [
        "Each target at the worst shape and M, by the faster of our backends there; worst first.",
        "",
        table(headings, short) if short else "Nothing that was measured.\n",
    ]
    if met:
        lines += ["## What reaches its target", "", table(headings, met)]
    if missing := targets.unmeasured(report):
        lines += ["## Targets that this run did not measure", "", *(f"- {target}" for target in missing), ""]
    return lines


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "| " + " | ".join(["---"] * len(headings)) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def write(report: dict[str, Any], folder: Path) -> Path:
    """The page and its pictures, into `folder`; returns the page."""
    rows: Rows = report["results"]
    where = report["environment"]
    lines = ["# Race", "", ", ".join(f"{key} {value}" for key, value in where.items() if value), ""]
    if where["gpu"] is None:
        lines += ["**No GPU measured: these times are the interpreter's and mean nothing.**", ""]
    if report["copy_bandwidth"]:
        lines += [f"A large copy moves {report['copy_bandwidth']:.0f} GB/s, reads and writes.", ""]
    lines += against_targets(report)
    lines += ["## Speed against torch bf16", "", "Geometric mean over all shapes, by rows of x.", ""]
    speeds = mean_speedups(rows)
    names = [name for name, _, _ in CLASSES]
    body = [
        [who, *(f"{found[name]:.2f}" if name in found else "" for name in names)]
        for who, found in speeds.items()
    ]
    lines += [
        table(
            [
                "contestant",
                *(f"{n}, M {a} to {b}" if b < 10**9 else f"{n}, M from {a}" for n, a, b in CLASSES),
            ],
            body,
        )
    ]
    if peers := against_peers(rows):
        body = [[g, pair, f"{ratio:.2f}", place] for g, pair, ratio, place in peers]
        lines += [
            "## Against peers, where we are slowest",
            "",
            table(["format", "ours / theirs", "speed", "at"], body),
        ]
    for name in pictures(rows, report["copy_bandwidth"], folder):
        lines += [f"![{name}]({name})", ""]
    failed = sorted({(r["contestant"], r["failed"]) for r in rows if r["failed"]})
    if failed:
        lines += ["## Not timed", "", table(["contestant", "why"], [list(item) for item in failed])]
    lines += ["## Every time", "", table(*_all(rows))]
    page = folder / "REPORT.md"
    page.write_text("\n".join(lines))
    return page


def _all(rows: Rows) -> tuple[list[str], list[list[str]]]:
    headings = [
        "contestant",
        "N",
        "K",
        "M",
        "us",
        "spread",
        "alone",
        "x bf16",
        "GB/s",
        "TFLOP/s",
        "predicted us",
        "limit",
        "error",
    ]

    def number(row: dict[str, Any], key: str, form: str) -> str:
        return "" if row[key] is None else format(row[key], form)

    body = [
        [
            row["contestant"], str(row["n"]), str(row["k"]), str(row["m"]), number(row, "chain", ".1f"),
            number(row, "spread", ".1f"), number(row, "alone", ".1f"), number(row, "speedup", ".2f"),
            number(row, "bandwidth", ".0f"), number(row, "tflops", ".1f"), number(row, "predicted", ".1f"),
            row["limit"], number(row, "error", ".1e"),
        ]
        for row in timed(rows)
    ]  # fmt: skip
    return headings, body


def _roof(row: dict[str, Any]) -> float:
    """TFLOP/s at the predicted time."""
    return 2 * row["m"] * row["n"] * row["k"] / row["predicted"] / 1e6


def pictures(rows: Rows, copy_bandwidth: float | None, folder: Path) -> list[str]:
    """Speedup, bandwidth and TFLOP/s by M, one picture a shape; file names. None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = []
    for n, k in sorted({(row["n"], row["k"]) for row in timed(rows)}):
        here = [row for row in timed(rows) if (row["n"], row["k"]) == (n, k)]
        figure, axes = pyplot.subplots(1, 3, figsize=(20, 5), layout="constrained")
        for who in dict.fromkeys(row["contestant"] for row in here):
            mine = sorted((row for row in here if row["contestant"] == who), key=lambda row: row["m"])
            rows_of_x = [row["m"] for row in mine]
            axes[0].plot(rows_of_x, [row["speedup"] for row in mine], marker=".", label=who)
            axes[1].plot(rows_of_x, [row["bandwidth"] for row in mine], marker=".")
            axes[2].plot(rows_of_x, [row["tflops"] for row in mine], marker=".")
            if mine[0]["predicted"]:
                axes[2].plot(
                    rows_of_x, [_roof(row) for row in mine], color="black", linestyle=":", linewidth=0.5
                )
        axes[0].axhline(1, color="black", linewidth=0.5)
        axes[0].set(title=f"{n} x {k}: speed against torch bf16", xlabel="M", xscale="log", yscale="log")
        axes[1].set(title="packed bytes per second (GB/s)", xlabel="M", xscale="log")
        axes[2].set(title="TFLOP/s, dotted: roofline", xlabel="M", xscale="log", yscale="log")
        if copy_bandwidth:
            axes[1].axhline(copy_bandwidth, color="black", linestyle=":")
        figure.legend(loc="outside right", fontsize=7)
        name = f"{n}x{k}.png"
        figure.savefig(folder / name, dpi=80)
        pyplot.close(figure)
        files.append(name)
    return files


def main(
    results: Path, output: Annotated[Path | None, typer.Option(help="Folder; the results' own.")] = None
) -> None:
    folder = output or results.parent
    folder.mkdir(parents=True, exist_ok=True)
    print(write(json.loads(results.read_text()), folder))


if __name__ == "__main__":
    typer.run(main)
