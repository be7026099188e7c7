"""Run a race in worker processes that may crash, hang or be killed, and keep earlier results.

A hung kernel cannot be stopped from within its process, and an illegal access makes a CUDA context
useless. So every product is timed in a worker. A worker that is silent for longer than its
contestant's `patience` is killed, and a new worker continues after the case that failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from qkernels.benchmark import race

from .worker import SPOILT, Case, Job

#: failures of one contestant's workers after which it is left out; a hang counts twice, because it
#: costs the most time
LIVES = 4


class Worker:
    """A worker process, in its own session so that its child processes end with it."""

    def __init__(self, job: Any, module: str = "bench.worker") -> None:
        """job: a dataclass that `module` reads from its standard input as JSON."""
        # lives as long as the worker
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(writing)],
            stdin=subprocess.PIPE, stdout=self.errors, stderr=self.errors, pass_fds=[writing],
            start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        self.reading = reading
        self._rest = b""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(job)).encode())
        self.process.stdin.close()

    def lines(self, wait: float) -> list[dict[str, Any]] | None:
        """Events that the worker wrote within `wait` seconds; None once it has closed its pipe."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.reading, selectors.EVENT_READ)
            if not selector.select(max(0.0, wait)):
                return []
        more = os.read(self.reading, 1 << 16)
        if not more:
            return None
        *whole, self._rest = (self._rest + more).split(b"\n")
        return [json.loads(line) for line in whole]

    def end(self) -> None:
        """Send SIGKILL to the worker and its children, and do not wait."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill the worker and its children and wait for it; harmless if it has ended."""
        self.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)  # the driver may keep a process whose kernel hangs
        os.close(self.reading)

    def last_words(self, characters: int = 250) -> str:
        """The end of the worker's output, on one line."""
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 4 * characters))
        return " ".join(self.errors.read().decode(errors="replace").split())[-characters:]


def run(
    job: Job,
    contestants: list[race.Contestant],
    deadline: float,
    say: Callable[[str], None],
) -> Iterator[race.Row | float]:
    """Run all cases of `job`; yields each row as it is timed or fails, and the copy bandwidth once.

    deadline: value of time.monotonic() at which the worker is killed and the rest is given up.
    say: called with a line about each failure.
    """
    dense, failures = dict(job.dense), [0] * len(contestants)
    cases = [(number, n, k, list(rows)) for number, n, k, rows in job.cases]
    while cases:
        job.cases, job.dense = cases, dense
        worker = Worker(job)
        here: int | None = None  # number of the contestant whose turn it is
        heard, why = time.monotonic(), ""  # time of the last event; why the worker failed
        try:
            while True:
                now = time.monotonic()
                patience = 120.0 if here is None else contestants[here].patience
                left = min(heard + patience, deadline) - now
                if left <= 0:
                    why = (
                        "no time was left"
                        if now >= deadline
                        else f"hung: no answer for {patience:.0f} s"
                    )
                    break
                events = worker.lines(left)
                if events is None:
                    code = worker.process.wait()
                    if code not in (0, SPOILT) or (code == 0 and any(rows for *_, rows in cases)):
                        why = f"the process died ({code}): {worker.last_words()}"
                    break
                for event in events:
                    heard = time.monotonic()
                    if "begin" in event:
                        here = event["begin"][0]
                        while cases and cases[0][:3] != tuple(event["begin"]):
                            cases.pop(0)
                    elif "row" in event:
                        row = race.Row(**event["row"])
                        cases[0][3].remove(row.m)
                        if row.chain is not None and here == 0:
                            dense[f"{row.n},{row.k},{row.m}"] = row.chain
                        yield row
                    elif event.get("copy") is not None:
                        job.copy = False
                        yield float(event["copy"])
        finally:
            worker.kill()
        cases = [one for one in cases if one[3]]
        if time.monotonic() >= deadline:
            yield from _unmeasured(cases, contestants, "no time was left")
            return
        if here is None:
            yield from _unmeasured(cases, contestants, why or "the process could not start")
            return
        if why and cases and cases[0][0] == here:
            number, n, k, rows = cases[0]
            say(f"{contestants[number].name} {n}x{k} M={rows[0]}: {why}")
            yield from _unmeasured([(number, n, k, [rows.pop(0)])], contestants, why)
        if why or (cases and cases[0][0] == here):
            failures[here] += 2 if why.startswith("hung") else 1
        if failures[here] >= LIVES:
            dropped = [one for one in cases if one[0] == here]
            yield from _unmeasured(dropped, contestants, "left out: it broke its process too often")
            cases = [one for one in cases if one[0] != here]
        cases = [one for one in cases if one[3]]


def _unmeasured(
    cases: list[Case], contestants: list[race.Contestant], why: str
) -> Iterator[race.Row]:
    """Rows that failed for this reason, one for each M of `cases`."""
    for number, n, k, rows in cases:
        one = contestants[number]
        for m in rows:
            yield race.Row(one.name, one.group, n, k, m, failed=why[:300])


def warm(
    job: Job, cases: list[Case], processes: int, seconds: float, say: Callable[[str], None]
) -> None:
    """Compile the kernels of `cases` in several processes at once, for at most `seconds`."""
    started = time.monotonic()
    parts = [cases[i::processes] for i in range(min(processes, len(cases)))]
    workers = [Worker(Job(**{**vars(job), "cases": part, "warm": True})) for part in parts]
    waiting = set(workers)
    try:
        while waiting and time.monotonic() - started < seconds:
            for worker in list(waiting):
                if worker.lines(0.05) is None:
                    waiting.discard(worker)
    finally:
        codes = [worker.process.poll() for worker in workers]
        for worker in workers:
            worker.end()
        for worker, code in zip(workers, codes, strict=True):
            worker.kill()
            if words := worker.last_words():
                say(f"while compiling ({code}): {words}")
    late = f", {len(waiting)} of {len(workers)} processes were stopped" if waiting else ""
    say(f"compiled {len(cases)} cases in {time.monotonic() - started:.0f} s{late}")


def write(path: Path, text: str) -> None:
    """Write a file as a whole: a reader finds the old file or the new one, never a part."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
