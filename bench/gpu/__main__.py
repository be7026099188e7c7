"""Run parts of the plan on a machine with a GPU. Results and logs go to OUT; a table comes last.

    python -m bench.gpu --plan                 # list the parts and their seconds
    python -m bench.gpu OUT --call smoke       # unpack .gpu/ (see bench.gpu.parcel), run a call
    python -m bench.gpu OUT --part smoke --part race --formats nf4    # parts, for some formats
    python -m bench.gpu OUT --tiny             # the whole plan without a GPU, on small shapes

Nothing here imports torch, because the seconds of a call belong to its parts. bench/README.md says
how to spend a lease.
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

#: characters printed at the end: the device tool's reply holds the last 12,000
PRINTED = 11_000
#: with fewer seconds left no command is begun
LEAST = 15


class Run:
    """One call: parts that share `seconds` and an environment.

    out: folder of the results. tiny: run without a GPU. formats: instead of the parts' own.
    """

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
        self.interrupted = False
        #: name of a part -> (how it ended, seconds it took)
        self.ended: dict[str, tuple[str, float]] = {}

    def used(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.started

    def part(self, name: str) -> None:
        """Run all commands of a part; their output goes to NAME.txt."""
        began, bad = self.used(), []
        (self.out / f"{name}.txt").unlink(missing_ok=True)
        done: list[list[str]] = []
        for command in plan.PARTS[name].commands:
            words = self._words(command)
            if not words or words in done:  # with `formats`, commands may become equal
                continue
            done.append(words)
            left = 0.0 if self.interrupted else min(command.most, self.seconds - self.used())
            how = "no time" if left < LEAST else self._command(name, command, words, left)
            if how != "0":
                bad.append(f"{command.label} {how}".strip())
        self.ended[name] = (", ".join(bad) or "right", self.used() - began)
        print(f"{name}: {self.ended[name][0]} after {self.ended[name][1]:.0f} s", flush=True)

    def _words(self, command: plan.Command) -> list[str]:
        words = (command.tiny if self.tiny else command.words).split()
        return _narrowed(words, self.formats) if words and self.formats is not None else words

    def _command(self, name: str, command: plan.Command, words: list[str], left: float) -> str:
        """Run a command for at most `left` seconds. Returns its exit code, or "stopped"."""
        values = {"out": str(self.out), "seconds": str(int(left - 8)), "jobs": self._jobs()}
        prefix = [] if self.tiny else command.prefix.split()
        if prefix and shutil.which(prefix[0], path=self.environment["PATH"]) is None:
            return f"no {prefix[0]}"
        variables = {key: value.format(**values) for key, value in command.variables.items()}
        with open(self.out / f"{name}.txt", "ab") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, *(word.format(**values) for word in words)],
                stdout=log, stderr=subprocess.STDOUT, cwd=install.REPOSITORY,
                env={**self.environment, **variables}, start_new_session=True,
                # so that the SIGINT from `_stop` raises KeyboardInterrupt
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
            until = time.monotonic() + left
            while process.poll() is None and time.monotonic() < until and not self.interrupted:
                time.sleep(0.1)
            if process.poll() is None:
                _stop(process)
                return "stopped"
            return str(process.returncode)

    def _jobs(self) -> str:
        return "1" if self.formats is None and install.all_compiled() else "12"


def _narrowed(words: list[str], formats: str) -> list[str]:
    """The command with other formats; the same command if it has no option for formats."""
    option = {
        "bench": "--suite", "bench.tune": "--suite", "bench.smoke": "--formats",
        "bench.sanitized": "--formats", "bench.llm": "--formats",
    }.get(words[1])  # fmt: skip
    if option is None:
        return words
    if option in words:
        place = words.index(option)
        words = words[:place] + words[place + 2 :]
    return [*words, option, formats]


def _stop(process: subprocess.Popen[Any]) -> None:
    """Interrupt a process; after 8 seconds kill it and its children.

    A process whose kernel hangs does not answer.
    """
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(8)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(8)


def main(
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder of the results.", envvar="OUT"),
    ] = None,
    call: Annotated[
        list[str], typer.Option(help=f"One of {', '.join(plan.CALLS)}; repeatable.")
    ] = [],  # noqa: B006
    part: Annotated[
        list[str], typer.Option(help=f"One of {', '.join(plan.PARTS)}; repeatable.")
    ] = [],  # noqa: B006
    formats: Annotated[str | None, typer.Option(help="Formats instead of a part's own.")] = None,
    seconds: Annotated[int, typer.Option(help="For all parts together.")] = plan.CALL_SECONDS,
    tiny: Annotated[bool, typer.Option("--tiny", help="Run without a GPU.")] = False,
    bare: Annotated[
        bool, typer.Option("--without-parcel", help="There is no .gpu/ to unpack.")
    ] = False,
    show: Annotated[bool, typer.Option("--plan", help="Print the plan and run nothing.")] = False,
) -> None:
    """Run calls and parts of the plan."""
    if show:
        print(plan.table())
        return
    if out is None:
        raise typer.BadParameter("OUT: expected a folder for the results, got none")
    for option, given, known in (("--call", call, plan.CALLS), ("--part", part, plan.PARTS)):
        for name in given:
            if name not in known:
                raise typer.BadParameter(
                    f"{option}: expected one of {', '.join(known)}; got {name!r}"
                )
    names = [*(name for one in call for name in plan.CALLS[one]), *part]
    if not names and not tiny:
        raise typer.BadParameter("expected --call, --part or --tiny, got none of them")
    if not tiny and shutil.which("nvidia-smi") is None:
        print(
            "python -m bench.gpu: no GPU here (no nvidia-smi); --tiny runs the plan without one",
            file=sys.stderr,
        )
        raise typer.Exit(3)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out.resolve(), 10**6 if tiny else seconds, tiny, formats)
    # a signal stops the current command; the results so far are printed
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: setattr(run, "interrupted", True))
    install.link_triton_kernels()
    if not tiny:
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], check=False)
    if not tiny and not bare:
        try:
            run.environment.update(install.unpack())
        except ValueError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(3) from None
        print(f"unpacked after {run.used():.0f} s", flush=True)
    for name in names or [name for parts in plan.CALLS.values() for name in parts]:
        run.part(name)
    print(tables.of(run.out, run.ended, PRINTED))
    if not tiny and not bare:
        print(f"Triton kernels compiled in this call, peers' too: {install.kernels_added()}")
    raise typer.Exit(1 if any(how != "right" for how, _ in run.ended.values()) else 0)


if __name__ == "__main__":
    typer.run(main)
