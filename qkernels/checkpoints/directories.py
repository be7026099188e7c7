"""The directory that a model is saved to: a new one, or one that holds only an earlier save."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import atomic

#: files of a saved model; a directory with any other file is not overwritten
_SAVED_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt",
    "chat_template.jinja", "spiece.model", "sentencepiece.bpe.model", "README.md", ".gitattributes",
)  # fmt: skip


def check_target(path: Path) -> Path:
    """The absolute path to save to; ValueError if something other than a saved model is there."""
    target = path.resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{path}: expected a directory or nothing to save to, got a file")
    if target == Path.cwd():
        raise ValueError(
            f"{path}: expected a directory that can be replaced, got the current directory of this "
            "process"
        )
    if target.is_mount():
        raise ValueError(
            f"{path}: expected a directory that can be replaced, got a mount point; save to a "
            "directory inside it"
        )
    entries = sorted(target.iterdir())
    if not entries:
        return target
    if not (target / "config.json").is_file():
        raise ValueError(
            f"{path}: expected an empty directory or an earlier save (with a config.json), "
            f"got one with {entries[0].name}"
        )
    for entry in entries:
        if entry.is_dir() or not any(fnmatchcase(entry.name, pattern) for pattern in _SAVED_FILES):
            raise ValueError(
                f"{path}: expected nothing but a saved model's files, which saving replaces, "
                f"got {entry.name}; move it away or save elsewhere"
            )
    return target


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields an empty directory to write a model to, which becomes `path` when the block ends.

    Raises ValueError if `path` is something that `check_target` refuses, before or after the block.
    See atomic.py.
    """
    target = check_target(path)
    with atomic.replacing(target) as fresh:
        fresh.mkdir()
        yield fresh
        check_target(target)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON, indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def directory_bytes(path: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
