"""Saves a file or a directory as a whole or not at all, whenever the process ends.

    parent/.qkernels-saving-1f3a.../     private to its owner, so nobody can plant a link in it
        lock                             locked while its process lives
        new                              written first, and synced to the disk
    parent/model                         exchanges names with `new` in one step;
                                         then the folder is removed

If the system cannot exchange two directories, the old one moves to `old-0/model` in the private
folder for a moment. Nothing removes it from there while `parent/model` is missing: it moves back,
at the latest in the next save beside it. That save also removes private folders of killed processes
of this machine, and all folders older than a week, because a lock of another machine may be
invisible.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: folders of killed processes stay for a week
    fcntl = None  # type: ignore[assignment]

PREFIX = ".qkernels-saving-"
_LOCK, _NEW, _OLD = "lock", "new", "old-"
_WEEK = 7 * 24 * 3600.0
#: attempts to replace a directory. Of two processes that save to one place at once, the later one
#: wins.
_ATTEMPTS = 100
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write a file or a directory to, which becomes `path` when the block ends.

    If the block ends early (an error, Ctrl-C, SIGTERM, a full disk, a lost process), `path` stays
    as it was. A file must not replace a directory, nor a directory a file.
    """
    parent = path.parent
    parent.mkdir(parents=True, exist_ok=True)
    _clean(parent)
    folder, process = parent / f"{PREFIX}{secrets.token_hex(8)}", os.getpid()
    with _ended_by_sigterm():
        try:
            folder.mkdir(mode=0o700)
            with open(folder / _LOCK, "x") as lock:
                _lock(lock)
                yield folder / _NEW
                _sync(folder / _NEW)
                _put(folder / _NEW, path)
                # The save is done; some file systems cannot promise that its name survives a
                # power cut.
                with suppress(OSError):
                    _sync_one(parent)
        finally:
            if os.getpid() == process:  # a child forked in the block must not clean up
                _discard(folder)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """`replacing` for a file. ValueError if `path` is a directory."""
    if path.is_dir():
        raise ValueError(f"{path}: expected a file or nothing to save to, got a directory")
    with replacing(path) as fresh:
        yield fresh


def _put(fresh: Path, target: Path) -> None:
    """Give `fresh` the name `target`; a directory that it replaces moves to the private folder."""
    if not fresh.is_dir():
        os.replace(fresh, target)
        return
    for attempt in range(_ATTEMPTS):
        try:
            if not os.path.lexists(target):
                os.rename(fresh, target)
            elif not _exchange(fresh, target):
                old = fresh.with_name(f"{_OLD}{attempt}") / target.name
                old.parent.mkdir()
                os.rename(target, old)
                os.rename(fresh, target)
            return
        except OSError as error:
            # Another process has created or removed the target since the check above.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(errno.EBUSY, "another process keeps replacing it", str(target))


@cache
def _renameat2() -> Any:
    """The C library's function renameat2, or None."""
    return (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if sys.platform == "linux"
        else None
    )


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the system or the file system cannot."""
    function = _renameat2()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


# ---------------------------------------------------------------------- the disk
def _sync(path: Path) -> None:
    """Wait until a file, or everything in a directory, is on the disk.

    A name must not reach the disk before its bytes.
    """
    for entry in path.rglob("*") if path.is_dir() else ():
        _sync_one(entry)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    """Wait until one file or directory entry is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: the file system cannot sync directories
            raise
    finally:
        os.close(handle)


# ---------------------------------------------------------------------- private folders
def _lock(lock: Any) -> None:
    """Lock the file for as long as it is open, then write its owner into it: see `_is_dead`."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks: no other process can lock it, either
            fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write(f"{socket.gethostname()} {os.getpid()}\n")
    lock.flush()


def _restore(folder: Path) -> None:
    """Move a directory that was to be replaced back to its place, if the place is empty."""
    for old in folder.glob(f"{_OLD}*/*"):
        if not os.path.lexists(folder.parent / old.name):
            os.rename(old, folder.parent / old.name)


def _discard(folder: Path) -> None:
    """Remove a private folder, after `_restore` has moved back what belongs elsewhere."""
    _restore(folder)
    # The next save removes what cannot be removed now. It needs the lock to know that, so the lock
    # goes last.
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.rmtree(folder)


def _clean(parent: Path) -> None:
    """Restore and remove what dead processes left in private folders of this user."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # in use, or removed by another process
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and (os.name == "nt" or status.st_uid == os.geteuid()):
                # if its process lives, it finds the name taken and replaces it again
                _restore(folder)
                with open(folder / _LOCK, "r+") as lock:
                    if _is_dead(lock) or time.time() - status.st_mtime > _WEEK:
                        _discard(folder)


def _is_dead(lock: Any) -> bool:
    """Whether the process that wrote the lock file is gone.

    A process locks the file before it writes to it, so a file without text has a living owner.
    """
    host = lock.read().partition(" ")[0]
    if fcntl is None or host != socket.gethostname():
        return False
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


# ---------------------------------------------------------------------- signals
class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the block by an exception, as Ctrl-C does, so that the block cleans up.

    Then SIGTERM ends the process. This works only in the main thread, where Python allows it. A
    signal handler of the program stays in place.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or _handled_in_c():
        yield
        return
    came, process = False, os.getpid()

    def stop(*_: object) -> None:
        nonlocal came
        if os.getpid() != process:  # forked in the block
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        came = True
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if came:
            os.kill(os.getpid(), signal.SIGTERM)


def _handled_in_c() -> bool:
    """Whether SIGTERM has a handler that Python does not know, e.g. faulthandler's.

    Only Linux tells.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    caught = next(
        (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0"
    )
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
