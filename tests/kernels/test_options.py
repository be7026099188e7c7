"""Each launch gives the compiler options that our kernels need, so that triton does not warn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from .launches import KERNELS

#: prints the options that triton gets when a kernel is launched; run without the interpreter, which
#: does not compile
SCRIPT = """
import importlib, json, sys
from triton.runtime.jit import JITFunction
seen = {}
def run(self, *args, grid, warmup, **options):
    seen.setdefault(self.__name__, []).append(options)
JITFunction.run = run
for module, name in json.loads(sys.argv[1]):
    kernel = getattr(importlib.import_module(f"qkernels.triton_kernels.{module}"), name)
    kernel[(1,)](1, 2, num_warps=4)
    kernel.warmup(1, 2, grid=(1,), enable_fp_fusion=False)
print(json.dumps(seen))
"""


def outside(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    command = [sys.executable, "-c", script, *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)


def test_each_launch_says_whether_to_fuse() -> None:
    done = outside(SCRIPT, json.dumps(KERNELS))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert set(seen) == {name for _, name in KERNELS}
    for name, launches in seen.items():
        assert launches == [
            {"enable_fp_fusion": True, "num_warps": 4},
            {"enable_fp_fusion": False},
        ], name


def test_compiling_does_not_warn() -> None:
    done = outside(
        "import warnings; warnings.simplefilter('error')\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import make_backend\n"
        "from bench.static.jobs import weight_only\n"
        "job = next(iter(weight_only.compile_jobs(80)))\n"
        "backend = make_backend(GPUTarget('cuda', 80, 32))\n"
        "print(backend.parse_options(job.options).enable_fp_fusion)\n"
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_cached_kernels_follow_the_source_of_their_decoder() -> None:
    """Functions inside of TRAITS count for the cache key, so no kernel serves another decoder."""
    done = outside(
        "from triton.compiler import ASTSource\n"
        "from bench.static.jobs import weight_only\n"
        "job = next(iter(weight_only.compile_jobs(80)))\n"
        "traits = job.constants['TRAITS']\n"
        "class Edited:\n"
        "    cache_key = 'of another source'\n"
        "    def __repr__(self): return repr(traits.finish)\n"
        "def key(traits):\n"
        "    types = {name: job.types.get(name, 'constexpr') for name in job.fn.arg_names}\n"
        "    return ASTSource(job.fn, types, {**job.constants, 'TRAITS': traits}).hash()\n"
        "edited = traits._replace(finish=Edited())\n"
        "print(repr(edited) == repr(traits), key(edited) == key(traits))\n"
    )
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr
