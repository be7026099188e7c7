"""Wheels, with and without the compiled extension. A script stands in for nvcc."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qkernels.backends.cuda import build
from qkernels.version import __version__

pytest.importorskip("ninja")
pytest.importorskip("pybind11")
pytest.importorskip("pip")
try:
    SETUPTOOLS = importlib.metadata.version("setuptools")
except importlib.metadata.PackageNotFoundError:
    SETUPTOOLS = "0"
if int(SETUPTOOLS.split(".")[0]) < 77:
    pytest.skip(f"no setuptools 77 or later, but {SETUPTOOLS}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
#: it writes its arguments into the file that it is to make
NVCC = """#!/bin/sh
arguments="$*"
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then echo "$arguments" > "$2"; fi
    shift
done
"""


def wheel(tmp_path: Path, archs: str | None) -> Path:
    """The wheel by the README's command, from a copy of the sources."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("qkernels", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore, symlinks=True)
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(NVCC)
    compiler.chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(tmp_path / "cuda")}
    environment.pop("QKERNELS_CUDA_ARCHS", None)
    if archs is not None:
        environment["QKERNELS_CUDA_ARCHS"] = archs
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps"]
    # What it needs is installed here, and tests have no network.
    command += ["--no-build-isolation", "--no-index", "-w", str(out)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    return file


def test_a_wheel_with_the_extension(tmp_path: Path) -> None:
    file = wheel(tmp_path, "80 90a")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert file.name.startswith(f"qkernels-{__version__}-{tag}-{tag}-")
    assert not file.name.endswith("-any.whl")
    with zipfile.ZipFile(file) as archive:
        linked = archive.read(f"qkernels/_cuda{build.SUFFIX}").decode()
        names = archive.namelist()
    assert "-shared" in linked
    assert {f"qkernels/{name}" for name in ("triton_kernels/weight_only.py", "py.typed")} <= {
        *names
    }
    commands = [path.read_text() for path in (tmp_path / "tree" / "build").rglob("*.o")]
    assert len(commands) > 20
    for command in commands:
        if "module.cpp" in command:
            assert "-DQK_ARCHS=80_90a" in command
        else:
            assert "arch=compute_80,code=sm_80" in command
            assert "arch=compute_90a,code=sm_90a" in command


def test_a_wheel_without_it_has_the_sources(tmp_path: Path) -> None:
    """The kernels are compiled at the first call."""
    file = wheel(tmp_path, None)
    assert file.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    assert not [name for name in names if "_cuda." in name]
    expected = [*ROOT.glob("csrc/*/*.h"), *ROOT.glob("csrc/*/*.cu"), *ROOT.glob("csrc/*/*.cpp")]
    assert {f"qkernels/{path.relative_to(ROOT)}" for path in expected} <= {*names}
