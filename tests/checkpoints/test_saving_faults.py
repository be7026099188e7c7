"""Models, GGUF files and importance matrices survive failing calls, Ctrl-C and a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.quantizers.importance import ImportanceMatrix

from .. import faults
from ..tiny import tiny_model, tiny_tokenizer
from .test_gguf_models import bpe_tokenizer

Save = Callable[[Path, int], None]


def digest(path: Path) -> str | None:
    """A digest of a file, or of all files of a directory; None if nothing is there."""
    if not path.exists():
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()


def models(format: str, **params: object) -> list[nn.Module]:
    made = [tiny_model(seed, num_hidden_layers=1) for seed in range(2)]
    for model in made:
        qk.quantize_model(model, format, progress=False, **params)
    return made


def directory() -> Save:
    nets, tokenizer = models("nf4"), tiny_tokenizer()
    return lambda path, which: qk.save_model(nets[which], path, tokenizer, max_shard_bytes=20_000)


def gguf_file() -> Save:
    nets, tokenizer = models("q8_0"), bpe_tokenizer()
    return lambda path, which: qk.save_model(nets[which], path, tokenizer)


def importance_file() -> Save:
    net = tiny_model()
    linears = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    matrices = [
        ImportanceMatrix({n: torch.full((m.in_features,), 1.0 + i) for n, m in linears.items()}, 64)
        for i in range(2)
    ]
    return lambda path, which: matrices[which].save(path, net)


KINDS = {"model": directory, "model.gguf": gguf_file, "imatrix.gguf": importance_file}


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Save, list[str | None]]]:
    """(path to save to, function that saves, digests of the old and of the new files)."""
    import tempfile

    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        save, path = KINDS[request.param](), Path(scratch) / request.param
        save(path, 1)
        new = digest(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        save(path, 0)
        yield path, save, [digest(path), new]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()],
    ids=lambda e: type(e).__name__
)  # fmt: skip
def test_a_call_that_fails(
    place: tuple[Path, Save, list[str | None]], error: BaseException
) -> None:
    path, save, (old, new) = place
    counting = faults.Steps(0, lambda: None)
    with faults.calls(counting):
        save(path, 0)
    for step in range(1, counting.count + 1, max(1, counting.count // 40)):
        save(path, 0)
        failed = False
        try:
            with faults.calls(faults.Steps(step, faults.raising(error))):
                save(path, 1)
        # ValueError: config.json is read again, as anybody's
        except (
            OSError,
            ValueError,
            KeyboardInterrupt,
        ):
            failed = True
        got = digest(path)
        assert got in (old, new), f"step {step}"
        assert failed or got == new, f"step {step}"
    save(path, 1)
    assert digest(path) == new
    assert faults.left_beside(path) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the context no file of this process can grow beyond `size`, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 100, 1000, 6000, 16000])
def test_a_full_disk(place: tuple[Path, Save, list[str | None]], size: int) -> None:
    """Rust writes safetensors and numpy GGUF's tensors, so no call of Python's own fails."""
    path, save, (old, new) = place
    files = path.iterdir() if path.is_dir() else [path]
    if max(file.stat().st_size for file in files) > size:
        with (
            largest_file(size),
            pytest.raises(OSError, match="too large|requested and|cannot be written"),
        ):
            save(path, 1)
        assert digest(path) == old
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    save(path, 1)
    assert digest(path) == new


@pytest.mark.parametrize("name", KINDS)
def test_no_link_is_followed(tmp_path: Path, name: str) -> None:
    """The temporary name was `.NAME.PID.tmp` once, and could be a link planted by another user."""
    victim = tmp_path / "precious"
    victim.write_text("precious")
    for planted in (f".{name}.{os.getpid()}.tmp", f"{name}.{os.getpid()}.tmp"):
        (tmp_path / planted).symlink_to(victim)
    KINDS[name]()(tmp_path / name, 0)
    assert victim.read_text() == "precious"
    assert not (tmp_path / name).is_symlink()


def test_the_current_directory_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="got the current directory of this"):
        qk.save_model(tiny_model(), ".")


def test_what_came_to_the_directory_meanwhile_is_not_lost(tmp_path: Path) -> None:
    """Saving takes minutes; somebody may have put notes beside the old model meanwhile."""
    net = models("nf4")[0]
    qk.save_model(net, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    save_tokenizer = tokenizer.save_pretrained

    def meanwhile(folder: Path) -> None:
        save_tokenizer(folder)
        (tmp_path / "model" / "notes.txt").write_text("precious")

    tokenizer.save_pretrained = meanwhile
    with pytest.raises(
        ValueError, match="expected nothing but a saved model's files.*got notes.txt"
    ):
        qk.save_model(net, tmp_path / "model", tokenizer)
    assert (tmp_path / "model" / "notes.txt").read_text() == "precious"
