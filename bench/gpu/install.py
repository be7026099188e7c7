"""Unpacks on the GPU machine what `bench.gpu.parcel` packed elsewhere, and says with which environment it is used.

Only the standard library is imported. Everything lies under one folder with the same path on both machines: triton
writes absolute paths into its cache.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path("/tmp/qkernels-gpu")
REPOSITORY = Path(__file__).parents[2]
#: ignored by git: the device tool's `carry` names it
PARCEL = REPOSITORY / ".gpu"
#: H100 and H200
ARCH = "90a"


def unpack(parcel: Path = PARCEL) -> dict[str, str]:
    """Unpack all of `parcel` under ROOT. Returns variables for the environment of what is run then.

    ValueError if the extension was compiled from other sources than this checkout's, or for another Python.
    """
    ROOT.mkdir(parents=True, exist_ok=True)
    archives = sorted(parcel.glob("*.tar.xz"))
    running = [subprocess.Popen(["tar", "-xJf", str(file), "-C", str(ROOT)]) for file in archives]
    for process, file in zip(running, archives, strict=True):
        if process.wait() != 0:
            raise ValueError(
                f"{file}: expected a tar archive compressed by xz; tar ended with {process.returncode}"
            )
    if (ROOT / "extension").is_dir():
        _place_extension(ROOT / "extension")
    (ROOT / "carried").write_text(str(_entries()))
    return environment()


def environment() -> dict[str, str]:
    """Where programs find what is under ROOT."""
    return {
        "PYTHONPATH": f"{REPOSITORY}:{ROOT / 'site'}",
        "TRITON_CACHE_DIR": str(ROOT / "triton"),
        "QKERNELS_CACHE": str(ROOT / "cache"),
        "QKERNELS_PREBUILT": str(ROOT / "prebuilt"),
    }


def _place_extension(folder: Path) -> None:
    """To where `qkernels.backends.cuda.build` looks for what it compiled at an earlier call."""
    build = build_module()
    built_from = (folder / "sources").read_text()
    if built_from != build.sources_digest():
        raise ValueError(
            "the parcel's extension was compiled from other sources than csrc has now: run "
            "`python -m bench.gpu.parcel --only extension` again"
        )
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.is_file():
        there = ", ".join(file.name for file in folder.glob("*.so"))
        raise ValueError(f"the parcel's extension: expected {module.name} for this Python, got {there}")
    target = build.cached((ARCH,), ROOT / "cache")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(module, target)


def build_module() -> ModuleType:
    """qkernels/backends/cuda/build.py without qkernels, which imports torch."""
    path = REPOSITORY / "qkernels" / "backends" / "cuda" / "build.py"
    spec = importlib.util.spec_from_file_location("build_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def link_triton_kernels() -> None:
    """Where the package is not installed, a link (ignored by git) gives triton_kernels its name in it."""
    link = REPOSITORY / "qkernels" / "triton_kernels"
    if not link.exists():
        link.symlink_to("../triton_kernels")


def _entries() -> int:
    folder = ROOT / "triton"
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def kernels_added() -> int:
    """Entries that triton has added to its cache since `unpack`: each is a kernel that cost time here."""
    return _entries() - int((ROOT / "carried").read_text())
