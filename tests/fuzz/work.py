"""Code that several targets share: write files, run a loaded model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .documents import Special


def place(folder: Path, files: Mapping[str, bytes | Special]) -> None:
    """Make `folder` hold these files and nothing else.

    Each file is new, because an old one may still be mapped.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        if path.name != name or "\0" in name or len(name) > 200:
            continue  # no name that a file can have
        if not isinstance(content, Special):
            path.write_bytes(content)
        elif content == "fifo":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        else:
            path.symlink_to(
                {"zero": "/dev/zero", "loop": path, "broken": folder / "nothing"}[content]
            )


def forward(model: Any) -> None:
    """One forward of a causal language model, or of whatever takes token ids."""
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long))
