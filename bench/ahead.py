"""Fills triton's cache for a GPU that is not here, so that none of its time goes to compiling.

    python -m bench.ahead /tmp/qk-triton --formats nf4,w8a8        with the GPU machine's Python and triton
    TRITON_CACHE_DIR=/tmp/qk-triton python -m bench.smoke ...       there, with the folder at the same path

The package's own launches run on pretended tensors (tests/pretend_gpu.py), and each kernel is compiled, not started.
So the cache has what `bench.smoke` asks for, by the same keys: on 2026-11-27 622 entries were carried to an H200,
and the run added 117; later calls, which started what was compiled and nothing else, added 1 to 2,278 and 20 to 886.
A key holds the versions of Python and triton, and the cache names its files by absolute paths. What only people read
(PTX and the like) is left out.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

PRINTED = (".ttir", ".ttgir", ".llir", ".ptx", ".source")


class Driver:
    """What triton asks of a GPU to compile for it."""

    utils = None

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def compile_all(formats: str, arch: int) -> int:
    """Compile what `bench.smoke` starts of `formats`; returns how many kernels."""
    import triton.runtime
    from triton.runtime.jit import JITFunction

    import qkernels as qk
    from tests import pretend_gpu

    from . import smoke

    kernels: set[Any] = set()
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found = run(self, *args, grid=grid, warmup=True, **options)
        kernels.add(found)
        return found

    triton.runtime.driver.set_active(Driver(arch))
    with mock.patch.object(JITFunction, "run", compiled):
        for spec, _ in smoke.cases_of(formats, "triton"):
            started, before = time.monotonic(), len(kernels)
            for shape in (smoke.REAL, smoke.ODD):
                p = smoke._quantized(spec, shape, "cpu")
                with pretend_gpu.visible():
                    os.environ["QKERNELS_EARLY"] = (
                        "1"  # the interpreter, for which it was turned off, has no part here
                    )
                    _calls(qk, p.to("cuda"), shape, spec in smoke.INVARIANT and shape is smoke.REAL)
            print(f"{spec}: {len(kernels) - before} kernels, {time.monotonic() - started:.0f} s", flush=True)
    return len(kernels)


def _calls(qk: Any, p: Any, shape: Any, invariant: bool) -> None:
    modes = [(torch.bfloat16, shape.rows, False), (torch.float16, shape.fp16_rows, False)]
    modes += [(torch.bfloat16, shape.rows, True)] * invariant
    for dtype, rows, same_bits in modes:
        for m in rows:
            p.plans.clear()  # a recorded call would start the kernel itself
            x = torch.randn(m, p.shape[1]).to(dtype).to("cuda")
            qk.matmul(x, p, backend="triton", batch_invariant=same_bits)


def main(
    folder: Annotated[Path, typer.Argument(help="The cache, by the path that it will have there.")],
    formats: Annotated[str, typer.Option(help="all, or specifications of formats.")] = "all",
    arch: Annotated[int, typer.Option(help="Compute capability: 90.")] = 90,
) -> None:
    if "triton" in sys.modules or os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("triton is loaded, or told to interpret: unset TRITON_INTERPRET")
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    count = compile_all(formats, arch)
    for file in folder.rglob("*"):
        if file.suffix in PRINTED:
            file.unlink()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{count} kernels, {size >> 20} MiB in {folder}")


if __name__ == "__main__":
    typer.run(main)
