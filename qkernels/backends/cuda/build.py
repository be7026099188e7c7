"""Builds the CUDA extension: in `pip install` with QKERNELS_CUDA_ARCHS set, or at the first call.

This file imports only the standard library, because setup.py loads it by its path. One ninja build
compiles one object per source file. Each kernel of qkernels/layouts/codecs.py, for some codes and
scales, has a source file that is generated here. The module links cudart statically and reads no
torch header, so it works with every version of torch.

The first call builds the module under $QKERNELS_CACHE/cuda (default ~/.cache/qkernels/cuda), in a
folder named by a hash of the sources, the compiler and the architecture. A lock keeps two processes
from building it at the same time. The module runs as code of this user, so it is loaded only from a
place where no other user can write.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

#: architectures of a build for all supported GPUs, as in QKERNELS_CUDA_ARCHS="80 90a 100 120".
#: Kernels use instructions that only one architecture has on Hopper alone, so plain code for 100
#: and 120 is enough, and also runs on 10.3 (B300) and 12.1 (GB10).
DEFAULT_ARCHS = ("80", "90a", "100", "120")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") or ".so"


def sources() -> Path:
    """The folder csrc: in the installed package, or at the top of the repository."""
    package = Path(__file__).parents[2]
    installed = package / "csrc"
    return installed if (installed / "weight_only").is_dir() else package.parent / "csrc"


def nvcc() -> str | None:
    """The CUDA compiler: $CUDA_HOME's, else the one on PATH, else /usr/local/cuda's."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def built_in() -> bool:
    """Whether `pip install` built the extension."""
    return importlib.util.find_spec("qkernels._cuda") is not None


def is_built() -> bool:
    """Whether the extension for this GPU is compiled already."""
    if built_in():
        return True
    import torch

    if unavailable() is not None or not torch.cuda.is_available():
        return False
    module = cached((native_arch(*torch.cuda.get_device_capability()),))
    return module.is_file() and untrusted(module) is None


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why the extension can neither be loaded nor built here, or None."""
    if built_in():
        return None
    if nvcc() is None:
        return (
            "the extension was not built with the package, "
            "and there is no nvcc to build it with now"
        )
    if not (sources() / "weight_only").is_dir():
        return (
            f"the extension was not built with the package, and its sources are not at {sources()}"
        )
    missing = [name for name in ("ninja", "pybind11") if importlib.util.find_spec(name) is None]
    if missing:
        install = f"pip install {' '.join(missing)}"
        return f"building the extension needs {' and '.join(missing)} ({install})"
    return None


@lru_cache(maxsize=16)
def obstacle(major: int, minor: int) -> str | None:
    """Why the extension that came with the package does not run on a GPU, or None.

    An extension that is built at the first call is built for that GPU.
    """
    if not built_in():
        return None
    module = importlib.import_module("qkernels._cuda")
    try:
        check_versions(module.toolkit_version(), module.driver_version())
    except RuntimeError as error:
        return str(error).removeprefix("qkernels: no CUDA kernels: ").removeprefix("qkernels: ")
    if any(runs_on(arch, major, minor) for arch in getattr(module, "archs", [])):
        return None
    return (
        f"the extension was built with the package for {_archs_in_words()}, "
        f"and this GPU is sm_{major}{minor}, which needs {native_arch(major, minor)!r} in "
        "QKERNELS_CUDA_ARCHS"
    )


def _archs_in_words() -> str:
    """Of the extension that came with the package; one of an older version does not say."""
    archs = getattr(importlib.import_module("qkernels._cuda"), "archs", [])
    return ", ".join(f"sm_{arch}" for arch in archs) or "unknown GPUs"


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for `arch`, such as "80" or "90a", runs on GPUs of capability major.minor.

    Code with "a" runs on that capability alone. Other code, with "f" (for a family of GPUs) or
    without a letter, also runs on those of the same major and a higher minor number.
    """
    number = number_of(arch)
    if arch.endswith("a"):
        return number == major * 10 + minor
    return number // 10 == major and number % 10 <= minor


def state() -> str:
    """Whether the kernels are compiled, or can be, in words for `qkernels info`."""
    if built_in():
        return f"compiled with the package for {_archs_in_words()}"
    why = unavailable()
    return "compiled at the first call on a GPU" if why is None else f"not to be had: {why}"


@lru_cache(maxsize=1)
def extension() -> ModuleType:
    """The extension module; the first call may build it.

    Raises:
        RuntimeError: it can neither be loaded nor built, or the driver is too old for it.
    """
    if built_in():
        module = importlib.import_module("qkernels._cuda")
    else:
        why = unavailable()
        if why is not None:
            raise RuntimeError(f"qkernels: no CUDA kernels: {why}")
        import torch

        major, minor = torch.cuda.get_device_capability()
        module = load(build_cached((native_arch(major, minor),)))
    check_versions(module.toolkit_version(), module.driver_version())
    return module


def native_arch(major: int, minor: int) -> str:
    """What to build for a GPU: (8, 9) -> "89".

    (9, 0) -> "90a", because wgmma needs the "a". (10, 3) -> "100": from 10.0 on the code is the
    same for all minor numbers, and more versions of nvcc know the first one.
    """
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor if major < 10 else 0}"


def number_of(arch: str) -> int:
    """The architecture without its letter: "90a" -> 90."""
    return int(arch.rstrip("af"))


def check_archs(archs: Sequence[str]) -> None:
    """Raise ValueError unless kernels can be built for each of `archs`, as in DEFAULT_ARCHS."""
    example = f'such as "{" ".join(DEFAULT_ARCHS)}"'
    if not archs:
        raise ValueError(f"QKERNELS_CUDA_ARCHS: expected architectures, {example}, got none")
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or number_of(arch) < 80:
            raise ValueError(
                f"QKERNELS_CUDA_ARCHS: expected architectures from 80 on, {example}, got {arch!r}"
            )
        if number_of(arch) == 90 and arch != "90a":
            raise ValueError(
                f'QKERNELS_CUDA_ARCHS: expected "90a" for Hopper, got {arch!r}: the kernels use '
                "wgmma, which is not in code for other GPUs than 9.0"
            )


def check_versions(toolkit: int, driver: int) -> None:
    """Check the driver against the toolkit that compiled the kernels.

    Args:
        toolkit: 13000 for CUDA 13.0.
        driver: the CUDA version that the driver supports, in the same form; 0 without a driver.

    Raises:
        RuntimeError: there is no driver, or it is older than the toolkit allows.
    """
    if driver == 0:
        raise RuntimeError("qkernels: no CUDA kernels: there is no NVIDIA driver")
    if driver // 1000 < toolkit // 1000:
        compiled, supported = (f"{v // 1000}.{v % 1000 // 10}" for v in (toolkit, driver))
        raise RuntimeError(
            f"qkernels: the CUDA kernels were compiled by CUDA {compiled}, but the driver knows "
            f"CUDA up to {supported}: install a newer driver, or set CUDA_HOME to an older "
            "toolkit and build again"
        )


def build_cached(archs: tuple[str, ...]) -> Path:
    """Build the module in the cache if it is not there yet; returns its file."""
    target = cached(archs)
    folder = private_folder(target.parent)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            print("qkernels: compiling the CUDA kernels, once; about a minute", file=sys.stderr)
            build(target, archs, folder / "objects")
            target.chmod(0o755)
    check_owner(target)
    return target


def private_folder(folder: Path) -> Path:
    """Create `folder` with access for this user only, if it does not exist.

    Raises:
        RuntimeError: another user can write to it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    check_owner(folder)
    return folder


def check_owner(path: Path) -> None:
    """Raise RuntimeError if `path` is `untrusted`."""
    why = untrusted(path)
    if why is not None:
        raise RuntimeError(f"{why}. Remove it, or set QKERNELS_CACHE to a folder of your own")


def untrusted(path: Path) -> str | None:
    """Why a user other than this one and root can change or replace the file at `path`, or None.

    It checks the three folders above `path`, too: for a module, up to the cache's root.
    """
    for part in (path, *path.parents[:3]):
        status = part.lstat() if part == path else part.stat()
        mode = status.st_mode
        others = stat.S_IWGRP | stat.S_IWOTH if part == path else stat.S_IWOTH
        if part != path and mode & stat.S_ISVTX:
            others = 0  # as in /tmp: other users cannot rename files of this user
        if stat.S_ISLNK(mode) or status.st_uid not in (0, os.geteuid()) or mode & others:
            return (
                f"{part}: expected what only this user can write to, because code is loaded "
                f"from {path}; got {stat.filemode(mode)} of user {status.st_uid}"
            )
    return None


def cached(archs: tuple[str, ...], root: Path | None = None) -> Path:
    """The file of the module that `build_cached` builds.

    root: the cache's folder, by default $QKERNELS_CACHE or ~/.cache/qkernels.
    """
    root = root or Path(os.environ.get("QKERNELS_CACHE") or Path.home() / ".cache" / "qkernels")
    compiler = nvcc()
    digest = None if compiler is None else compiler_digest(compiler)
    key = hashlib.sha256(repr((archs, digest, SUFFIX, sources_digest())).encode()).hexdigest()[:24]
    return root / "cuda" / key / f"_cuda{SUFFIX}"


def build(target: Path, archs: tuple[str, ...], folder: Path) -> None:
    """Compile every source for `archs` and link `target`.

    Raises:
        RuntimeError: the compiler fails; with its messages.
        ValueError: as in `check_archs`.
    """
    check_archs(archs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(target, archs, folder))
    jobs = os.environ.get("MAX_JOBS")  # the variable of torch's extension builder
    command = [sys.executable, "-m", "ninja", "-C", str(folder), *(["-j", jobs] if jobs else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"qkernels: compiling the CUDA kernels failed:\n{done.stdout[-6000:]}{done.stderr}"
        )


def generated() -> dict[str, str]:
    """Name of each weight-only kernel -> the text of the source file that instantiates it."""
    texts = {}
    for name, (codes, scalers) in codecs().cuda_kernels().items():
        half, bfloat = (re.sub(r"\bT\b", dtype, codes.cuda) for dtype in ("Half", "BFloat"))
        texts[name] = (
            '#include "weight_only/launch.h"\nusing namespace qk;\n'
            f"QK_ENTRY({name}, WeightOnlyCall, run_weight_only<{half}, {bfloat}, {scalers}>)\n"
        )
    return texts


def write_generated(folder: Path) -> list[Path]:
    """Write the files of `generated` into folder/weight_only, where they differ; returns them."""
    folder = folder / "weight_only"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in generated().items():
        files.append(folder / f"{name.removeprefix('weight_only_')}.cu")
        if not files[-1].is_file() or files[-1].read_text() != text:
            files[-1].write_text(text)
    return files


@lru_cache(maxsize=1)
def codecs() -> ModuleType:
    """The module qkernels/layouts/codecs.py, loaded by its path, too."""
    return load(Path(__file__).parents[2] / "layouts" / "codecs.py", "codecs")


def ninja_file(target: Path, archs: tuple[str, ...], folder: Path) -> str:
    """The text of the ninja file that compiles every source and links `target`.

    The generated sources are written into `folder`.
    """
    import pybind11

    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("qkernels: no nvcc found; set CUDA_HOME or PATH")
    codes = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    common = f"-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -I{_escaped(sources())}"
    home = Path(compiler).resolve().parents[1]
    files = [*sorted(sources().glob("*/*.cu")), sources() / "bindings" / "module.cpp"]
    files += write_generated(folder)
    lines = [
        "rule device",
        # bench/static_cuda.py reads the registers and spills that ptxas reports in the log.
        f"  command = {compiler} {common} {codes} -Xptxas=-v -MD -MF $out.d -c $in -o $out "
        "> $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "rule host",
        f"  command = {compiler} {common} -Xcompiler=-DPYBIND11_DETAILED_ERROR_MESSAGES {includes} "
        f"-DQK_ARCHS={'_'.join(archs)} "
        f"-isystem {home / 'include'} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        # It links to a temporary name first, so that a module that exists is complete.
        f"  command = {compiler} -shared -cudart static $in -o $out.tmp && mv $out.tmp $out",
    ]
    objects = [f"{file.parent.name}-{file.stem}.o" for file in files]
    for file, output in zip(files, objects, strict=True):
        rule = "device" if file.suffix == ".cu" else "host"
        lines.append(f"build {output}: {rule} {_escaped(file)}")
    lines.append(f"build {str(target).replace(' ', '$ ')}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _escaped(path: Path) -> str:
    """A path as ninja files have it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """A hash of all sources, those that are generated included."""
    digest = hashlib.sha256(repr(generated()).encode())
    for file in sorted(sources().rglob("*")):
        if file.suffix in (".h", ".cu", ".cpp"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=4)
def compiler_digest(compiler: str) -> str:
    """A hash of the compiler's file, because a path may get another version."""
    return hashlib.sha256(Path(compiler).read_bytes()).hexdigest()


def load(path: Path, name: str = "_cuda") -> ModuleType:
    """The module at `path`."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
