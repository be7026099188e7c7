"""The least time a product could take: bytes over bandwidth, operations over peak, and a launch.

Peaks are the vendors' (H100, H200, B200 and RTX 5090 data sheets and architecture papers; dense, no
sparsity). A long copy reaches COPY_FRACTION of the bandwidth, and a large matmul reaches
MATMUL_FRACTION of the peak: an H200 copies at 4.3 of 4.8 TB/s and multiplies bf16 at 790 of 989
TFLOP/s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import formats, layouts

COPY_FRACTION = 0.9
MATMUL_FRACTION = 0.8


class Gpu(NamedTuple):
    """A GPU's peaks.

    Attributes:
        bandwidth: of memory, in GB/s.
        bf16, fp8, int8: of the tensor cores, in TFLOP/s.
        launch: seconds that a kernel takes which does nothing.
    """

    name: str
    sm_count: int
    bandwidth: float
    bf16: float
    fp8: float
    int8: float
    l2_bytes: int
    launch: float = 2.5e-6


GPUS = (
    Gpu("H100", 132, 3350, 989, 1979, 1979, 50 * 2**20),
    Gpu("H200", 132, 4800, 989, 1979, 1979, 50 * 2**20),
    Gpu("B200", 148, 8000, 2250, 4500, 4500, 126 * 2**20),
    Gpu("RTX 5090", 170, 1792, 209.5, 419, 838, 96 * 2**20),
)


class Estimate(NamedTuple):
    """The least seconds, and what they are spent on: "memory", "tensor cores" or "launch"."""

    seconds: float
    limit: str


def find(name: str) -> Gpu | None:
    """The GPU of GPUS whose name is part of `name`, the driver's name for it; None if none is."""
    return next((gpu for gpu in GPUS if gpu.name.lower() in name.lower()), None)


def operands(format: str, shape: tuple[int, int], params: dict[str, Any]) -> str:
    """The operands of the tensor cores for a weight of this format, as `estimate` takes its `kind`.

    params: all parameters of the format.
    """
    fmt = formats.get(format)
    if fmt.kernel_layout(params) != layouts.EIGHT_BIT:
        return "bf16"
    return "int8" if fmt.eight_bit_traits(shape, params).kind == "int8" else "fp8"


def estimate(
    gpu: Gpu,
    shape: tuple[int, int],
    m: int,
    weight_bytes: int,
    *,
    kind: str = "bf16",
    launches: int = 1,
) -> Estimate:
    """Least time of y (M, N) = x (M, K) @ W^T, with x and y in 16 bits.

    Args:
        gpu: the GPU.
        shape: (N, K).
        m: rows of x.
        weight_bytes: of the packed weight.
        kind: operands of the tensor cores, "bf16", "fp8" or "int8".
        launches: kernels that run one after another.
    """
    n, k = shape
    nbytes = weight_bytes + 2 * m * (n + k)
    memory = nbytes / (gpu.bandwidth * 1e9 * COPY_FRACTION)
    compute = 2 * m * n * k / (getattr(gpu, kind) * 1e12 * MATMUL_FRACTION)
    work, limit = max((memory, "memory"), (compute, "tensor cores"))
    start = launches * gpu.launch
    return Estimate(start + work, limit if work > start else "launch")
