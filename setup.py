"""Package list for setuptools, and the CUDA extension if asked for; everything else is in
pyproject.toml.

The Triton kernels live in ``triton_kernels/`` at the top of the repository and are installed as
``qkernels.triton_kernels``: other projects ship a top-level module of exactly the name
``triton_kernels`` and look it up with ``find_spec``, so ours must never answer to it. ``csrc/``
goes along as data: the CUDA kernels are compiled at the first call, unless QKERNELS_CUDA_ARCHS
(such as "80 90a 100 120") is set now, which compiles them here, for these architectures.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ARCHS = tuple(os.environ.get("QKERNELS_CUDA_ARCHS", "").split())


class BuildCuda(build_ext):
    def build_extension(self, ext):
        path = Path(__file__).parent / "qkernels" / "backends" / "cuda" / "build.py"
        spec = importlib.util.spec_from_file_location("build_cuda", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        module.build(target, ARCHS, Path(self.build_temp).resolve() / "cuda")


setup(
    packages=[
        *find_packages(include=["qkernels", "qkernels.*"]),
        "qkernels.triton_kernels",
        "qkernels.csrc",
    ],
    package_dir={"qkernels.triton_kernels": "triton_kernels", "qkernels.csrc": "csrc"},
    package_data={"qkernels": ["py.typed"], "qkernels.csrc": ["*/*.h", "*/*.cu", "*/*.cpp"]},
    ext_modules=[Extension("qkernels._cuda", [])] if ARCHS else [],
    cmdclass={"build_ext": BuildCuda},
    setup_requires=["pybind11>=2.12", "ninja>=1.11"] if ARCHS else [],
)
