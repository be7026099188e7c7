"""Break saving at every step, and look at what is left, at once and after the next save.

    python -m tests.faults

prints a table. Its rows are the kind of file, whether directories can be exchanged, and the fault;
its columns say how often the old file, the new one or nothing was there: first at once, then after
the next save had cleaned up. A step is a call of the operating system (for errors) or a line of
qkernels/checkpoints/atomic.py (for Ctrl-C and for a killed process).
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from qkernels.checkpoints import atomic

_CALLS = (
    "mkdir",
    "open",
    "rename",
    "replace",
    "fsync",
    "close",
    "unlink",
    "rmdir",
    "scandir",
    "lstat",
    "stat",
)
OLD, NEW = "the old one", "the new one"


# ---------------------------------------------------------------------- what is saved
class Directory:
    name = "a directory"

    @staticmethod
    def write(path: Path, content: str) -> None:
        with atomic.replacing(path) as fresh:
            fresh.mkdir()
            for part in ("config.json", "model.safetensors"):
                (fresh / part).write_text(content)

    @staticmethod
    def read(path: Path) -> str | None:
        """The content of a file that was written as a whole; None if nothing is there."""
        if not path.exists():
            return None
        parts = {file.name: file.read_text() for file in path.iterdir()}
        assert set(parts) == {"config.json", "model.safetensors"}, parts
        assert len(set(parts.values())) == 1, parts
        return parts["config.json"]


class File:
    name = "a file"

    @staticmethod
    def write(path: Path, content: str) -> None:
        with atomic.replacing_file(path) as fresh:
            fresh.write_text(content)

    @staticmethod
    def read(path: Path) -> str | None:
        return path.read_text() if path.exists() else None


def left_beside(path: Path) -> list[Path]:
    """The entries that saving left beside `path`.

    Folders of processes that ended before they had locked them do not count; see atomic._clean.
    """
    others = [entry for entry in path.parent.iterdir() if entry != path]
    return [
        entry
        for entry in others
        if not entry.is_dir() or {file.name for file in entry.iterdir()} - {"lock"}
    ]


KINDS: tuple[type[Directory] | type[File], ...] = (Directory, File)


# ---------------------------------------------------------------------- what goes wrong
class Steps:
    """Counts steps, and does something at one of them."""

    def __init__(self, at: int, act: Callable[[], object]) -> None:
        self.at, self.act, self.count = at, act, 0

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.act()


@contextmanager
def calls(steps: Steps) -> Iterator[None]:
    """Within the context, each call of the operating system is a step, before it is made."""

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            steps.step()
            return function(*args, **kwargs)

        return call

    real = {name: getattr(os, name) for name in _CALLS}
    exchange, opened = atomic._exchange, builtins.open
    try:
        for name, function in real.items():
            setattr(os, name, counted(function))
        atomic._exchange, builtins.open, io.open = (
            counted(exchange),
            counted(opened),
            counted(opened),
        )
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        atomic._exchange, builtins.open, io.open = exchange, opened, opened


@contextmanager
def lines(steps: Steps) -> Iterator[None]:
    """Each line of atomic.py and of the function that removes folders is a step, before it runs."""
    files = {atomic.__file__, shutil.__file__}

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            steps.step()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def _error(kind: Any, path: Path, at: int) -> int:
    steps = Steps(at, raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with suppress(OSError), calls(steps):
        kind.write(path, NEW)
        assert kind.read(path) == NEW, "it said that it had saved"
    return steps.count


def _interrupt(kind: Any, path: Path, at: int) -> int:
    steps = Steps(at, raising(KeyboardInterrupt()))
    # rmtree closes a file twice if interrupted
    with (
        suppress(KeyboardInterrupt, OSError),
        lines(steps),
    ):
        kind.write(path, NEW)
    return steps.count


def _kill(kind: Any, path: Path, at: int) -> int:
    """Save in a child process that is killed at a step.

    Its files are then closed, and its locks free.
    """
    steps = Steps(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if at > 1 << 30:
        return _interrupt(kind, path, at)  # only counts
    child = os.fork()
    if child == 0:
        with lines(steps):
            kind.write(path, NEW)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return steps.count


FAULTS: dict[str, Callable[[Any, Path, int], int]] = {
    "an error at each call": _error,
    "Ctrl-C at each line": _interrupt,
    "killed at each line": _kill,
}


# ---------------------------------------------------------------------- all of them
@contextmanager
def exchanging(possible: bool) -> Iterator[None]:
    """Within the context, the system can exchange two directories (if this one can), or cannot."""
    real = atomic._renameat2
    if not possible:
        atomic._renameat2 = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        atomic._renameat2 = real


def run(
    kind: Any, fault: str, *, over: bool, exchange: bool
) -> tuple[int, Counter[Any], Counter[Any]]:
    """Save with a fault at each step.

    Returns the number of steps, what was there at once (old, new or none), and what was there after
    the next save had cleaned up.

    over: whether there is an old one.
    """
    at_once: Counter[Any] = Counter()
    after: Counter[Any] = Counter()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a disk takes its time to sync
    with tempfile.TemporaryDirectory(dir=memory) as scratch, exchanging(exchange):
        path = Path(scratch) / "model"

        def attempt(step: int) -> int:
            for entry in Path(scratch).iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if over:
                kind.write(path, OLD)
            return FAULTS[fault](kind, path, step)

        steps = attempt(1 << 31)
        for step in range(1, steps + 1):
            attempt(step)
            at_once[kind.read(path)] += 1
            atomic._clean(path.parent)
            after[kind.read(path)] += 1
            kind.write(path, NEW)
            assert kind.read(path) == NEW
            # A process lost, or a call failed, before it had locked its folder leaves it empty; see
            # atomic._clean.
            left = [
                f
                for f in path.parent.iterdir()
                if f != path and any(g.name != "lock" for g in f.iterdir())
            ]
            assert left == [], f"{fault}, step {step}"
    return steps, at_once, after


def cases() -> Iterator[tuple[Any, str, bool, bool]]:
    """All (kind of file, fault, over an old one or not, directories can be exchanged or not)."""
    for kind in KINDS:
        for over in (False, True):
            for exchange in (True, False) if kind is Directory and over else (True,):
                yield from ((kind, fault, over, exchange) for fault in FAULTS)


def main() -> None:
    print(
        "| saved | over an old one | directories exchange | fault | steps "
        "| at once: old, new, none | later |"
    )
    print("| --- | --- | --- | --- | ---: | --- | --- |")
    for kind, fault, over, exchange in cases():
        steps, *counts = run(kind, fault, over=over, exchange=exchange)
        shown = [", ".join(str(count[what]) for what in (OLD, NEW, None)) for count in counts]
        able = ("yes" if exchange else "no") if kind is Directory else ""
        print(
            f"| {kind.name} | {'yes' if over else 'no'} | {able} | {fault} | {steps} "
            f"| {' | '.join(shown)} |"
        )


if __name__ == "__main__":
    main()
