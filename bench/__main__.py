"""Race our kernels against torch and against other projects' kernels.

    python -m bench --suite weight_only --shapes square,llama-3-8b --output results/
    TRITON_INTERPRET=1 python -m bench --tiny       # without a GPU: the times mean nothing

Every contestant quantizes each weight. Each product is checked before it is timed. Each call is
replayed from a CUDA graph that rotates among copies of the weight, so that no copy is found in the
L2 cache. All of this happens in worker processes, so a kernel that hangs or breaks its process
loses only its own results.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qkernels.benchmark import race, shapes

from . import peers, report, supervisor, worker


def main(
    suite: Annotated[
        str, typer.Option(help=f"all, or some of {', '.join(shapes.SUITES)}, or formats.")
    ] = "all",
    sizes: Annotated[
        str, typer.Option("--shapes", help="Models, or NxK, separated by commas.")
    ] = "square,llama-3-8b",
    rows: Annotated[str, typer.Option(help="Values of M.")] = ",".join(map(str, shapes.ROWS)),
    backend: Annotated[
        str, typer.Option(help="triton, cuda or reference; several with commas.")
    ] = "triton",
    with_peers: Annotated[
        str,
        typer.Option(
            "--peers", help="all, none, some of the files in bench/peers, or modules like them."
        ),
    ] = "all",
    repeats: int = 20,
    deadline: Annotated[
        float, typer.Option(help="Seconds after which the race stops and reports.")
    ] = 1e9,
    jobs: Annotated[
        int, typer.Option(help="Processes that compile Triton kernels beforehand.")
    ] = 1,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Two small shapes, for machines without a GPU.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for NAME.json and NAME.md.")] = None,
    page: Annotated[
        bool, typer.Option(help="Write NAME.md; bench.report can do it later, anywhere.")
    ] = True,
    name: str = "race",
) -> None:
    """Race every contestant on every shape."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        raise typer.BadParameter("no CUDA device is visible; --tiny runs the same code on the CPU")
    sizes, rows, repeats = (
        ("tiny", ",".join(map(str, shapes.TINY_ROWS)), 1) if tiny else (sizes, rows, repeats)
    )
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _stop)
    try:
        field = worker.contestants(suite, backend, with_peers, tiny)
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    counts = [int(m) for m in rows.split(",")]
    cases = [
        (number, n, k, race.taken(one, (n, k), counts))
        for n, k in shapes.shapes_of(sizes)
        for number, one in enumerate(field)
    ]
    cases = [case for case in cases if case[3]]
    job = worker.Job(
        suite, backend, with_peers, tiny, device, repeats, cases, {}, copy=device != "cpu"
    )
    if device != "cpu" and "cuda" in backend.split(","):
        _build()  # here, because a worker that compiles for a minute would seem to hang
    if jobs > 1 and device != "cpu":
        # A peer compiles much for each M, so each M is a case; one kernel of ours serves many.
        compiled = [
            (number, n, k, part)
            for number, n, k, counted in cases
            if field[number].compiles
            for part in (
                [[m] for m in counted] if isinstance(field[number], peers.Peer) else [counted]
            )
        ]
        supervisor.warm(job, compiled, jobs, deadline * 0.4, say)
    results = Results(output, name, page)
    try:
        for result in supervisor.run(job, field, started + deadline, say):
            results.add(result)
    except KeyboardInterrupt:
        say("stopped")
    results.close()
    wrong = [
        row
        for row in results.rows
        if row.failed and row.contestant.startswith(("qkernels", "torch bf16"))
    ]
    raise typer.Exit(1 if wrong else 0)


def _build() -> None:
    """Compile the CUDA extension if there is none; if that fails, print the end of the message."""
    from qkernels.backends.cuda import build

    try:
        build.extension()
    except RuntimeError as error:
        say(str(error)[-2000:])


def say(text: str) -> None:
    print(text, flush=True)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


class Results:
    """The rows of a race so far.

    They are written to `output`/`name`.json after each contestant, so that a race that is cut short
    leaves its results. Each contestant and shape gets one line on the console.
    """

    def __init__(self, output: Path | None, name: str, page: bool = True) -> None:
        self.output, self.name, self.page = output, name, page
        self.rows: list[race.Row] = []
        self.copy: float | None = None
        self.environment = race.environment()
        self._shown = 0
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)

    def add(self, result: race.Row | float) -> None:
        """result: a row, or the GB/s of a large copy."""
        if not isinstance(result, race.Row):
            self.copy = result
            say(f"a large copy moves {result:.0f} GB/s, reads and writes")
            return
        if self.rows and _place(self.rows[-1]) != _place(result):
            self.show()
        self.rows.append(result)

    def show(self) -> None:
        """Print and write the rows since the last call: those of one contestant on one shape."""
        rows, self._shown = self.rows[self._shown :], len(self.rows)
        if rows:
            say(line(rows, self.copy))
            self.write()

    def report(self) -> dict[str, Any]:
        return race.report_of(self.rows, self.copy, self.environment)

    def write(self) -> None:
        if self.output is not None:
            supervisor.write(
                self.output / f"{self.name}.json", json.dumps(self.report(), indent=1) + "\n"
            )

    def close(self) -> None:
        self.show()
        self.write()
        if self.output is not None and self.page:
            print(report.write([self.report()], self.output / f"{self.name}.md"))
        for text in report.worst(self.report()):
            say(text)


def _place(row: race.Row) -> tuple[str, str, int, int]:
    return row.contestant, row.group, row.n, row.k


def line(rows: list[race.Row], copy: float | None) -> str:
    """The console line of one contestant on one shape.

    For each M: microseconds, speed against bf16, percentage of the copy bandwidth.
    """
    first, cells = rows[0], []
    who = first.contestant.removeprefix("qkernels ")
    who += "" if first.contestant.startswith(("qkernels", "torch bf16")) else f" [{first.group}]"
    for row in rows:
        if row.chain is None:
            cells.append(
                f"M{row.m} {row.failed if row is first or row.failed != first.failed else '-'}"
            )
            continue
        speed = "" if row.speedup is None else f" {row.speedup:.2f}x"
        percent = "" if not copy or row.bandwidth is None else f" {row.bandwidth / copy:.0%}"
        cells.append(f"M{row.m} {row.chain:.1f}us{speed}{percent}{' eager' if row.eager else ''}")
    return f"{first.n}x{first.k} {who}: " + " | ".join(cells)


if __name__ == "__main__":
    typer.run(main)
