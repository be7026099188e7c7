"""What a call costs the host: QuantLinear and qk.matmul with a kernel that does nothing.

TRITON_INTERPRET=1 python -m bench.host
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import qkernels as qk
from qkernels import dispatch


def microseconds(call: Callable[[], object], calls: int = 2000, rounds: int = 7) -> float:
    """Best mean of several rounds: what interrupts a round is not the call's."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def measure() -> dict[str, float]:
    """Microseconds a call, by what is called; the CPU's, whatever GPU there is."""
    y = torch.empty(1, 64)
    null = dispatch.Kernel(
        "null", "cuda", dispatch.ANY_LAYOUT, lambda: None, lambda problem: None, lambda *operands: y
    )
    kernels, dispatch._KERNELS = dispatch._KERNELS, {"null": null}
    dispatch._choose.cache_clear()
    qk.ops._kernel.cache_clear()
    try:
        p = qk.quantize(torch.randn(64, 256), "gptq", group_size=64)
        layer, x, bias = qk.QuantLinear(p, torch.zeros(64)), torch.randn(1, 256), torch.zeros(64)
        spec, storage = qk.ops.spec_of(p), list(p.storage.values())
        with torch.inference_mode():
            return {
                "QuantLinear": microseconds(lambda: layer(x)),
                "qkernels.matmul": microseconds(lambda: qk.matmul(x, p, bias)),
                "torch.ops.qkernels.matmul": microseconds(
                    lambda: torch.ops.qkernels.matmul(x, storage, bias, spec, "auto", False)
                ),
            }
    finally:
        dispatch._KERNELS = kernels
        dispatch._choose.cache_clear()
        qk.ops._kernel.cache_clear()


if __name__ == "__main__":
    for name, found in measure().items():
        print(f"{name:28} {found:6.1f} us")
