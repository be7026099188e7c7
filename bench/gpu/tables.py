"""What a call prints last: each part's result in few characters, then how each part ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import plan


def of(out: Path, ended: Mapping[str, tuple[str, float]], characters: int) -> str:
    """Results of the parts in `ended`, (how it ended, seconds) by name, from the files that they left in `out`."""
    end = [
        f"{name}: {how}, {took:.0f} s of {plan.PARTS[name].expected} expected"
        for name, (how, took) in ended.items()
    ]
    tail = "\n".join(["=== parts", *end])
    blocks = {}
    for name, (how, _) in ended.items():
        try:
            blocks[name] = _result(out, name)
        except Exception as error:  # a row that is not as expected must not hide the other parts
            blocks[name] = f"no table: {type(error).__name__}: {error}\n{_said(out, name)}"
        if (how != "right" and plan.PARTS[name].race is not None) or (name == "model" and how != "right"):
            blocks[name] += f"\n{how}; said last: {' '.join(_said(out, name)[-600:].split())}"
    room = characters - len(tail) - sum(len(name) + 6 for name in blocks)
    shown = []
    for number, (name, text) in enumerate(sorted(blocks.items(), key=lambda block: len(block[1]))):
        share = max(200, room // (len(blocks) - number))  # what short results leave is the long ones'
        text = _cut(text, share, plan.PARTS[name].tail)
        room -= len(text)
        shown.append((name, text))
    order = list(blocks)
    shown.sort(key=lambda block: order.index(block[0]))
    return "\n".join([f"=== {name}\n{text}" for name, text in shown] + [tail])


def _cut(text: str, most: int, tail: bool) -> str:
    """Whole lines of `text`, the first or the last of them, in at most `most` characters."""
    if len(text) <= most:
        return text
    mark = "(more in the files)"
    room = most - len(mark) - 1
    return (
        f"{mark}\n{text[-room:].split(chr(10), 1)[-1]}"
        if tail
        else f"{text[:room].rsplit(chr(10), 1)[0]}\n{mark}"
    )


def _result(out: Path, name: str) -> str:
    """A table where the part left data, else what its commands printed."""
    file = out / f"{name}.json"
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError):
        return _said(out, name)
    if name == "model":
        return _models(report["results"])
    if plan.PARTS[name].race is not None and report["results"]:
        return _races(report["results"], report["copy_bandwidth"])
    return _said(out, name)


def _said(out: Path, name: str) -> str:
    file = out / f"{name}.txt"
    return file.read_text(errors="replace").strip() if file.exists() else "nothing was printed"


def _races(rows: list[dict[str, Any]], copy: float | None) -> str:
    """Microseconds in a chain by M, a line for each shape and contestant, or why there are none. For the least M also
    the time alone, and the share of what a copy moves (`copy`, GB/s)."""
    counts = sorted({row["m"] for row in rows})
    lines: dict[tuple[int, int, str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["n"], row["k"], row["contestant"], row["group"]), {})[row["m"]] = row
    said = [] if copy is None else [f"a copy moves {copy:.0f} GB/s"]
    place = None
    for (n, k, who, group), by_rows in lines.items():
        if (n, k) != place:
            place = (n, k)
            said.append(f"{n}x{k}, us in a chain, M = {' '.join(map(str, counts))}")
        ours = who.startswith(("qkernels", "torch bf16"))
        cells = [_cell(by_rows.get(m)) for m in counts]
        if len(set(cells)) == 1 and all(row["failed"] for row in by_rows.values()):
            cells = cells[:1]
        first = by_rows.get(counts[0])
        if copy and first and not first["failed"]:
            cells.append(f"| alone {first['alone']:.1f}, {first['bandwidth'] / copy:.0%} of a copy")
        said.append(f"{who.removeprefix('qkernels ')}{'' if ours else f' [{group}]'}: {' '.join(cells)}")
    return "\n".join(said)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return str(row["failed"][:60]) or f"{row['chain']:.1f}"


def _models(rows: list[dict[str, Any]]) -> str:
    """Tokens a second, a line for each format and batch."""
    return "\n".join(
        f"{row['format']}, batch {row['batch']}: prefill of {row['prompt']} {row['prefill']:.0f}, "
        + ", ".join(f"decode ({mode}) {value:.1f}" for mode, value in row["decode"].items())
        + (
            f", {row['memory_weights']:.1f} GiB, at most {row['memory_peak']:.1f}"
            if row["memory_peak"]
            else ""
        )
        for row in rows
    )
