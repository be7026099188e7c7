"""A tiny saved model whose files a test may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..tiny import save_tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the saved model: name -> bytes."""
    path = tmp_path_factory.mktemp("saved") / "m"
    save_tiny(path)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def directory(saved: dict[str, bytes], tmp_path: Path) -> Path:
    """A directory of the test's own with these files."""
    path = tmp_path / "m"
    path.mkdir()
    for name, data in saved.items():
        (path / name).write_bytes(data)
    return path
