"""The rules for a run: which errors it may raise, what they must say, its time and its memory.

Everything else is a finding. A finding is identified by its cause, a place in the code, so that one
fault is reported once.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

#: seconds of the processor, and of the clock, that a run may take; a sound model takes 0.02
CPU_SECONDS, WALL_SECONDS = 3.0, 20.0
#: growth of the resident set at its highest; a sound model takes 3 MB of it
MEGABYTES = 256
#: address space beyond what the process has at the start
_SPACE = 3 << 30

_PROJECT = Path(__file__).parents[2]
_SHOWN = (str(_PROJECT / "qkernels") + os.sep,)


class Finding(Exception):  # noqa: N818
    """A run that broke a rule.

    cause: the same for the same fault.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause)
        self.cause, self.detail = cause, detail


class Overtime(BaseException):
    """Raised inside a run that takes too long.

    It is no Exception, so no code mistakes it for an error of the file.
    """


class Outside(BaseException):
    """Raised inside a run that accesses what a reader of files must not access."""


def attempt(what: str, names: tuple[str, ...], call: Callable[[], Any]) -> Any:
    """The result of `call`; None if it raises a proper error.

    That is a ValueError or a FileNotFoundError whose message has one of `names`.
    """
    try:
        return call()
    except (ValueError, FileNotFoundError) as error:
        if not any(name in str(error) for name in names):
            raise Finding(
                f"{what}: the message names none of its files or tensors: {_place(error)}",
                str(error),
            ) from error
        return None


def checked(run: Callable[[], object]) -> Finding | None:
    """The fault of a run; None without one."""
    before = _high_water(reset=True)
    found: Finding | None = None
    try:
        with _watched():
            run()
    except Finding as error:
        found = error
    except KeyboardInterrupt:
        raise
    except Overtime as error:
        found = Finding(f"takes too long: {_place(error)}", _trace(error))
    except MemoryError as error:
        found = Finding(f"takes too much memory: {_place(error)}", _trace(error))
    except BaseException as error:  # tokenizers' panics are no Exceptions
        found = Finding(f"{type(error).__name__}: {_place(error)}", _trace(error))
    grown = (_high_water() - before) >> 20
    if found is None and grown > MEGABYTES:
        found = Finding("takes too much memory", f"{grown} MB")
    return found


def limit_memory() -> None:
    """Make allocations of this process fail before they take the machine's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + _SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))


def forbid(inside: tuple[Path, ...]) -> None:
    """From now on raise Outside for writes to other folders, network access, programs and pickles.

    Python's audit hooks cannot be removed: for a process that does nothing else.
    """
    allowed = (*map(str, inside), "/proc/", "/dev/null", "/sys/")
    libraries = tuple({str(_PROJECT), sys.prefix, sys.base_prefix, "/usr/", "/etc/mime", "/lib"})

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in (
            "socket.connect",
            "socket.getaddrinfo",
            "subprocess.Popen",
            "os.system",
            "pickle.find_class",
        ):
            raise Outside(f"{event} {args[:2]!r:.200}")
        if event == "open" and isinstance(args[0], str) and args[0].startswith("/"):
            writes = isinstance(args[1], str) and any(c in args[1] for c in "wax+")
            if not args[0].startswith(allowed) and (writes or not args[0].startswith(libraries)):
                raise Outside(f"open {args[0]!r:.200}")

    sys.addaudithook(hook)


# ---------------------------------------------------------------------- limits
@contextmanager
def _watched() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        # Again in a while: one raised inside of a destructor is lost.
        raise Overtime("processor" if number == signal.SIGPROF else "clock")

    def disarm() -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS, 1)
            signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS, 1)
            yield
        finally:
            disarm()
    finally:
        disarm()  # the first may have been interrupted, a second later this is not


def _high_water(reset: bool = False) -> int:
    """The peak of the resident set since its reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status: expected VmHWM, found none")


# ---------------------------------------------------------------------- causes
def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Frames of an error and of its causes, from the outermost to the innermost."""
    chain = [error]
    while (before := chain[0].__cause__) is not None:
        chain.insert(0, before)
    return [frame for one in reversed(chain) for frame in traceback.extract_tb(one.__traceback__)]


def _place(error: BaseException) -> str:
    """Where an error was raised: the last line of ours, and the last of others behind it."""
    frames = list(traceback.extract_tb(error.__traceback__))
    ours = [i for i, frame in enumerate(frames) if frame.filename.startswith(_SHOWN)]
    if not ours:
        return f"{type(error).__name__} in {Path(frames[-1].filename).name}:{frames[-1].name}"
    last = frames[ours[-1]]
    text = f"{Path(last.filename).relative_to(_PROJECT)}:{last.name}"
    if ours[-1] < len(frames) - 1:
        text += f" > {Path(frames[-1].filename).name}:{frames[-1].name}"
    return text


def _trace(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(line[:300] for line in lines[-24:])
