"""Unpack the parcel of `bench.gpu.parcel` on the GPU machine, and give the environment to use it.

Only the standard library is imported. Everything lies in one folder, with the same path on both
machines because triton writes absolute paths into its cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path("/tmp/qkernels-gpu")
REPOSITORY = Path(__file__).parents[2]
#: ignored by git, so the device tool must be told to carry it
PARCEL = REPOSITORY / ".gpu"
#: architecture of the H100 and the H200
ARCH = "90a"
ARCHIVES = ("extension", "triton", "site", "prebuilt")


def unpack(parcel: Path = PARCEL) -> dict[str, str]:
    """Unpack all archives of `parcel` under ROOT. Returns environment variables for later commands.

    Raises:
        ValueError: an archive is missing or damaged, or the extension was compiled from other
            sources than this checkout's or for another Python.
        RuntimeError: other users can write to ROOT.
    """
    archives = [parcel / f"{name}.tar.xz" for name in ARCHIVES]
    for file in archives:
        if not file.is_file():
            raise ValueError(
                f"{file} is not there. The parcel, which git ignores, must be carried along; "
                "without one pass --without-parcel and begin with --part build"
            )
    build_module().private_folder(ROOT)  # because programs run from it
    running = [subprocess.Popen(["tar", "-xJf", str(file), "-C", str(ROOT)]) for file in archives]
    for process, file in zip(running, archives, strict=True):
        if process.wait() != 0:
            raise ValueError(
                f"{file}: expected a tar archive compressed by xz; "
                f"tar ended with {process.returncode}"
            )
    _place_extension(ROOT / "extension")
    (ROOT / "carried").write_text(str(_kernels()))
    return environment()


def environment() -> dict[str, str]:
    """Environment variables by which programs find the files under ROOT."""
    return {
        "PYTHONPATH": f"{REPOSITORY}:{ROOT / 'site'}",
        "TRITON_CACHE_DIR": str(ROOT / "triton"),
        "QKERNELS_CACHE": str(ROOT / "cache"),
        "QKERNELS_PREBUILT": str(ROOT / "prebuilt"),
    }


def _place_extension(folder: Path) -> None:
    """Copy the extension to where `qkernels.backends.cuda.build` caches what it compiles."""
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
        raise ValueError(
            f"the parcel's extension: expected {module.name} for this Python, got {there}"
        )
    target = build.cached((ARCH,), ROOT / "cache")
    build.private_folder(target.parent)
    shutil.copyfile(module, target)
    target.chmod(0o755)


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
    """Link qkernels/triton_kernels (ignored by git) to triton_kernels, if the link is missing."""
    link = REPOSITORY / "qkernels" / "triton_kernels"
    if not link.exists():
        link.symlink_to("../triton_kernels")


def triton_digest() -> str:
    """A hash of the sources that decide which Triton kernels there are."""
    digest = hashlib.sha256()
    for folder in ("triton_kernels", "qkernels/backends/triton"):
        for file in sorted((REPOSITORY / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def all_compiled() -> bool:
    """Whether the unpacked cache was made from the Triton sources of this checkout."""
    packed_from = ROOT / "triton" / "sources"
    return packed_from.is_file() and packed_from.read_text() == triton_digest()


def _kernels() -> int:
    """The number of kernels in triton's cache."""
    return sum(1 for _ in (ROOT / "triton").glob("*/*.cubin"))


def kernels_added() -> int:
    """The number of kernels that triton has compiled since `unpack`, those of peers included."""
    return _kernels() - int((ROOT / "carried").read_text())
