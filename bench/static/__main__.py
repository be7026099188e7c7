"""Compile every Triton kernel for every architecture, without a GPU, and print what it uses.

    python -m bench.static                          # all kernels, as a table
    python -m bench.static --arch 90 --markdown
    python -m bench.static --subset --json facts.json

The exit code is 1, with one line for each fault on stderr, if a kernel spills registers, does not
fit in shared memory, or lacks the tensor-core instruction that it should have.

`load B`: bytes of a thread's widest load of packed weights. `instr/weight`: instructions of the
main loop, over all threads, per decoded weight. An H200 can issue 3.5 instructions while its memory
delivers a 4-bit weight at 4.3 TB/s, 7 for an 8-bit weight, and 8 while its tensor cores multiply a
weight with 128 rows of x in 16 bits. A kernel with more instructions waits for them instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .facts import ARCHITECTURES, Facts, failures, families
from .workers import compile_all, listed

HEADINGS = (
    "kernel", "job", "sm", "regs", "spills", "shared KiB", "blocks/SM", "warps/SM", "limit",
    "tensor core", "load B", "instr/weight",
)  # fmt: skip


def row(facts: Facts) -> list[str]:
    """Cells of the table, one for each of HEADINGS."""
    if facts.error:
        return [
            facts.kernel,
            facts.label,
            str(facts.arch),
            "does not compile",
            *[""] * (len(HEADINGS) - 4),
        ]
    return [
        facts.kernel,
        facts.label,
        str(facts.arch),
        str(facts.registers),
        str(facts.spills),
        f"{facts.shared / 1024:.0f}",
        str(facts.blocks),
        str(facts.warps),
        facts.limit,
        facts.tensor_core or "none",
        "" if facts.weight_load is None else str(facts.weight_load),
        "" if facts.per_weight is None else f"{facts.per_weight:.2f}",
    ]


def show(results: list[Facts], markdown: bool) -> None:
    """Print the table."""
    if markdown:
        print("| " + " | ".join(HEADINGS) + " |")
        print("| --- | --- |" + " ---: |" * 6 + " --- | --- |" + " ---: |" * 2)
        for facts in results:
            print("| " + " | ".join(row(facts)) + " |")
        return
    table = Table(*HEADINGS)
    for facts in results:
        table.add_row(*row(facts), style="red" if failures(facts) else None)
    Console(width=190).print(table)


def environment() -> dict[str, str]:
    import torch
    import triton

    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", type=int, action="append", choices=ARCHITECTURES, help="repeatable; all"
    )
    parser.add_argument("--kernel", metavar="NAME", help="only kernels whose name contains this")
    parser.add_argument(
        "--job",
        metavar="TEXT",
        action="append",
        help="repeatable; only jobs whose label contains one of these",
    )
    parser.add_argument("--subset", action="store_true", help="the few jobs that tests compile")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all facts here")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="write TTGIR, PTX and SASS there"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keep compiled kernels there and compile only what has changed",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (2)")
    args = parser.parse_args()
    # Before triton is imported here or in a worker: the interpreter's kernels cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)

    tasks = [
        (family, arch, number)
        for family in families()
        for arch in sorted(set(args.arch or ARCHITECTURES))
        for number, job in enumerate(listed(family, arch, args.subset))
        if (args.kernel or "") in job.kernel and any(text in job.label for text in args.job or [""])
    ]
    if not tasks:
        parser.error("no kernel or job has such a name")
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    results = compile_all(tasks, args.subset, args.workers, args.keep, args.cache)
    show(results, args.markdown)
    if args.json:
        report = {"environment": environment(), "results": [asdict(facts) for facts in results]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [line for facts in results for line in failures(facts)]
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
