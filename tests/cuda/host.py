"""The CUDA kernels, compiled for the CPU by g++ on first use and cached by a hash of sources."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC", "-shared"]
#: set in test_sanitizers.py's processes
if os.environ.get("QKERNELS_SANITIZE"):
    FLAGS += [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-g1",
    ]


def source_of(kernel: str) -> str:
    """The file, relative to csrc, with the entry point of `kernel`, a name of csrc/bindings."""
    files = sorted(
        {*CSRC.glob(f"*/{kernel}.cu"), *CSRC.glob(f"*/{kernel.removeprefix('weight_only_')}.cu")}
    )
    assert len(files) == 1, f"{kernel}: {files}"
    return str(files[0].relative_to(CSRC))


@lru_cache(maxsize=32)
def library(source: str, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """csrc/`source` as a shared library that runs in the emulator."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernels with")
    digest = hashlib.sha256(" ".join([source, *FLAGS, *defines]).encode())
    for file in sorted(CSRC.rglob("*")):
        if file.suffix in (".h", ".cuh", ".cpp", ".cu"):
            digest.update(file.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"qkernels-host-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise RuntimeError(f"{cache} belongs to somebody else")
    built = cache / f"{Path(source).stem}-{digest.hexdigest()[:16]}.so"
    with open(cache / f"{built.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run side by side build it once
        if not built.exists():
            _compile(compiler, source, defines, built)
    return ctypes.CDLL(str(built))


def _compile(compiler: str, source: str, defines: tuple[str, ...], built: Path) -> None:
    part = built.with_suffix(".part")
    options = [*FLAGS, *(f"-D{d}" for d in defines)]
    command = [compiler, *options, "-x", "c++", str(CSRC / source), "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[:8000])
    part.replace(built)


def expose(
    lib: ctypes.CDLL, read: Iterable[torch.Tensor], written: Iterable[torch.Tensor], order: int = 0
) -> None:
    """Tell the emulator which memory kernels may access, and the order of blocks."""
    lib.qk_emulator_reset(order)
    for tensors, writable in ((read, 0), (written, 1)):
        for t in tensors:
            size = ctypes.c_size_t(t.numel() * t.element_size())
            lib.qk_emulator_register(ctypes.c_void_p(t.data_ptr()), size, writable)
