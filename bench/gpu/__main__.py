"""Run parts of the plan on a machine with a GPU. JSON and what was said go to OUT; a table is printed last.

    python -m bench.gpu --plan                 what there is, and how long it takes
    python -m bench.gpu OUT --call smoke       one call; .gpu/, which bench.gpu.parcel fills, is unpacked first
    python -m bench.gpu OUT --part smoke --part race --formats nf4       parts, of some formats alone
    python -m bench.gpu OUT --tiny             the whole plan without a GPU: small shapes, triton's interpreter

Nothing here imports torch: a call's seconds belong to its parts. bench/README.md says how to spend a lease.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from . import install, plan, tables

#: characters printed at the end: a machine's reply holds the last 12,000
PRINTED = 11_000


class Run:
    """One call: parts that share `seconds` and an environment."""

    def __init__(self, out: Path, seconds: int, tiny: bool, formats: str | None) -> None:
        self.out, self.seconds, self.tiny, self.formats = out, seconds, tiny, formats
        self.started = time.monotonic()
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(install.REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "2",
            "PATH": f"{os.environ['PATH']}:/usr/local/cuda/bin",
        }
        if tiny:
            self.environment["TRITON_INTERPRET"] = "1"
        else:
            self.environment.pop("TRITON_INTERPRET", None)
        #: name of a part -> how it ended, seconds it took
        self.ended: dict[str, tuple[str, float]] = {}

    def used(self) -> float:
        return time.monotonic() - self.started

    def part(self, name: str) -> None:
        """Run all commands of a part; what they print goes to NAME.txt."""
        began, codes = self.used(), []
        (self.out / f"{name}.txt").unlink(missing_ok=True)
        for command in plan.PARTS[name].commands:
            left = min(command.most, self.seconds - self.used())
            if left < 15:
                codes.append("no time")
                continue
            words = (command.tiny if self.tiny else command.words).split()
            if words:
                codes.append(self._command(name, command, words, left))
        for page in self.out.glob("*.md"):  # eight files come back; bench.report makes pages anywhere
            page.unlink()
        bad = [code for code in codes if code != "0"]
        self.ended[name] = (", ".join(bad) or "right", self.used() - began)
        print(f"{name}: {self.ended[name][0]} after {self.ended[name][1]:.0f} s", flush=True)

    def _command(self, name: str, command: plan.Command, words: list[str], left: float) -> str:
        """How it ended: its exit code, or "stopped"."""
        values = {"out": str(self.out), "seconds": str(int(left - 8)), "jobs": self._jobs()}
        words = [word.format(**values) for word in words]
        if self.formats is not None:
            words = _narrowed(words, self.formats)
        prefix = [] if self.tiny else command.prefix.split()
        if prefix and shutil.which(prefix[0], path=self.environment["PATH"]) is None:
            return f"no {prefix[0]}"
        variables = {key: value.format(**values) for key, value in command.variables.items()}
        with open(self.out / f"{name}.txt", "ab") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, cwd=install.REPOSITORY,
                env={**self.environment, **variables}, start_new_session=True,
            )  # fmt: skip
            try:
                return str(process.wait(left))
            except subprocess.TimeoutExpired:
                _stop(process)
                return "stopped"

    def _jobs(self) -> str:
        return "1" if (install.ROOT / "triton").is_dir() else "12"


def _narrowed(words: list[str], formats: str) -> list[str]:
    """The command for other formats, where it takes any: the last of an option counts."""
    option = {"bench": "--suite", "bench.tune": "--suite", "bench.smoke": "--formats", "bench.sanitized": "--formats",
              "bench.llm": "--formats"}.get(words[1])  # fmt: skip
    return [*words, option, formats] if option else words


def _stop(process: subprocess.Popen[Any]) -> None:
    """Ask it, then end it and what it started: a hung kernel does not answer."""
    for sign, patience in ((signal.SIGTERM, 8), (signal.SIGKILL, 8)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def main(
    out: Annotated[
        Path | None, typer.Argument(help="Folder of the results; the device tool names one.", envvar="OUT")
    ] = None,
    call: Annotated[str | None, typer.Option(help=f"One of {', '.join(plan.CALLS)}.")] = None,
    part: Annotated[list[str], typer.Option(help=f"One of {', '.join(plan.PARTS)}; again for more.")] = [],  # noqa: B006
    formats: Annotated[str | None, typer.Option(help="Formats instead of a part's own.")] = None,
    seconds: Annotated[int, typer.Option(help="For all parts together.")] = plan.CALL_SECONDS,
    tiny: Annotated[bool, typer.Option("--tiny", help="Without a GPU.")] = False,
    show: Annotated[bool, typer.Option("--plan", help="Print the plan and run nothing.")] = False,
) -> None:
    if show:
        print(plan.table())
        return
    if out is None:
        raise typer.BadParameter("OUT: expected a folder for the results, got none")
    names = [*(plan.CALLS.get(call, ()) if call else ()), *part]
    for option, given, known in (
        ("--call", [call] if call else [], plan.CALLS),
        ("--part", part, plan.PARTS),
    ):
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"{option}: expected one of {', '.join(known)}; got {name!r}")
    if not names and not tiny:
        raise typer.BadParameter("expected --call, --part or --tiny, got none of them")
    if not tiny and shutil.which("nvidia-smi") is None:
        print(
            "python -m bench.gpu: no GPU here (no nvidia-smi); --tiny walks the plan without one",
            file=sys.stderr,
        )
        raise typer.Exit(3)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out.resolve(), 10**6 if tiny else seconds, tiny, formats)
    if not tiny:
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], check=False)
        run.environment.update(install.unpack())
        print(f"unpacked after {run.used():.0f} s", flush=True)
    install.link_triton_kernels()
    for name in names or [name for parts in plan.CALLS.values() for name in parts]:
        run.part(name)
    print(tables.of(run.out, run.ended, PRINTED))
    if not tiny:
        print(f"entries added to triton's cache: {install.kernels_added()}")
    raise typer.Exit(1 if any(how != "right" for how, _ in run.ended.values()) else 0)


if __name__ == "__main__":
    typer.run(main)
