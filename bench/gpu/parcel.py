"""Pack compiled kernels and peers for the GPU machine, so that its time does not go to them.

    python -m bench.gpu.parcel                   # all into .gpu/ (ignored by git); half an hour
    python -m bench.gpu.parcel --only triton     # one archive, after a change of Triton kernels
    python -m bench.gpu.parcel --check           # unpack here, as on the GPU machine, and check

This needs the GPU machine's Python 3.12 (python3.12 on PATH, or --python), nvcc 13 and a C
compiler. It makes a virtual environment under build/parcel with that machine's versions of torch
and triton: 5 GB, once. Files that exist already are not made again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import install

#: packages in the GPU machine's versions, and what the benchmarks import
PACKAGES = [
    "torch==2.11.0",
    "triton==3.6.0",
    "transformers==5.17.0",
    "accelerate==1.15.0",
    "numpy",
    "safetensors",
    "typer",
    "ninja",
    "pybind11",
    "pytest",
    "setuptools",
    "wheel",
    "pillow",
    "psutil",
    "tabulate",
    "requests",
    "protobuf",
    "matplotlib",
]
#: packages of bench/peers, and what they need beside PACKAGES
PEERS = [
    "bitsandbytes==0.50.2",
    "humming-kernels==0.1.19",
    "gemlite==0.6.0.post2",
    "gptqmodel==7.7.0",
    "logbar",
    "device-smi",
    "tokenicer",
    "defuser",
    "threadpoolctl",
    "dill",
]
WORK = install.REPOSITORY / "build" / "parcel"
#: bytes that may travel in one call: the parcel and the checkout
LIMIT = 64 << 20


class Packing:
    """Makes the folder of each archive, with one Python interpreter."""

    def __init__(self, python: Path) -> None:
        self.python = python

    def run(self, *words: str, **variables: str) -> None:
        """Run the interpreter in this checkout. RuntimeError if it fails."""
        environment = {
            **os.environ,
            "PYTHONPATH": f"{install.REPOSITORY}:{WORK / 'site'}",
            **variables,
        }
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [str(self.python), *words], cwd=install.REPOSITORY, env=environment, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)[:200]}: ended with {done.returncode}")

    def extension(self) -> Path:
        """Our CUDA extension for Hopper, with the hash of the sources it was compiled from."""
        folder = WORK / "extension"
        folder.mkdir(parents=True, exist_ok=True)
        code = (
            "from pathlib import Path; from bench.gpu import install; "
            "build = install.build_module(); "
            f"build.build(Path({str(folder)!r}) / ('_cuda' + build.SUFFIX), ({install.ARCH!r},), "
            f"Path({str(WORK / 'objects')!r}))"
        )
        self.run("-c", code)
        (folder / "sources").write_text(install.build_module().sources_digest())
        return folder

    def triton(self) -> Path:
        """Triton's cache with all kernels that the plan's three calls start.

        It begins with the kernels of the last parcel.
        """
        folder = install.ROOT / "triton"  # its path on the GPU machine
        last = install.PARCEL / "triton.tar.xz"
        if not folder.is_dir() and last.is_file():
            install.build_module().private_folder(install.ROOT)
            subprocess.run(["tar", "-xJf", str(last), "-C", str(install.ROOT)], check=True)
        self.run("-m", "bench.gpu.cache", str(folder))
        (folder / "sources").write_text(install.triton_digest())
        return folder

    def site(self) -> Path:
        """The peers' packages, without the libraries that a Hopper GPU does not need."""
        folder = WORK / "site"
        if not folder.is_dir():
            part = WORK / "site.part"
            shutil.rmtree(part, ignore_errors=True)
            options = ("--no-deps", "--no-compile", "--no-build-isolation", "--target", str(part))
            self.run("-m", "pip", "install", "-q", *options, *PEERS)
            for library in (part / "bitsandbytes").glob("*.so"):
                if library.stem not in ("libbitsandbytes_cuda130", "libbitsandbytes_cpu"):
                    library.unlink()
            part.rename(folder)
        return folder

    def prebuilt(self) -> Path:
        """Marlin, and Humming's kernels for 8192x8192, compiled by the peers' own code."""
        folder = WORK / "prebuilt"
        self.site()
        toolkit = _toolkit()
        variables = {
            "QKERNELS_PREBUILT": str(folder),
            "HUMMING_CACHE_DIR": str(WORK / "humming"),
            "LD_LIBRARY_PATH": str(self._nvidia() / "lib"),
            "CUDA_HOME": str(toolkit),
            "LIBRARY_PATH": f"{toolkit / 'lib64'}:{toolkit / 'lib'}",  # for -lcudart
        }
        for peer in ("marlin", "humming"):
            self.run("-m", "bench.gpu.prebuild", peer, **variables)
        return folder

    def _nvidia(self) -> Path:
        """The folder of NVRTC, which comes with torch's wheel."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        return Path(packages) / "nvidia" / "cu13"


def _toolkit() -> Path:
    """The folder of the CUDA toolkit; nvcc on PATH may be a script in another folder."""
    compiler = Path(install.build_module().nvcc() or "/usr/local/cuda/bin/nvcc").resolve()
    candidates = (compiler.parents[1], Path("/usr/local/cuda"))
    return next(
        (folder for folder in candidates if (folder / "include" / "cuda.h").is_file()),
        candidates[1],
    )


#: archive -> function that makes its folder
MAKERS: dict[str, Callable[[Packing], Path]] = {
    "extension": Packing.extension,
    "triton": Packing.triton,
    "site": Packing.site,
    "prebuilt": Packing.prebuilt,
}


def environment_of(python: str) -> Path:
    """The interpreter of a virtual environment with PACKAGES; made by `python` if it is missing."""
    inside = WORK / "python" / "bin" / "python"
    if not inside.exists():
        print(f"making {inside.parents[1]}", flush=True)
        subprocess.run([python, "-m", "venv", str(inside.parents[1])], check=True)
        subprocess.run([str(inside), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return inside


def archive(folder: Path, target: Path) -> None:
    """Pack `folder` into the archive `target`; inside, the folder has the archive's name."""
    part = target.with_suffix(".part")
    rename = f"--transform=s|^{folder.name}|{target.name.removesuffix('.tar.xz')}|"
    left_out = ["--exclude=__pycache__", "--exclude=*.lock", "--exclude=tmp.*"]
    command = [
        "tar",
        "-C",
        str(folder.parent),
        *left_out,
        rename,
        "--use-compress-program=xz -T2 -4",
    ]
    subprocess.run([*command, "-cf", str(part), folder.name], check=True)
    part.replace(target)


def sizes() -> str:
    """A table of the bytes that travel, and whether they fit into one call."""
    archives = sorted(install.PARCEL.glob("*.tar.xz"))
    lines = [f"{file.stat().st_size / 2**20:6.1f} MiB  {file.name}" for file in archives]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=install.REPOSITORY, capture_output=True, check=True,
    ).stdout.decode().split("\0")  # fmt: skip
    files = [install.REPOSITORY / name for name in listed if name]
    checkout = sum(file.stat().st_size for file in files if file.is_file())
    total = checkout + sum(file.stat().st_size for file in archives)
    lines.append(f"{checkout / 2**20:6.1f} MiB  the checkout")
    lines.append(
        f"{total / 2**20:6.1f} MiB  in all, of {LIMIT >> 20}"
        + (": TOO LARGE" if total >= LIMIT else "")
    )
    return "\n".join(lines)


def check(python: Path) -> None:
    """Unpack the parcel as on the GPU machine, and check it.

    GemLite is not checked, because it cannot be imported without a GPU.

    Raises:
        RuntimeError: the extension does not load, or a kernel is missing: one of our Triton kernels
            that the plan starts, Marlin, or one of Humming's.
    """
    shutil.rmtree(install.ROOT, ignore_errors=True)
    packing = Packing(python)
    packing.run("-c", "from bench.gpu import install; install.unpack()")
    variables = install.environment()
    load = (
        "from pathlib import Path; from qkernels.backends.cuda import build; "
        f"module = build.load(build.cached(({install.ARCH!r},))); "
        "print('CUDA kernels load; toolkit', module.toolkit_version())"
    )
    packing.run("-c", load, **variables)
    packing.run("-m", "bench.gpu.prebuild", "check", **variables)
    packing.run("-m", "bench.gpu.cache", variables["TRITON_CACHE_DIR"], **variables)
    if added := install.kernels_added():
        raise RuntimeError(
            f"triton's cache: expected every kernel of the plan in it, got {added} entries added"
        )


def main(
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(MAKERS)}.")] = ",".join(MAKERS),
    python: Annotated[
        str, typer.Option(help="Python 3.12, which makes the environment.")
    ] = "python3.12",
    looking: Annotated[
        bool, typer.Option("--check", help="Unpack and check, pack nothing.")
    ] = False,
) -> None:
    """Pack the parcel, or check it."""
    names = only.split(",")
    for name in names:
        if name not in MAKERS:
            raise typer.BadParameter(f"--only: expected some of {', '.join(MAKERS)}; got {name!r}")
    WORK.mkdir(parents=True, exist_ok=True)
    install.PARCEL.mkdir(exist_ok=True)
    inside = environment_of(python)
    install.link_triton_kernels()
    try:
        if looking:
            check(inside)
        for name in () if looking else names:
            began = time.monotonic()
            archive(MAKERS[name](Packing(inside)), install.PARCEL / f"{name}.tar.xz")
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(sizes())


if __name__ == "__main__":
    typer.run(main)
