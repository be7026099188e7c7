"""Packs what a GPU machine would otherwise spend its time on: compiled kernels, and peers.

    python -m bench.gpu.parcel                      everything into .gpu/ (ignored by git); half an hour
    python -m bench.gpu.parcel --only triton        one archive again, after a change of the Triton kernels
    python -m bench.gpu.parcel --check              unpack it here, as on the GPU machine, and look

Needs Python 3.12, the GPU machine's (python3.12 on PATH, or --python), nvcc 13 and a C compiler. A
virtual environment with that machine's versions of torch and triton is made under build/parcel: 5
GB, once. What is there already is not made again.
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

#: as on the GPU machine, and what is imported there
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
#: bench/peers' packages, with what they need beside PACKAGES
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
#: what travels in one call: this and the checkout
LIMIT = 64 << 20


class Packing:
    """The tools for one Python."""

    def __init__(self, python: Path) -> None:
        self.python = python

    def run(self, *words: str, **variables: str) -> None:
        """Run that Python in this checkout. RuntimeError if it fails."""
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
        """Our CUDA kernels for Hopper, with the hash of the sources that they were compiled from."""
        folder = WORK / "extension"
        folder.mkdir(parents=True, exist_ok=True)
        code = (
            "from pathlib import Path; from bench.gpu import install; build = install.build_module(); "
            f"build.build(Path({str(folder)!r}) / ('_cuda' + build.SUFFIX), ({install.ARCH!r},), "
            f"Path({str(WORK / 'objects')!r}))"
        )
        self.run("-c", code)
        (folder / "sources").write_text(install.build_module().sources_digest())
        return folder

    def triton(self) -> Path:
        """Our Triton kernels, for all that the plan's three calls start; what the last parcel had
        is kept.
        """
        folder = install.ROOT / "triton"  # the path that it will have there
        last = install.PARCEL / "triton.tar.xz"
        if not folder.is_dir() and last.is_file():
            install.build_module().private_folder(install.ROOT)
            subprocess.run(["tar", "-xJf", str(last), "-C", str(install.ROOT)], check=True)
        self.run("-m", "bench.gpu.cache", str(folder))
        (folder / "sources").write_text(install.triton_digest())
        return folder

    def site(self) -> Path:
        """Peers' packages, with what a Hopper GPU needs of them."""
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
        """Marlin, and Humming's kernels at 8192x8192, compiled by their own code."""
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
        """Where torch's wheel keeps NVRTC."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        found = subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        return Path(found) / "nvidia" / "cu13"


def _toolkit() -> Path:
    """The CUDA toolkit's folder; nvcc on PATH may be a script that lies elsewhere."""
    compiler = Path(install.build_module().nvcc() or "/usr/local/cuda/bin/nvcc").resolve()
    candidates = (compiler.parents[1], Path("/usr/local/cuda"))
    return next(
        (folder for folder in candidates if (folder / "include" / "cuda.h").is_file()),
        candidates[1],
    )


#: archive -> what makes its folder
MAKERS: dict[str, Callable[[Packing], Path]] = {
    "extension": Packing.extension,
    "triton": Packing.triton,
    "site": Packing.site,
    "prebuilt": Packing.prebuilt,
}


def environment_of(python: str) -> Path:
    """Python of a virtual environment with PACKAGES; made by `python` if there is none."""
    inside = WORK / "python" / "bin" / "python"
    if not inside.exists():
        print(f"making {inside.parents[1]}", flush=True)
        subprocess.run([python, "-m", "venv", str(inside.parents[1])], check=True)
        subprocess.run([str(inside), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return inside


def archive(folder: Path, target: Path) -> None:
    """Pack `folder` into `target`, under the archive's name."""
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
    """What travels, and whether it fits into one call."""
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
    """Unpack as on the GPU machine. RuntimeError if the extension does not load, if a Triton kernel
    that the plan starts has to be compiled, or if Marlin or one of Humming's kernels has to be.
    (GemLite cannot be imported without a GPU.)
    """
    shutil.rmtree(install.ROOT, ignore_errors=True)
    packing = Packing(python)
    packing.run("-c", "from bench.gpu import install; install.unpack()")
    variables = install.environment()
    load = (
        "from pathlib import Path; from qkernels.backends.cuda import build; "
        f"module = build.load(build.cached(({install.ARCH!r},))); print('CUDA kernels load; toolkit', module.toolkit_version())"
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
        bool, typer.Option("--check", help="Unpack and look, pack nothing.")
    ] = False,
) -> None:
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
