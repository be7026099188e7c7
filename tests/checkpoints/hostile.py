"""Helpers for tests of hostile files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def change(directory: Path, changes: dict[str, Any], name: str = "config.json") -> None:
    path = directory / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **changes}))


@contextmanager
def quick(seconds: float) -> Iterator[None]:
    """Assert that the context takes at most so many seconds of this thread's time."""
    begin = time.thread_time()
    yield
    assert time.thread_time() - begin < seconds


def said_by(call: Callable[[], object]) -> str | None:
    """The message of the ValueError that the call raises; None if it raises none.

    Other errors propagate.
    """
    try:
        call()
    except ValueError as error:
        return str(error)
    return None
