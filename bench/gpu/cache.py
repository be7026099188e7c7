"""Fill triton's cache for the GPU machine, so that its time does not go to compiling.

    python -m bench.gpu.cache FOLDER              # with the GPU machine's Python and triton
    python -m bench.gpu.cache FOLDER --parts smoke --formats nf4       # some formats alone

The package's own launchers run on pretended tensors (tests/pretend_gpu.py), with the shapes,
formats and values of M of the plan's parts. Each kernel is compiled but not started, and so is the
C code that would start it. A key of the cache depends on the versions of Python and triton, and its
files name each other by absolute paths, so FOLDER must be the path that the cache has on the GPU
machine. Files that only people read (PTX and the like) are removed.

The last line says how many kernels were in FOLDER already: all of them, at a second run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer

from . import plan

#: parts of the plan's calls that start our Triton kernels; "gemlite" needs no more than "race"
PLANNED = "smoke,memcheck,race,llama,model"
#: files that only people read
PRINTED = (".ttir", ".ttgir", ".llir", ".ptx", ".source")


class Call(NamedTuple):
    """One call. invariant: with batch invariance. late: without PDL."""

    dtype: torch.dtype
    m: int
    invariant: bool = False
    late: bool = False


class Product(NamedTuple):
    """A weight (format, N, K) and the calls with it."""

    spec: str
    shape: tuple[int, int]
    calls: list[Call]


def products(parts: list[str], formats: str | None = None) -> Iterator[Product]:
    """The products that Triton kernels compute in these parts of the plan.

    formats: instead of the parts' own.
    """
    from qkernels.benchmark import shapes
    from qkernels.quantizers.specs import FormatSpec, parse_specs

    from .. import llm, sanitized, smoke

    for name in parts:
        part = plan.PARTS[name]
        if name == "smoke":
            for spec, _ in smoke.cases_of(formats or "all", "triton"):
                for shape in (smoke.REAL, smoke.ODD):
                    calls = [Call(torch.bfloat16, m) for m in shape.rows]
                    calls += [Call(torch.float16, m) for m in shape.fp16_rows]
                    if spec in smoke.INVARIANT and shape is smoke.REAL:
                        calls += [Call(torch.bfloat16, m, invariant=True) for m in shape.rows]
                        calls.append(Call(torch.bfloat16, 1, late=True))
                    yield Product(spec, (shape.n, shape.k), calls)
        elif name in ("memcheck", "racecheck"):
            for given in parse_specs(formats or plan.NEWEST):
                yield Product(
                    str(given), sanitized.SHAPE, [Call(torch.bfloat16, m) for m in sanitized.ROWS]
                )
        elif name == "model":
            rows = {m for batch in plan.BATCHES for m in (batch, batch * plan.PROMPT)}
            calls = [Call(torch.bfloat16, m) for m in sorted(rows)]
            specs = (
                [str(spec) for spec in parse_specs(formats)]
                if formats
                else list(plan.MODEL_FORMATS)
            )
            for spec in specs:
                for size in () if spec == "bf16" else llm.linear_shapes(plan.MODEL_SIZE):
                    yield Product(spec, size, calls)
        elif part.race is not None and "triton" in part.race.backends:
            calls = [Call(torch.bfloat16, m) for m in part.race.counts]
            for fmt, params in shapes.formats_of(formats or part.race.suite):
                for size in shapes.shapes_of(part.race.sizes):
                    yield Product(str(FormatSpec(fmt, params)), size, calls)


class Driver:
    """A driver that tells triton the GPU to compile for."""

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


def compile_all(tasks: list[Product], arch: int) -> tuple[int, int]:
    """Compile the kernels of all products.

    Returns the number of kernels, and the number of those that the cache had already.
    """
    import triton
    from triton.runtime.jit import JITFunction

    import qkernels as qk
    from tests import pretend_gpu

    from .. import smoke, starts

    hits: list[bool] = []
    seen: dict[int, Any] = {}
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen[id(kernel)] = kernel
            _launcher(kernel)
        return kernel

    triton.runtime.driver.set_active(Driver(arch))
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    with mock.patch.object(JITFunction, "run", compiled):
        for spec, shape, calls in tasks:
            started, before = time.monotonic(), len(hits)
            p = smoke.quantized(spec, shape, "cpu")
            with pretend_gpu.visible(), mock.patch.dict(os.environ, QKERNELS_PDL="1"):
                on_gpu = p.to("cuda")
                for call in calls:
                    on_gpu.plans.clear()  # a kept plan would start the kernel itself
                    x = torch.ones(call.m, p.shape[1], dtype=call.dtype).to("cuda")
                    with starts.late(on_gpu) if call.late else contextlib.nullcontext():
                        qk.matmul(x, on_gpu, backend="triton", batch_invariant=call.invariant)
            size = f"{shape[0]}x{shape[1]}"
            took = time.monotonic() - started
            print(
                f"{spec} {size}: {len(hits) - before} kernels, {took:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return len(hits), sum(hits)


def _launcher(kernel: Any) -> None:
    """Compile the C code that starts the kernel, if this version of triton has such code.

    3.6 has it, 3.9 does not.
    """
    from triton.backends.nvidia import driver

    if hasattr(driver, "compile_module_from_src"):
        driver.CudaLauncher(kernel.src, kernel.metadata)


@contextlib.contextmanager
def _no_driver() -> Iterator[None]:
    """Within the context, link triton's C code with an empty libcuda and do not load it.

    This machine has no driver.
    """
    from triton.backends.nvidia import driver
    from triton.runtime import build

    if not hasattr(driver, "compile_module_from_src"):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["cc", "-shared", "-o", f"{folder}/libcuda.so.1", "-x", "c", "-"]
        subprocess.run(command, input=b"int cuInit(unsigned flags) { return 100; }", check=True)
        with (
            mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder),
            mock.patch.object(build, "_load_module_from_path"),
        ):
            driver.CudaUtils()
            yield


def main(
    folder: Annotated[Path, typer.Argument(help="The cache, at its path on the GPU machine.")],
    parts: Annotated[str, typer.Option(help="Parts of the plan.")] = PLANNED,
    formats: Annotated[
        str | None, typer.Option(help="Specifications, instead of the parts' own.")
    ] = None,
    arch: Annotated[int, typer.Option(help="Compute capability: 90.")] = 90,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    share: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Compile the Triton kernels of some parts of the plan."""
    for name in parts.split(","):
        if name not in plan.PARTS:
            raise typer.BadParameter(
                f"--parts: expected some of {', '.join(plan.PARTS)}; got {name!r}"
            )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("triton is told to interpret: unset TRITON_INTERPRET")
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    if share >= 0:
        tasks = sorted(products(parts.split(","), formats), key=lambda product: product.spec)
        with _no_driver():
            counts = compile_all(tasks[share::jobs], arch)
        print(*counts)
        return
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu.cache", *sys.argv[1:], "--share"]
    processes = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(jobs)
    ]
    kernels = cached = 0
    for process in processes:
        assert process.stdout is not None
        numbers = [int(word) for word in process.stdout.read().split()]
        if process.wait() != 0:
            raise typer.Exit(1)
        kernels, cached = kernels + numbers[0], cached + numbers[1]
    for file in folder.rglob("*"):
        if file.suffix in PRINTED:
            file.unlink()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{kernels} kernels, of which {cached} were there; {size >> 20} MiB in {folder}")


if __name__ == "__main__":
    typer.run(main)
