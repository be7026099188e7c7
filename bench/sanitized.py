"""Every kernel once on a small, odd shape, each result checked: what compute-sanitizer runs.

compute-sanitizer --tool memcheck python -m bench.sanitized --backends cuda

In one process, without CUDA graphs, for the tool follows no other. Prints a line for each format
and backend.
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

#: N and K: neither is a multiple of a block
SHAPE = (72, 512)
#: rows of x: one, a few, past one tile of 16, past one of 64, and of 128
ROWS = (1, 3, 17, 65, 129)


def main(
    formats: Annotated[str, typer.Option(help="Suites, or formats.")] = "all",
    backends: str = "cuda,triton",
    seconds: Annotated[float, typer.Option(help="After which nothing is begun.")] = 1e9,
) -> None:
    """Ends with 1 if a result is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, wrong, left_out = time.monotonic(), 0, 0
    for backend in backends.split(","):
        for name, params in shapes.formats_of(formats):
            if qk.formats.get(name).dense:
                continue
            if time.monotonic() - start > seconds:
                left_out += 1
                continue
            said = _one(backend, name, params, device)
            wrong += "wrong" in said
            print(f"{backend} {FormatSpec(name, params)}: {said}", flush=True)
    print(f"{wrong} wrong; no time was left for {left_out}")
    sys.exit(1 if wrong else 0)


def _one(backend: str, name: str, params: dict[str, object], device: str) -> str:
    said = []
    try:
        # All but our kernels on the CPU: the tool makes each launch many times slower.
        p = qk.quantize(torch.randn(SHAPE), name, **params)
        held = p.to(device)
        for m in ROWS if device == "cuda" else ROWS[:2]:
            x = torch.randn(m, SHAPE[1]).bfloat16()
            want = qk.matmul(x.double(), p, backend="reference")
            y = qk.matmul(x.to(device), held, backend=backend).cpu().double()
            error = float((y - want).norm() / want.norm())
            said.append(f"M={m} {error:.1e}" + ("" if error < 0.02 else " wrong"))
    except Exception as error:
        said.append(f"wrong: {type(error).__name__}: {error}"[:300])
    return ", ".join(said)


if __name__ == "__main__":
    typer.run(main)
