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
from typing import Any

import pytest
import torch

from qkernels.backends.cuda import build

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


def entry(kernel: str, defines: tuple[str, ...] = ()) -> tuple[ctypes.CDLL, Any]:
    """The library with `kernel`, a name of the extension, and its entry point."""
    text = build.generated().get(kernel)
    files = [str(file.relative_to(CSRC)) for file in CSRC.glob(f"*/{kernel}.cu")]
    (source,) = [f"{kernel}.cu"] if text else files
    lib = library(source, defines, text)
    function = getattr(lib, f"qk_{kernel}")
    function.restype = ctypes.c_char_p
    return lib, function


@lru_cache(maxsize=64)
def library(source: str, defines: tuple[str, ...] = (), text: str | None = None) -> ctypes.CDLL:
    """csrc/`source` as a shared library that runs in the emulator.

    text: what the file says, if it is one that the build generates.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernels with")
    digest = hashlib.sha256(" ".join([source, text or "", *FLAGS, *defines]).encode())
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
            file = CSRC / source
            if text is not None:
                file = built.with_suffix(".cu")
                file.write_text(text)
            _compile(compiler, file, defines, built)
    return ctypes.CDLL(str(built))


def _compile(compiler: str, file: Path, defines: tuple[str, ...], built: Path) -> None:
    part = built.with_suffix(".part")
    options = [*FLAGS, f"-I{CSRC}", *(f"-D{d}" for d in defines)]
    command = [compiler, *options, "-x", "c++", str(file), "-o", str(part)]
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
