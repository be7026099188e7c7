"""Races products of one weight: every contestant gets the same weights, inputs and timing loop."""

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
    """A weight as a contestant holds it.

    call: x (M, K) bfloat16 -> y (M, N). nbytes: of the packed weight. want: x -> what y should be,
    in float64, for the weight as this contestant rounded it; or the product with the unrounded
    weight. tolerance: of the relative error against `want`. kind: what the tensor cores multiply.
    """

    call: Callable[[Tensor], Tensor]
    nbytes: int
    want: Callable[[Tensor], Tensor]
    tolerance: float
    kind: str = "bf16"
    kernel: Callable[[int], str] = field(default=lambda m: "")


class Contestant(ABC):
    """Somebody's product with weights in somebody's format. `group` names those that race each
    other.

    graphs: whether a CUDA graph can capture the product; one that waits for the GPU cannot be.
    outliers: share of the columns of x that are far larger than the others, for all of a group.
    compiles: whether the first calls compile kernels that other processes find in a cache.
    patience: seconds after which no answer from preparing a weight or from timing one number of
    rows means that it hangs.
    """

    name: str
    group: str
    graphs = True
    outliers = 0.0
    compiles = False
    patience = 45.0

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""
        return None

    def takes(self, n: int, k: int, m: int) -> bool:
        return True

    @abstractmethod
    def prepare(self, weight: Tensor) -> Layer:
        """`weight`: (N, K) float32. The layer must be one that copy.deepcopy copies, tensors and
        all.
        """


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


#: formats of ours -> what others call theirs
GROUPS = {
    "gptq:bits=4,group_size=128": "int4 g128",
    "gptq:bits=4,group_size=128,symmetric=false": "int4 g128",
    "awq:group_size=128": "int4 g128",
    "gptq:bits=8,group_size=128": "int8 g128",
}


#: part of the columns of x that hold outliers in races of LLM.int8(), as bench/targets.md requires
OUTLIERS = 0.005


class Ours(Contestant):
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
        # the reference of a large weight in float32: float64 copies of it would not fit
        dtype = torch.float64 if weight.numel() <= 2**26 else torch.float32
        kind = roofline.operands(self.format, packed.shape, dict(packed.params))
        return Layer(
            linear,
            packed.nbytes,
            lambda x: matmul(x.to(dtype), linear.packed, backend="reference"),
            # an activation that float32 rounds to another code than float64 is one step off: far
            # below
            0.02,
            kind,
            lambda m: explain(linear.packed, m, torch.bfloat16, backend=backend).kernel,
        )


def ours(contestant: str) -> tuple[str, str] | None:
    """Backend and format of one of ours: "qkernels cuda nf4" -> ("cuda", "nf4"); None for others."""
    who, *rest = contestant.split(" ", 2)
    return (rest[0], rest[1]) if who == "qkernels" and len(rest) == 2 else None


@dataclass
class Row:
    """One timed product; times in microseconds. `chain`: one of many that follow each other, which
    all other figures are about; `alone`: from a cold start. `eager`: started by the host, not from
    a CUDA graph. `bandwidth`: GB/s of packed bytes. `error`: relative, before timing. `failed`: why
    there are no times."""

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
    """Time one contestant on one shape. `dense`, (N, K, M) -> microseconds, is what speeds are
    relative to; the dense product fills it in."""
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
                found = roofline.estimate(gpu, shape, row.m, row.nbytes, kind=row.limit or "bf16")
                row.predicted, row.limit = found.seconds * 1e6, found.limit
        yield row


def taken(contestant: Contestant, shape: tuple[int, int], rows: list[int]) -> list[int]:
    """The numbers of rows that the contestant takes."""
    return [m for m in rows if contestant.takes(*shape, m)]


def warm(
    contestant: Contestant, shape: tuple[int, int], rows: list[int], settings: Settings
) -> None:
    """Call it once for each number of rows, so that what it compiles lies on disk."""
    if contestant.unavailable() is not None:
        return
    with torch.no_grad():
        made = contestant.prepare(_weight(shape, settings))
    with torch.inference_mode():
        for m in taken(contestant, shape, rows):
            made.call(_input(shape[1], m, settings, contestant.outliers))
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
    n, k = weight.shape
    why = contestant.unavailable()
    layers: list[Layer] = []
    if why is None:
        try:
            with torch.no_grad():
                first = contestant.prepare(weight)
                copies = timing.copies_for(first.nbytes, settings.device)
                layers = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
        except Exception as error:  # a peer that fails is a result, too
            why = f"failed: {type(error).__name__}: {error}"
    for m, x in inputs.items():
        row = Row(contestant.name, contestant.group, n, k, m)
        if why is not None:
            row.failed = " ".join(why.split())[:300]
            yield row
            continue
        try:
            with torch.inference_mode():
                _time(row, contestant, layers, x, settings)
        except Exception as error:
            row.failed = " ".join(f"failed: {type(error).__name__}: {error}".split())[:300]
            if contestant.graphs and "captur" in row.failed:
                contestant.graphs = False
                _eager(row, contestant, layers, x, settings)
        yield row


def _eager(
    row: Row, contestant: Contestant, layers: list[Layer], x: Tensor, settings: Settings
) -> None:
    """Once more, without a CUDA graph, for one who cannot be captured; with its first failure if
    that fails.
    """
    why, row.failed = row.failed, ""
    try:
        with torch.inference_mode():
            _time(row, contestant, layers, x, settings)
    except Exception:
        row.failed = why


def _time(
    row: Row, contestant: Contestant, layers: list[Layer], x: Tensor, settings: Settings
) -> None:
    first = layers[0]
    row.nbytes = first.nbytes
    want = first.want(x)
    row.error = float((first.call(x).to(want.dtype) - want).norm() / want.norm())
    if not row.error < first.tolerance:
        raise RuntimeError(f"wrong result, not timed: relative error {row.error:.3g}")
    del want
    calls = [lambda layer=layer: layer.call(x) for layer in layers]
    found = timing.chain(calls, settings.device, settings.repeats, contestant.graphs)
    row.chain, row.spread, row.eager = *found, not contestant.graphs
    row.alone = timing.alone(calls[0], settings.device, settings.repeats, contestant.graphs).median
    row.kernel = first.kernel(row.m)
    row.bandwidth = first.nbytes / found.median / 1e3
    row.tflops = 2 * row.m * row.n * row.k / found.median / 1e6
    row.limit = first.kind


def environment() -> dict[str, Any]:
    """What a result must say about where it was measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "gpu": None,
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **_driver()}
    return found


def _driver() -> dict[str, str]:
    """Driver, clocks and power limit, as nvidia-smi tells them; nothing if it is not there."""
    import subprocess

    fields = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(
        zip(fields, (part.strip() for part in said.splitlines()[0].split(",")), strict=False)
    )


def report_of(
    rows: list[Row], copy_bandwidth: float | None, measured: dict[str, Any] | None = None
) -> dict[str, Any]:
    """JSON-able: where (`measured`, or `environment` now), how fast a large copy is, and every row."""
    return {
        "environment": measured or environment(),
        "copy_bandwidth": copy_bandwidth,
        "results": [asdict(row) for row in rows],
    }
