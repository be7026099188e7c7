"""Run every kernel once on a small, odd shape and check the result, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m bench.sanitized --backends cuda

Everything runs in one process and without CUDA graphs, because the tool follows neither. Prints a
line for each format and backend.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated

import torch
import typer

import qkernels as qk
from qkernels.benchmark import shapes
from qkernels.quantizers.specs import FormatSpec

#: N and K, neither a multiple of a block
SHAPE = (72, 512)
#: values of M: one, a few, and just above a tile of 16, of 64 and of 128
ROWS = (1, 3, 17, 65, 129)


def main(
    formats: Annotated[str, typer.Option(help="Suites, or formats.")] = "all",
    backends: str = "cuda,triton",
    seconds: Annotated[float, typer.Option(help="Seconds after which no format is begun.")] = 1e9,
) -> None:
    """Run each kernel once; the exit code is 1 if a result is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, wrong, left_out = time.monotonic(), 0, 0
    for backend in backends.split(","):
        for name, params in shapes.formats_of(formats):
            if qk.formats.get(name).dense:
                continue
            if time.monotonic() - start > seconds:
                left_out += 1
                continue
            result = _errors(backend, name, params, device)
            wrong += "wrong" in result
            print(f"{backend} {FormatSpec(name, params)}: {result}", flush=True)
    print(f"{wrong} wrong; no time was left for {left_out}")
    sys.exit(1 if wrong else 0)


def _errors(backend: str, name: str, params: dict[str, object], device: str) -> str:
    """The relative error at each M, in words; "wrong" is one of them if it is too large."""
    results = []
    try:
        # Only our kernels run on the GPU, because the tool makes each launch many times slower.
        p = qk.quantize(torch.randn(SHAPE), name, **params)
        on_device = p.to(device)
        for m in ROWS if device == "cuda" else ROWS[:2]:
            x = torch.randn(m, SHAPE[1]).bfloat16()
            want = qk.matmul(x.double(), p, backend="reference")
            y = qk.matmul(x.to(device), on_device, backend=backend).cpu().double()
            error = float((y - want).norm() / want.norm())
            results.append(f"M={m} {error:.1e}" + ("" if error < 0.02 else " wrong"))
    except Exception as error:
        results.append(f"wrong: {type(error).__name__}: {error}"[:300])
    return ", ".join(results)


if __name__ == "__main__":
    typer.run(main)
