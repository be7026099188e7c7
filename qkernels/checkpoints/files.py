"""The only way this package opens untrusted files: regular files, of bounded size, named in errors.

Opening a FIFO blocks, reading a device never ends, and `stat` tells the size of neither. So a file
is opened without blocking, then its type and size are read from the open file, and it is refused if
it holds more bytes than its size says. Symbolic links to regular files are followed: Hugging Face's
cache consists of them.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

#: bytes of a JSON file, and of a safetensors header, as in safetensors
MAX_JSON_BYTES = 100_000_000
#: containers and items: JSON of 100 MB may hold 33 million empty objects, which take 2.5 GB
_MAX_JSON_ITEMS = 2_000_000
#: nesting of objects and lists: code that prints or walks them recurses once per level
_MAX_JSON_DEPTH = 32


@contextmanager
def errors_naming_file(path: Path, expected: str) -> Iterator[None]:
    """Turn any error inside into a ValueError that names the file and what was `expected` there.

    Use it around other libraries' code that reads values of the file at `path`. A file can make
    such code fail in any way: a Rust library by a panic, which is no Exception. MemoryError and
    Ctrl-C pass through.
    """
    try:
        yield
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, ValueError) and str(error).startswith(f"{path}"):
            raise  # the message already names the file
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected {expected}, got: {_printable(reason, 500)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which is no fault of the file."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("allocate memory" in message or "out of memory" in message)
    )


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """The regular file at `path`, open for reading.

    Raises FileNotFoundError if nothing is there; ValueError if it is no regular file or cannot be
    opened.
    """
    flags = (
        os.O_RDONLY
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_CLOEXEC", 0)
        | getattr(os, "O_BINARY", 0)
    )
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent}: expected a file {path.name}, found none") from None
    except (OSError, ValueError) as error:  # an impossible file name raises either error
        check_regular(path)  # names a socket, which cannot be opened
        raise _unreadable(path, error) from None
    try:
        _check_regular(path, os.fstat(descriptor))
    except ValueError:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_part(file: BufferedReader, where: str, offset: int, count: int) -> bytearray:
    """`count` bytes of an open file from `offset` on.

    Raises ValueError that begins with `where` if there are fewer.
    """
    raw = bytearray(count)
    file.seek(offset)
    got = file.readinto(raw)
    if got != count:
        raise ValueError(f"{where}: expected {count} bytes, got {got}")
    return raw


def _unreadable(path: Path, error: Exception) -> ValueError:
    """The error for a file that cannot be opened or examined."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ValueError(f"{_printable(str(path))}: expected a file that can be read, got: {reason}")


def _printable(text: str, limit: int = 300) -> str:
    """The text with lone surrogates and NULs escaped, cut to `limit` characters."""
    text = text.replace("\0", "\\0").encode(errors="backslashreplace").decode()
    return text if len(text) <= limit else f"{text[:limit]}..."


def _check_regular(path: Path, status: os.stat_result) -> None:
    """ValueError naming the type of a file that is not regular."""
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise ValueError(f"{path}: expected a regular file, got {kind}")


def check_regular(path: Path, limit: int | None = None) -> bool:
    """Whether a file is at `path`, for code that opens it itself.

    Raises ValueError for anything but a regular file, or one of more than `limit` bytes.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    _check_regular(path, status)
    if limit is not None and status.st_size > limit:
        raise ValueError(f"{path}: expected at most {limit} bytes, got {status.st_size}")
    return True


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES, what: str = "JSON") -> bytes:
    """All bytes of the regular file at `path`; ValueError if there are more than `limit`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path}: expected at most {limit} bytes of {what}, got {size}")
        text = file.read(size + 1)
    if len(text) != size:
        raise ValueError(
            f"{path}: expected {size} bytes, as its directory entry says, got another number"
        )
    return text


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, or ValueError naming the file."""
    return parse_json(str(path), read_bytes(path, limit))


def parse_json(where: str, text: bytes, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in `text`; with `unique`, a key that repeats within an object is an error."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{twice!r:.60} is there twice")
        return values

    count = text.count(b",") + text.count(b"{") + text.count(b"[")
    if count > _MAX_JSON_ITEMS:
        raise ValueError(f"{where}: expected JSON of at most {_MAX_JSON_ITEMS} items, got {count}")
    try:
        value = json.loads(text, object_pairs_hook=checked if unique else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, got something else ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(_MAX_JSON_DEPTH):
        items = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in items if isinstance(item, (dict, list))]
    if level:
        raise ValueError(
            f"{where}: expected JSON of a depth of at most {_MAX_JSON_DEPTH}, got more"
        )
    return value


class UnchangedFile:
    """A file that is read several times and must not change in between.

    Half of one save and half of another make no model.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._state = path, _state(path)

    def check(self) -> None:
        """ValueError if the file was replaced, truncated or written to."""
        if _state(self.path) != self._state:
            raise ValueError(
                f"{self.path}: expected the file whose header was read, got one changed while it "
                "is loaded"
            )


def _state(path: Path) -> tuple[int, int] | None:
    """(size in bytes, time of the last change in ns); None if the file is gone.

    No inode number, because some file systems change it.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
