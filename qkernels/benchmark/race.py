"""Times products of one weight: every contestant gets the same weights, inputs and timing loop."""

from __future__ import annotations

import copy
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..backends import roofline
from ..backends.explain import explain
from ..nn.linear import QuantLinear
from ..ops.matmul import matmul
from ..quantizers.specs import FormatSpec
from ..weights.packed import quantize
from . import timing


@dataclass
class Layer:
    """A weight in a contestant's format, with the contestant's product.

    Attributes:
        call: x (M, K) bfloat16 -> y (M, N).
        nbytes: bytes of the packed weight.
        want: x -> the expected y in float64, for the weight as this contestant rounded it, or for
            the unrounded weight.
        tolerance: largest relative error against `want`.
        kind: operand type of the tensor cores.
        kernel: M -> name of the kernel that runs.
    """

    call: Callable[[Tensor], Tensor]
    nbytes: int
    want: Callable[[Tensor], Tensor]
    tolerance: float
    kind: str = "bf16"
    kernel: Callable[[int], str] = field(default=lambda m: "")


class Contestant(ABC):
    """A product to time: one implementation with one format.

    Attributes:
        name: name in reports.
        group: contestants of the same group are compared with each other.
        graphs: whether a CUDA graph can capture the product; a product that waits for the GPU
            cannot be captured.
        outliers: fraction of the columns of x that are far larger than the others; the same for a
            whole group.
        compiles: whether the first calls compile kernels that other processes find in a cache.
        patience: seconds until preparing a weight, or timing one number of rows, counts as hanging.
    """

    name: str
    group: str
    graphs = True
    outliers = 0.0
    compiles = False
    patience = 45.0

    def unavailable(self) -> str | None:
        """The reason why it cannot run here, or None."""
        return None

    def takes(self, n: int, k: int, m: int) -> bool:
        """Whether it can multiply M rows with a weight (N, K)."""
        return True

    @abstractmethod
    def prepare(self, weight: Tensor) -> Layer:
        """Quantize a weight (N, K) float32. copy.deepcopy must copy the layer and its tensors."""


class Dense(Contestant):
    """torch's matmul of 16-bit weights: cuBLAS."""

    name, group = "torch bf16", "dense"

    def prepare(self, weight: Tensor) -> Layer:
        linear = torch.nn.Linear(
            weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16, device=weight.device
        ).requires_grad_(False)
        linear.weight.copy_(weight)
        return Layer(
            linear, weight.numel() * 2, lambda x: x.double() @ linear.weight.double().T, 0.01
        )


#: spec of our format -> group of the same format in other packages
GROUPS = {
    "gptq:bits=4,group_size=128": "int4 g128",
    "gptq:bits=4,group_size=128,symmetric=false": "int4 g128",
    "awq:group_size=128": "int4 g128",
    "gptq:bits=8,group_size=128": "int8 g128",
}


#: fraction of outlier columns for LLM.int8(), which exists because of them: DESIGN section 6 asks
#: for its speed with outliers
OUTLIERS = 0.005


class Ours(Contestant):
    """qkernels' product with one backend and one format."""

    def __init__(self, format: str, params: dict[str, Any], backend: str) -> None:
        self.format, self.params, self.backend = format, params, backend
        spec = str(FormatSpec(format, params))
        self.name = f"qkernels {backend} {spec}"
        self.group = GROUPS.get(spec, spec)
        self.compiles = backend == "triton"
        self.outliers = OUTLIERS if format == "int8" else 0.0

    def prepare(self, weight: Tensor) -> Layer:
        packed = quantize(weight, self.format, **self.params)
        dense = formats.get(self.format).dense
        backend = "auto" if dense else self.backend
        linear = QuantLinear(packed, backend=backend).requires_grad_(False)
        # The reference of a large weight is float32, because float64 copies of it would not fit.
        dtype = torch.float64 if weight.numel() <= 2**26 else torch.float32
        kind = roofline.operands(self.format, packed.shape, dict(packed.params))
        return Layer(
            linear,
            packed.nbytes,
            lambda x: matmul(x.to(dtype), linear.packed, backend="reference"),
            # The error is far below this, even if float32 and float64 round an activation to
            # neighbouring codes.
            0.02,
            kind,
            lambda m: explain(linear.packed, m, torch.bfloat16, backend=backend).kernel,
        )


def ours(contestant: str) -> tuple[str, str] | None:
    """(backend, format) of our contestants: "qkernels cuda nf4" -> ("cuda", "nf4"); else None."""
    package, *rest = contestant.split(" ", 2)
    return (rest[0], rest[1]) if package == "qkernels" and len(rest) == 2 else None


@dataclass
class Row:
    """One timed product. Times are in microseconds.

    Attributes:
        contestant, group: as in `Contestant`.
        n, k, m: sizes of the weight (N, K), and rows of x.
        kernel: name of the kernel.
        nbytes: bytes of the packed weight.
        error: relative error, checked before timing.
        chain: time of one of many calls in a row; all other figures are derived from it.
        spread: distance between the quartiles of `chain`.
        alone: time of a single call from a cold start.
        speedup: time of the dense product / `chain`.
        bandwidth: GB/s of packed bytes.
        tflops: 2*M*N*K / `chain`.
        predicted, limit: time of the roofline, and its bound.
        failed: the reason why there are no times.
        eager: whether the host launched the calls, instead of a CUDA graph.
    """

    contestant: str
    group: str
    n: int
    k: int
    m: int
    kernel: str = ""
    nbytes: int = 0
    error: float | None = None
    chain: float | None = None
    spread: float | None = None
    alone: float | None = None
    speedup: float | None = None
    bandwidth: float | None = None
    tflops: float | None = None
    predicted: float | None = None
    limit: str = ""
    failed: str = ""
    eager: bool = False


@dataclass(frozen=True)
class Settings:
    """Device, samples per time, and seed of weights and inputs."""

    device: str
    repeats: int = 20
    seed: int = 0


def run(
    contestants: Iterable[Contestant],
    shapes: list[tuple[int, int]],
    rows: list[int],
    settings: Settings,
) -> Iterator[Row]:
    """Time every contestant on every shape and number of rows; the dense product goes first."""
    dense: dict[tuple[int, int, int], float] = {}
    for shape in shapes:
        for contestant in [Dense(), *contestants]:
            yield from case(contestant, shape, rows, settings, dense)


def case(
    contestant: Contestant,
    shape: tuple[int, int],
    rows: list[int],
    settings: Settings,
    dense: dict[tuple[int, int, int], float],
) -> Iterator[Row]:
    """Time one contestant on one shape.

    dense: (N, K, M) -> microseconds of the dense product, which fills it in; speedups refer to it.
    """
    gpu = roofline.find(torch.cuda.get_device_name()) if settings.device == "cuda" else None
    weight = _weight(shape, settings)
    inputs = {
        m: _input(shape[1], m, settings, contestant.outliers)
        for m in taken(contestant, shape, rows)
    }
    for row in _race(contestant, weight, inputs, settings):
        if row.chain is not None:
            place = (*shape, row.m)
            if isinstance(contestant, Dense):
                dense[place] = row.chain
            if place in dense:
                row.speedup = dense[place] / row.chain
            if gpu is not None:
                bound = roofline.estimate(gpu, shape, row.m, row.nbytes, kind=row.limit or "bf16")
                row.predicted, row.limit = bound.seconds * 1e6, bound.limit
        yield row


def taken(contestant: Contestant, shape: tuple[int, int], rows: list[int]) -> list[int]:
    """The entries of `rows` that the contestant can multiply."""
    return [m for m in rows if contestant.takes(*shape, m)]


def warm(
    contestant: Contestant, shape: tuple[int, int], rows: list[int], settings: Settings
) -> None:
    """Call the contestant once for each number of rows, so that compiled kernels are on disk."""
    if contestant.unavailable() is not None:
        return
    with torch.no_grad():
        layer = contestant.prepare(_weight(shape, settings))
    with torch.inference_mode():
        for m in taken(contestant, shape, rows):
            layer.call(_input(shape[1], m, settings, contestant.outliers))
    if settings.device == "cuda":
        torch.cuda.synchronize()


@lru_cache(maxsize=1)
def _weight(shape: tuple[int, int], settings: Settings) -> Tensor:
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    return torch.randn(shape, device=settings.device, generator=generator) / shape[1] ** 0.5


@lru_cache(maxsize=32)
def _input(k: int, m: int, settings: Settings, outliers: float) -> Tensor:
    generator = torch.Generator(settings.device).manual_seed(settings.seed + m)
    x = torch.randn(m, k, device=settings.device, generator=generator)
    if outliers:
        x[:, :: round(1 / outliers)] *= 20
    return x.bfloat16()


def _race(
    contestant: Contestant, weight: Tensor, inputs: dict[int, Tensor], settings: Settings
) -> Iterator[Row]:
    """One row for each entry of `inputs` (M -> x), without speedup and prediction."""
    n, k = weight.shape
    reason = contestant.unavailable()
    layers: list[Layer] = []
    if reason is None:
        try:
            with torch.no_grad():
                first = contestant.prepare(weight)
                copies = timing.copies_for(first.nbytes, settings.device)
                layers = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
        except Exception as error:  # a peer that fails is a result, too
            reason = f"failed: {type(error).__name__}: {error}"
    for m, x in inputs.items():
        row = Row(contestant.name, contestant.group, n, k, m)
        if reason is not None:
            row.failed = " ".join(reason.split())[:300]
            yield row
            continue
        try:
            with torch.inference_mode():
                _time(row, contestant, layers, x, settings)
        except Exception as error:
            row.failed = " ".join(f"failed: {type(error).__name__}: {error}".split())[:300]
            if contestant.graphs and "captur" in row.failed:
                contestant.graphs = False
                _time_eager(row, contestant, layers, x, settings)
        yield row


def _time_eager(
    row: Row, contestant: Contestant, layers: list[Layer], x: Tensor, settings: Settings
) -> None:
    """Time again without a CUDA graph, after a capture failed; keep that failure if this fails."""
    failure, row.failed = row.failed, ""
    try:
        with torch.inference_mode():
            _time(row, contestant, layers, x, settings)
    except Exception:
        row.failed = failure


def _time(
    row: Row, contestant: Contestant, layers: list[Layer], x: Tensor, settings: Settings
) -> None:
    """Check the result of the first layer, then fill in the times of `row`."""
    first = layers[0]
    row.nbytes = first.nbytes
    want = first.want(x)
    row.error = float((first.call(x).to(want.dtype) - want).norm() / want.norm())
    if not row.error < first.tolerance:
        raise RuntimeError(f"wrong result, not timed: relative error {row.error:.3g}")
    del want
    calls = [lambda layer=layer: layer.call(x) for layer in layers]
    chain = timing.chain(calls, settings.device, settings.repeats, contestant.graphs)
    row.chain, row.spread, row.eager = *chain, not contestant.graphs
    row.alone = timing.alone(calls[0], settings.device, settings.repeats, contestant.graphs).median
    row.kernel = first.kernel(row.m)
    row.bandwidth = first.nbytes / chain.median / 1e3
    row.tflops = 2 * row.m * row.n * row.k / chain.median / 1e6
    row.limit = first.kind


def environment() -> dict[str, Any]:
    """The machine and the versions, which every result must state."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "gpu": None,
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **_driver()}
    return facts


def _driver() -> dict[str, str]:
    """Driver, clocks and power limit from nvidia-smi; empty without it."""
    import subprocess

    fields = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = (part.strip() for part in output.splitlines()[0].split(","))
    return dict(zip(fields, values, strict=False))


def report_of(
    rows: list[Row], copy_bandwidth: float | None, measured: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The report for JSON: the environment, GB/s of a large copy, and every row.

    measured: the environment of the rows, if it is not the current one.
    """
    return {
        "environment": measured or environment(),
        "copy_bandwidth": copy_bandwidth,
        "results": [asdict(row) for row in rows],
    }
