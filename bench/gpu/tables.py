"""The end of a call's output: each part's results in few characters, then how each part ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import plan


def of(out: Path, ended: Mapping[str, tuple[str, float]], characters: int) -> str:
    """The results of some parts as text, from the files that they left in `out`.

    ended: part -> (how it ended, seconds it took). characters: the most that the text may have.
    """
    end = [
        f"{name}: {how}, {took:.0f} s of {plan.PARTS[name].expected} expected"
        for name, (how, took) in ended.items()
    ]
    tail = "\n".join(["=== parts", *end])
    blocks = {}
    for name, (how, _) in ended.items():
        log = _log(out, name)
        try:
            table = _table(out / f"{name}.json")
        except Exception as error:  # an unexpected row must not hide the other parts
            table = f"no table: {type(error).__name__}: {error}\n{log}"
        blocks[name] = table or log
        if table is not None and how != "right":
            blocks[name] += f"\n{how}; said last: {' '.join(log[-600:].split())}"
    room = characters - len(tail) - sum(len(name) + 6 for name in blocks)
    shortest_first = sorted(blocks, key=lambda name: len(blocks[name]))
    for number, name in enumerate(shortest_first):
        # long results get the room that short ones leave
        share = max(200, room // (len(blocks) - number))
        blocks[name] = _cut(blocks[name], share, plan.PARTS[name].tail)
        room -= len(blocks[name])
    return "\n".join([f"=== {name}\n{text}" for name, text in blocks.items()] + [tail])


def _cut(text: str, most: int, tail: bool) -> str:
    """The first lines of `text`, or with `tail` the last, in at most `most` characters."""
    if len(text) <= most:
        return text
    mark = "(more in the files)"
    room = most - len(mark) - 1
    if tail:
        return f"{mark}\n{text[-room:].partition(chr(10))[2]}"
    return f"{text[:room].rpartition(chr(10))[0]}\n{mark}"


def _table(file: Path) -> str | None:
    """The table of a race's results or of bench.llm's; None if the file has neither."""
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    rows = report.get("results")
    if not rows:
        return None if rows is None else ""
    return _models(rows) if "decode" in rows[0] else _races(rows, report["copy_bandwidth"])


def _log(out: Path, name: str) -> str:
    """The output of a part."""
    file = out / f"{name}.txt"
    return file.read_text(errors="replace").strip() if file.exists() else "nothing was printed"


def _races(rows: list[dict[str, Any]], copy: float | None) -> str:
    """A line for each shape and contestant: microseconds in a chain by M, or why there are none.

    For the smallest M also the time alone, and the bandwidth as a percentage of `copy` (GB/s).
    """
    counts = sorted({row["m"] for row in rows})
    lines: dict[tuple[int, int, str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["n"], row["k"], row["contestant"], row["group"]), {})[row["m"]] = row
    output = [] if copy is None else [f"a copy moves {copy:.0f} GB/s"]
    place = None
    for (n, k, who, group), by_rows in lines.items():
        if (n, k) != place:
            place = (n, k)
            output.append(f"{n}x{k}, us in a chain, M = {' '.join(map(str, counts))}")
        ours = who.startswith(("qkernels", "torch bf16"))
        cells = [_cell(by_rows.get(m)) for m in counts]
        if len(set(cells)) == 1 and all(row["failed"] for row in by_rows.values()):
            cells = cells[:1]
        first = by_rows.get(counts[0])
        if copy and first and not first["failed"]:
            cells.append(f"| alone {first['alone']:.1f}, {first['bandwidth'] / copy:.0%} of a copy")
        output.append(
            f"{who.removeprefix('qkernels ')}{'' if ours else f' [{group}]'}: {' '.join(cells)}"
        )
    return "\n".join(output)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return str(row["failed"][:60]) or f"{row['chain']:.1f}"


def _models(rows: list[dict[str, Any]]) -> str:
    """Tokens a second, one line for each format and batch size."""
    lines = []
    for row in rows:
        cells = [f"prefill of {row['prompt']} {row['prefill']:.0f}"]
        cells += [f"decode ({mode}) {value:.1f}" for mode, value in row["decode"].items()]
        if row["memory_peak"]:
            cells.append(f"{row['memory_weights']:.1f} GiB, at most {row['memory_peak']:.1f}")
        lines.append(f"{row['format']}, batch {row['batch']}: {', '.join(cells)}")
    return "\n".join(lines)
