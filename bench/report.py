"""Write a page of pictures and tables from races' results: REPORT.md and PNG files beside the JSON.

python -m bench.report RESULTS.json... [--output FOLDER]
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from qkernels.benchmark import race

from . import targets

Rows = list[dict[str, Any]]
#: classes of M: name, fewest and most rows of x
CLASSES = (("decode", 1, 16), ("middle", 17, 256), ("prefill", 257, 10**9))


def timed(rows: Rows) -> Rows:
    """The rows that have a time and a time of the dense product to compare it with."""
    return [row for row in rows if row["chain"] is not None and row["speedup"] is not None]


def worst(report: dict[str, Any], most: int = 15) -> list[str]:
    """Lines for the console: the `most` results that miss their targets by most."""
    if report["environment"]["gpu"] is None:
        return []
    findings = [one for one in targets.findings(report) if one.measured is not None]
    short = [one for one in findings if (one.reached or 0) < 1]
    lines = [
        f"{one.reached:4.0%} of {one.target}: {one.format} has {one.measured:.2f} "
        f"at {one.where} ({one.kernel})"
        for one in short[:most]
    ]
    reached = len(findings) - len(short)
    return [f"{reached} of {len(findings)} targets are reached; worst first:", *lines]


def mean_speedups(rows: Rows) -> dict[str, dict[str, float]]:
    """Contestant -> class of M -> geometric mean of its speedups over bf16, over all shapes."""
    logarithms: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in timed(rows):
        name = next(name for name, low, high in CLASSES if low <= row["m"] <= high)
        logarithms[row["contestant"]][name].append(math.log(row["speedup"]))
    return {
        contestant: {name: math.exp(sum(logs) / len(logs)) for name, logs in by_class.items()}
        for contestant, by_class in logarithms.items()
    }


def verdict(reports: list[dict[str, Any]]) -> list[str]:
    """Opening lines of the page: each target at its worst, each peer, and what was not measured."""
    if all(report["environment"]["gpu"] is None for report in reports):
        return [
            "No GPU measured, so nothing can be said about the targets of bench/targets.md.",
            "",
        ]
    findings = [one for one in targets.findings(*reports) if one.measured is not None]
    by_target: dict[targets.Target, list[targets.Finding]] = defaultdict(list)
    for one in findings:
        by_target[one.target].append(one)
    reached = sum(all(one.reached >= 1 for one in ones) for ones in by_target.values())  # type: ignore[operator]
    missing = targets.unmeasured(*reports)
    lines = [
        f"**{reached} of {len(targets.TARGETS)} targets are reached by every format, "
        f"{len(by_target) - reached} are not, {len(missing)} were not measured.**",
        "",
        "## Targets, worst first",
        "",
        "Each at its worst format, shape and M, by the fastest of our kernels there.",
        "",
    ]
    body = []
    for target, ones in sorted(by_target.items(), key=lambda item: item[1][0].reached or 0):
        worst, fine = ones[0], sum((one.reached or 0) >= 1 for one in ones)
        mark = "" if fine == len(ones) else "**"
        body.append([
            str(target), f"{mark}{worst.reached:.0%}{mark}", f"{worst.measured:.2f}",
            worst.format, worst.where, worst.kernel, f"{fine} of {len(ones)}",
        ])  # fmt: skip
    body += [[str(target), "not measured", "", "", "", "", ""] for target in missing]
    headings = [
        "target",
        "reached",
        "measured",
        "worst format",
        "at",
        "kernel",
        "formats that reach it",
    ]
    lines += [table(headings, body), *_peer_lines(reports)]
    short = [one for one in findings if (one.reached or 0) < 1]
    lines += ["## Every format that falls short", ""]
    lines += [
        table(
            ["of the target", "target", "format", "measured", "at", "kernel"],
            [
                [
                    f"{one.reached:.0%}",
                    str(one.target),
                    one.format,
                    f"{one.measured:.2f}",
                    one.where,
                    one.kernel,
                ]
                for one in short
            ],
        )
        if short
        else "None that was measured.\n"
    ]
    return lines


def _peer_lines(reports: list[dict[str, Any]]) -> list[str]:
    """Lines about the peers by their worst ratio; a missing peer has one line that says why."""
    from . import peers

    known = [(one.name, one.group) for one in peers.contestants() if isinstance(one, peers.Peer)]

    def ratio(peer: targets.Peer) -> str:
        if peer.ratio is None:
            return "missing"
        return f"{peer.ratio:.2f}" if peer.ratio >= 1 else f"**{peer.ratio:.2f}**"

    body = [
        [one.name, one.group, ratio(one), one.where or one.why[:90]]
        for one in targets.peers(known, *reports)
    ]
    note = "Our fastest kernel's speed over the peer's where we are slowest: at least 1 is asked."
    return [
        "## Against peers, worst first",
        "",
        note,
        "",
        table(["peer", "format", "ratio", "at"], body),
    ]


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "| " + " | ".join(["---"] * len(headings)) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def write(reports: list[dict[str, Any]], page: Path, drawn: bool = False) -> Path:
    """Write the page, and with `drawn` its pictures beside it. Returns the page.

    Each ratio compares rows of one report.
    """
    rows: Rows = [row for report in reports for row in report["results"]]
    lines = ["# Race", ""]
    for where in {
        json.dumps(report["environment"], sort_keys=True): report["environment"]
        for report in reports
    }.values():
        lines += [", ".join(f"{key} {value}" for key, value in where.items() if value), ""]
    if all(report["environment"]["gpu"] is None for report in reports):
        lines += ["**No GPU measured: these times are the interpreter's and mean nothing.**", ""]
    copies = sorted(
        {f"{report['copy_bandwidth']:.0f}" for report in reports if report["copy_bandwidth"]}
    )
    if copies:
        lines += [f"A large copy moves {' and '.join(copies)} GB/s, reads and writes.", ""]
    lines += verdict(reports)
    if drawn:
        copy = next(
            (report["copy_bandwidth"] for report in reports if report["copy_bandwidth"]), None
        )
        for name in pictures(rows, copy, page):
            lines += [f"![{name}]({name})", ""]
    lines += [
        "## Speed against torch bf16",
        "",
        "Geometric mean over all shapes, by rows of x.",
        "",
    ]
    names = [name for name, _, _ in CLASSES]
    body = [
        [who, *(f"{by_class[name]:.2f}" if name in by_class else "" for name in names)]
        for who, by_class in mean_speedups(rows).items()
    ]
    headings = [f"{n}, M {a} to {b}" if b < 10**9 else f"{n}, M from {a}" for n, a, b in CLASSES]
    lines += [table(["contestant", *headings], body)]
    failed = sorted({(r["contestant"], r["group"], r["failed"]) for r in rows if r["failed"]})
    if failed:
        lines += [
            "## Not timed",
            "",
            table(["contestant", "format", "why"], [list(item) for item in failed]),
        ]
    lines += ["## Every time", "", table(*_table_of_times(rows))]
    page.write_text("\n".join(lines))
    return page


def _table_of_times(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table that holds every timed row."""
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
            row["contestant"], str(row["n"]), str(row["k"]), str(row["m"]),
            number(row, "chain", ".1f"), number(row, "spread", ".1f"), number(row, "alone", ".1f"),
            number(row, "speedup", ".2f"), number(row, "bandwidth", ".0f"),
            number(row, "tflops", ".1f"), number(row, "predicted", ".1f"),
            row["limit"], number(row, "error", ".1e"),
        ]
        for row in timed(rows)
    ]  # fmt: skip
    return headings, body


def _roof(row: dict[str, Any]) -> float:
    """TFLOP/s that the predicted time would give."""
    return 2 * row["m"] * row["n"] * row["k"] / row["predicted"] / 1e6


def _families(rows: Rows) -> dict[str, Rows]:
    """Family of bench/targets.md -> rows to draw: our fastest kernels and their peers.

    There is one row of ours for each format and M, renamed to "ours FORMAT". A peer's rows are
    renamed to "PEER [FORMAT]".
    """
    families: dict[str, Rows] = {}
    for family, belongs in [*targets.FAMILIES.items()][:-1]:
        ours: dict[tuple[str, int], dict[str, Any]] = {}
        for row in rows:
            place = race.ours(row["contestant"])
            if place is None or place[0] == "reference":
                continue
            spec = place[1]
            if belongs(targets._spec_of(spec)):
                fastest = ours.get((spec, row["m"]))
                if fastest is None or row["chain"] < fastest["chain"]:
                    ours[spec, row["m"]] = {**row, "contestant": f"ours {spec}"}
        groups = {row["group"] for row in ours.values()}
        others = [
            {**r, "contestant": f"{r['contestant']} [{r['group']}]"}
            for r in rows
            if r["group"] in groups and not r["contestant"].startswith("qkernels ")
        ]
        if ours:
            families[family] = [*ours.values(), *others]
    return families


def pictures(rows: Rows, copy_bandwidth: float | None, page: Path) -> list[str]:
    """Draw speedup, bandwidth and TFLOP/s over M: one file per shape, one row of plots per family.

    Solid lines are our kernels, dashed lines the peers, dotted lines the roofline and a copy.
    Returns the names of the files; none if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = []
    for n, k in sorted({(row["n"], row["k"]) for row in timed(rows)}):
        families = _families([row for row in timed(rows) if (row["n"], row["k"]) == (n, k)])
        if not families:
            continue
        figure, grid = pyplot.subplots(
            len(families), 3, figsize=(17, 3.6 * len(families)), layout="constrained", squeeze=False
        )
        figure.suptitle(f"{n} x {k}")
        for (family, here), axes in zip(families.items(), grid, strict=True):
            for who in dict.fromkeys(row["contestant"] for row in here):
                mine = sorted(
                    (row for row in here if row["contestant"] == who), key=lambda row: row["m"]
                )
                rows_of_x = [row["m"] for row in mine]
                style = {"marker": ".", "linestyle": "-" if who.startswith("ours ") else "--"}
                axes[0].plot(rows_of_x, [row["speedup"] for row in mine], label=who, **style)
                axes[1].plot(rows_of_x, [row["bandwidth"] for row in mine], **style)
                axes[2].plot(rows_of_x, [row["tflops"] for row in mine], **style)
            roofs = sorted((row for row in here if row["predicted"]), key=lambda row: row["m"])
            best = {row["m"]: max(_roof(r) for r in roofs if r["m"] == row["m"]) for row in roofs}
            axes[2].plot([*best], [*best.values()], color="black", linestyle=":")
            axes[0].axhline(1, color="black", linewidth=0.5)
            axes[0].set(title=f"{family}: speed against torch bf16", ylim=(0, None))
            if copy_bandwidth:
                axes[1].axhline(copy_bandwidth, color="black", linestyle=":")
            axes[1].set(title="packed bytes per second (GB/s)", ylim=(0, None))
            axes[2].set(title="TFLOP/s", yscale="log")
            every = sorted({row["m"] for row in here})
            for axis in axes:
                axis.set_xscale("log")
                axis.set_xticks(every, [str(m) for m in every])
                axis.set_xticks([], minor=True)
                axis.set_xlabel("M")
            axes[2].legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="upper left",
                           bbox_to_anchor=(1.01, 1.0))  # fmt: skip
        name = f"{n}x{k}.png"
        figure.savefig(page.parent / name, dpi=80)
        pyplot.close(figure)
        files.append(name)
    return files


def main(
    results: Annotated[
        list[Path],
        typer.Argument(help="Results of races on one machine, best of all from one run."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder; default: that of the first results.")
    ] = None,
) -> None:
    folder = output or results[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    reports = [json.loads(file.read_text()) for file in results]
    # the results of bench.llm may lie in the same folder, and are not races
    races = [report for report in reports if "copy_bandwidth" in report]
    print(write(races, folder / "REPORT.md", drawn=True))


if __name__ == "__main__":
    typer.run(main)
