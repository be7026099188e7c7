"""Time configurations of the Triton kernels on this GPU, and print what the best one gains.

    python -m bench.tune --suite "gptq:bits=4,group_size=128,w8a8" --rows 1,64,4096 \\
        --output tuned.jsonl

Most of the time goes to compiling a hundred configurations for each problem. So several processes
compile them first. This process then times the kernels from triton's cache, problem by problem, by
autotune.py, as a first call with QKERNELS_AUTOTUNE=1 does. Each problem adds a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

import qkernels as qk
from qkernels.benchmark import shapes
from qkernels.quantizers.specs import FormatSpec

DEFAULT = (
    "gptq:bits=4,group_size=128,w8a8,fp8:activation=dynamic,nf4,q4_k,"
    "gptq:bits=4,group_size=128,symmetric=false"
)


def problems(suite: str, sizes: str, rows: str) -> list[tuple[str, dict[str, Any], int, int, int]]:
    """(format, parameters, N, K, M): all formats for the first M, then all for the next."""
    return [
        (name, params, n, k, int(m))
        for n, k in shapes.shapes_of(sizes)
        for m in rows.split(",")
        for name, params in shapes.formats_of(suite)
    ]


def main(
    suite: str = DEFAULT,
    sizes: Annotated[str, typer.Option("--shapes")] = "square",
    rows: str = "1,4096,64",
    seconds: Annotated[float, typer.Option(help="Seconds after which no problem is begun.")] = 1e9,
    jobs: Annotated[int, typer.Option(help="Processes that compile.")] = 14,
    tiny: bool = False,
    output: Annotated[Path | None, typer.Option(help="A line of JSON for each problem.")] = None,
    share: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    if tiny:
        suite, sizes, rows, jobs = "nf4", "128x256", "1", 2
    os.environ["QKERNELS_AUTOTUNE"] = "1"
    if share >= 0:
        _compile(problems(suite, sizes, rows), share, jobs)
        return
    started = time.monotonic()
    given = ["--suite", suite, "--shapes", sizes, "--rows", rows, "--jobs", str(jobs)]
    compilers = [
        subprocess.Popen([sys.executable, "-m", "bench.tune", *given, "--share", str(number)])
        for number in range(jobs)
    ]
    for compiler in compilers:
        try:
            compiler.wait(max(1.0, started + 0.6 * seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            compiler.kill()
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    if output is not None:
        output.write_text("")
    for problem in problems(suite, sizes, rows):
        if time.monotonic() - started > seconds:
            print("no time was left for", _words(problem), flush=True)
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                best = _tuned(problem, Path(folder))
        except Exception as error:
            print(f"{_words(problem)}: {type(error).__name__}: {error}"[:300], flush=True)
            continue
        if best is None:
            continue
        times = f"{best['seconds'] * 1e6:.1f} us, table's {best['tabled'] * 1e6:.1f} us"
        print(f"{_words(problem)}: {times}, {best['config']}", flush=True)
        if output is not None:
            with output.open("a") as file:
                file.write(json.dumps(best) + "\n")


def _words(problem: tuple[str, dict[str, Any], int, int, int]) -> str:
    name, params, n, k, m = problem
    return f"{FormatSpec(name, params)} {n}x{k} M={m}"


def _call(problem: tuple[str, dict[str, Any], int, int, int]) -> None:
    """Multiply a random weight of this problem once with the Triton kernel."""
    name, params, n, k, m = problem
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = qk.quantize(torch.randn(n, k, device=device), name, **params)
    with torch.inference_mode():
        qk.matmul(torch.randn(m, k, device=device).bfloat16(), p, backend="triton")


def _tuned(
    problem: tuple[str, dict[str, Any], int, int, int], folder: Path
) -> dict[str, Any] | None:
    """The result of tuning one problem; None without a GPU.

    It is autotune's JSON, with "tabled", the seconds of the configuration in the table, and
    "candidates", the number of configurations that were timed.
    """
    from qkernels.backends.triton import autotune

    times: list[float] = []
    measure = autotune.cuda_seconds

    def seconds(call: Callable[[], Any]) -> float:
        times.append(measure(call))
        return times[-1]

    with (
        mock.patch.dict(os.environ, QKERNELS_CACHE=str(folder)),
        mock.patch.object(autotune, "cuda_seconds", seconds),
    ):
        _call(problem)
    files = list(folder.glob("tune/*.json"))
    if not files:
        return None
    return {**json.loads(files[0].read_text()), "tabled": times[0], "candidates": len(times)}


def _compile(problems: list[Any], share: int, jobs: int) -> None:
    """Compile part number `share` of `jobs` of every problem's candidates, by one launch of each.

    No winner is recorded.
    """
    from qkernels.backends.triton import autotune, configs

    candidates = configs.candidates

    def some(config: configs.GemmConfig, m: int) -> Iterator[configs.GemmConfig]:
        return (
            one
            for number, one in enumerate(candidates(config, m))
            if number % jobs == share or not number
        )

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, QKERNELS_CACHE=folder),
        mock.patch.object(configs, "candidates", some),
        mock.patch.object(autotune, "cuda_seconds", return_value=1.0),
    ):
        for problem in problems:
            try:
                _call(problem)
            except Exception as error:
                print(
                    f"compiling {_words(problem)}: {type(error).__name__}: {error}"[:300],
                    file=sys.stderr,
                )


if __name__ == "__main__":
    typer.run(main)
