"""Replacing a saved model's directory in one step."""

from __future__ import annotations

import json
import os
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

#: what a saved model consists of; a directory with anything else in it is not overwritten
_SAVED_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "spiece.model", "sentencepiece.bpe.model", "README.md", ".gitattributes",
)  # fmt: skip


def check_target(path: Path) -> Path:
    """The absolute path to save to. ValueError if it is a file or a directory of something else."""
    target = path.resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{path}: expected a directory or nothing to save to, got a file")
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


def swap_in(fresh: Path, target: Path) -> None:
    """Move directory `fresh` to `target`, replacing what is there. Both on one file system."""
    if not target.exists():
        os.rename(fresh, target)
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.replaced-") as scratch:
        old = Path(scratch) / "old"
        os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            os.rename(old, target)
            raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def directory_bytes(path: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
