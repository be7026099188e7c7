"""Run every kernel at a real shape on a GPU: is its result right, and is it right every time?

    python -m bench.smoke --output OUT --jobs 14 --seconds 120
    TRITON_INTERPRET=1 python -m bench.smoke --tiny --formats nf4 --backends triton     # no GPU

The checks, for each format and backend, at 4096 x 4096 and at an odd shape, for each class of M:

    error       three calls (the first by a new plan, two by the kept one) agree with the float64
                product on the GPU; memory that a call allocates is poisoned with NaN
    repeat      many more calls give the same bits
    graph       y = (x W) W from a CUDA graph has the bits of eager calls with a wait in between: a
                kernel that PDL starts early must not read what is not written yet
    invariant   with batch invariance, a row gives the same bits whatever M it comes with
    nodes       the graph of a captured product holds kernels alone: no copy, no memset
    late        Triton kernels without PDL (QKERNELS_PDL=0) give the same bits

Kernels run in worker processes, because an illegal access ends the process it happens in. Prints
one line per kernel, failures first. All figures go to OUT/smoke.json as they are measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import qkernels as qk
from qkernels.benchmark import race, shapes, timing
from qkernels.formats.gguf import TYPES
from qkernels.quantizers.specs import FormatSpec, parse_specs

from . import starts, supervisor, worker

#: formats with layouts that no suite of the benchmarks has
MORE = (
    "gptq:bits=4,group_size=32,symmetric=false",
    "gptq:bits=4,group_size=-1",
    "gptq:bits=3,group_size=32,act_order=true",
    "awq:group_size=-1,symmetric=true",
    "nf4:block_size=4096",
    "spqr:act_order=true",
    "quip:bits=3",
    "quip_sharp:bits=3",
    "fp8:granularity=block",
    "w8a8:activation=static,input_scale=0.03,input_zero_point=-7",
)
#: formats for the checks "invariant", "nodes" and "late": one for each kind of kernel
INVARIANT = (
    "gptq:bits=4,group_size=128",
    "q4_k",
    "w8a8",
    "fp8:activation=dynamic",
    "quip_sharp",
    "spqr",
)
REPEATS = 100


@dataclass(frozen=True)
class Shape:
    """N, K, and the values of M to try. fp16_rows: the values of M to try in float16 too."""

    n: int
    k: int
    rows: tuple[int, ...]
    fp16_rows: tuple[int, ...]


REAL = Shape(4096, 4096, (1, 3, 8, 16, 33, 300), (1, 33, 300))
#: neither dimension is a multiple of a block, if the format accepts that
ODD = Shape(200, 4128, (1, 17, 131), ())
TINY = Shape(72, 512, (1, 17), (1,))


@dataclass
class Check:
    """Result of one check of one kernel.

    case: specification of the format. value: the error relative to its bound, or the number of
    calls that differed. failed: what is wrong; empty if nothing is.
    """

    case: str
    backend: str
    shape: str
    m: int
    dtype: str
    check: str
    value: float
    failed: str = ""


@dataclass
class Job:
    """What a worker has to do. cases: (specification of a format, backend)."""

    cases: list[tuple[str, str]]
    tiny: bool


def cases_of(formats: str, backends: str) -> list[tuple[str, str]]:
    """(Specification of a format, backend) for each of `formats` that has a packed layout."""
    if formats == "all":
        specs = [str(FormatSpec(name, params)) for name, params in shapes.formats_of("all")]
        specs += [*MORE, *(gguf.name for gguf in TYPES)]
        specs = list(dict.fromkeys(specs))
    else:
        specs = [str(spec) for spec in parse_specs(formats)]
    packed = [s for s in specs if not qk.formats.get(parse_specs(s)[0].name).dense]
    return [(spec, backend) for backend in backends.split(",") for spec in packed]


# ------------------------------------------------------------------ in the worker
@contextmanager
def poisoned() -> Iterator[None]:
    """Within the context, memory from torch.empty starts as NaN, or as the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(spec: str, backend: str, device: str, tiny: bool) -> Iterator[Check]:
    """All checks of one format on one backend."""
    for shape in (TINY,) if tiny else (REAL, ODD):
        p = quantized(spec, (shape.n, shape.k), device)
        for dtype in (torch.bfloat16, torch.float16):
            for m in shape.rows if dtype == torch.bfloat16 else shape.fp16_rows:
                yield from _product(spec, p, backend, m, dtype, 2 if tiny else REPEATS)
        if spec in INVARIANT and shape is not ODD:
            yield _invariant(spec, p, backend, shape.rows)
            if device == "cuda":
                yield from _started(spec, p, backend)


def quantized(spec: str, shape: tuple[int, int], device: str) -> qk.PackedWeight:
    """A random weight (N, K) in a format, with K rounded up to a multiple that the format takes."""
    parsed = parse_specs(spec)[0]
    multiple = qk.formats.get(parsed.name).k_multiple
    n, k = shape[0], -(-shape[1] // multiple) * multiple
    torch.manual_seed(0)
    weight = torch.randn(n, k, device=device) / k**0.5
    try:
        return qk.quantize(weight, parsed.name, **parsed.params)
    except ValueError:  # K must be whole groups or blocks
        k = -(-k // 128) * 128
        return qk.quantize(torch.randn(n, k, device=device) / k**0.5, parsed.name, **parsed.params)


def _product(
    spec: str, p: qk.PackedWeight, backend: str, m: int, dtype: torch.dtype, repeats: int
) -> Iterator[Check]:
    """The checks "error", "repeat" and "graph" of one product."""
    n, k = p.shape
    name = (spec, backend, f"{n}x{k}", m, str(dtype).removeprefix("torch."))
    x = torch.randn(m, k, device=p.device)
    if parse_specs(spec)[0].name == "int8":
        x[:, ::200] *= 20  # outliers, which LLM.int8() treats apart
    x = x.to(dtype)
    try:
        want = qk.matmul(x.double(), p, backend="reference")
        with poisoned():
            calls = [qk.matmul(x, p, backend=backend) for _ in range(3)]
        worst = max(_error(y, want, dtype) for y in calls)
        yield Check(
            *name, "error", worst, "" if worst < 1 else f"error is {worst:.3g} of its bound"
        )
        first = calls[0]
        differ = sum(
            (qk.matmul(x, p, backend=backend) != first).any().int() for _ in range(repeats)
        )
        yield Check(
            *name, "repeat", float(differ), f"{int(differ)} of {repeats} differ" if differ else ""
        )
        if n == k and p.device.type == "cuda":
            yield _graph(name, x, p, backend)
    except Exception as error:
        yield Check(*name, "error", float("inf"), _in_words(error))


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _error(y: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """The error of y relative to the allowed one: above 1 is wrong.

    W and y are rounded to `dtype` once each, which is a relative error of u = 2^-8 (bfloat16) or
    2^-11 (float16) each. So the root mean square of the error may be 2u of that of y, and 4e-3 at
    least, because float32 may round an activation to another code than float64. One output may be
    off by 8 times as much: five standard deviations, and the rounding of an output that is several
    times as large as most.
    """
    u = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    if not bool(y.isfinite().all()):
        return float("inf")
    error, scale = y.double() - want, want.norm() / want.numel() ** 0.5
    whole = float(error.norm() / want.norm()) / max(2 * u, 4e-3)
    one = float(error.abs().max() / scale) / (8 * max(2 * u, 4e-3))
    return max(whole, one)


def _graph(
    name: tuple[str, str, str, int, str], x: Tensor, p: qk.PackedWeight, backend: str
) -> Check:
    """The check "graph": replays and eager chains against calls with a wait between them."""

    def chain() -> Tensor:
        return qk.matmul(qk.matmul(x, p, backend=backend), p, backend=backend)

    inside = qk.matmul(x, p, backend=backend)
    torch.cuda.synchronize()
    want = qk.matmul(inside, p, backend=backend)
    torch.cuda.synchronize()
    outputs: list[Tensor] = []
    graph = timing.graph_of([lambda: outputs.append(chain())])
    differ = 0
    for _ in range(20):
        graph.replay()
        differ += int((outputs[-1] != want).any())
    eager = sum(int((chain() != want).any()) for _ in range(20))
    failed = (
        f"{differ} of 20 replays and {eager} of 20 eager chains differ" if differ or eager else ""
    )
    return Check(*name, "graph", float(differ + eager), failed)


def _invariant(spec: str, p: qk.PackedWeight, backend: str, rows: tuple[int, ...]) -> Check:
    """The check "invariant"."""
    n, k = p.shape
    name = (spec, backend, f"{n}x{k}", max(rows), "bfloat16", "invariant")
    x = torch.randn(max(rows), k, device=p.device).bfloat16()
    try:
        whole = qk.matmul(x, p, backend=backend, batch_invariant=True)
        parts = [(m, qk.matmul(x[:m], p, backend=backend, batch_invariant=True)) for m in rows]
        differ = [m for m, part in parts if not torch.equal(part, whole[:m])]
    except ValueError as error:  # a backend without a batch-invariant kernel says so
        return Check(*name, 0.0, "" if "batch_invariant" in str(error) else str(error)[:300])
    return Check(*name, float(len(differ)), f"other bits with M in {differ}" if differ else "")


def _started(spec: str, p: qk.PackedWeight, backend: str) -> Iterator[Check]:
    """The checks "nodes" and "late", of a product of one row."""
    n, k = p.shape
    name = (spec, backend, f"{n}x{k}", 1, "bfloat16")
    x = torch.randn(1, k, device=p.device).bfloat16()
    try:
        y = qk.matmul(x, p, backend=backend)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            qk.matmul(x, p, backend=backend)
        kinds = starts.node_kinds(graph.raw_cuda_graph())
        others = [kind for kind in kinds if kind != starts.KERNEL]
        failed = f"nodes of kinds {others} beside kernels (CUgraphNodeType)" if others else ""
        yield Check(*name, "nodes", float(len(kinds)), failed)
        if backend == "triton":
            with starts.late(p):
                differ = sum(int((qk.matmul(x, p, backend=backend) != y).any()) for _ in range(20))
            yield Check(*name, "late", float(differ), f"{differ} of 20 differ" if differ else "")
    except Exception as error:
        yield Check(*name, "started", float("inf"), _in_words(error))


def work(job: Job, say: Any) -> int:
    """Do all cases and `say` each event. Returns the exit code of the process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for spec, backend in job.cases:
        started = time.monotonic()
        say({"begin": [spec, backend]})
        try:
            for done in check(spec, backend, device, job.tiny):
                say({"check": asdict(done)})
                if done.failed and ("captur" in done.failed or worker.spoilt(device)):
                    return worker.SPOILT
        except Exception as error:
            failed = Check(spec, backend, "", 0, "", "error", float("inf"), _in_words(error))
            say({"check": asdict(failed)})
            if worker.spoilt(device):
                return worker.SPOILT
        say({"end": [spec, backend, time.monotonic() - started]})
    return 0


# ------------------------------------------------------------------ in the parent
@dataclass
class Share:
    """A worker and the cases that it has not finished.

    patience: seconds without an event after which the worker counts as hung.
    """

    cases: list[tuple[str, str]]
    tiny: bool
    patience: float = 60.0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.worker = supervisor.Worker(Job(self.cases, self.tiny), "bench.smoke")
        self.heard, self.here = time.monotonic(), self.cases[0]

    def poll(self) -> tuple[list[Check], bool]:
        """The checks since the last call, and whether more are to come."""
        events = self.worker.lines(0.02)
        why = ""
        if events is None:
            code = self.worker.process.wait()
            why = (
                ""
                if code in (0, worker.SPOILT)
                else f"the process died ({code}): {self.worker.last_words()}"
            )
        elif not events and time.monotonic() - self.heard > self.patience:
            why = f"hung: no answer for {self.patience:.0f} s"
        elif events:
            self.heard = time.monotonic()
        checks = []
        for event in events or []:
            if "begin" in event:
                self.here = (event["begin"][0], event["begin"][1])
            elif "end" in event:
                self.cases = [one for one in self.cases if one != self.here]
            else:
                checks.append(Check(**event["check"]))
        if events is not None and not why:
            return checks, True
        self.worker.kill()
        if why:
            checks.append(Check(*self.here, "", 0, "", "error", float("inf"), why[:300]))
        self.cases = [one for one in self.cases if one != self.here]
        if self.cases:
            self.start()
        return checks, bool(self.cases)


def summary(checks: list[Check], left: list[tuple[str, str]]) -> list[str]:
    """One line per kernel: failures first, then the others with the largest errors first.

    left: the cases that there was no time for.
    """
    by_case: dict[tuple[str, str], list[Check]] = {}
    for one in checks:
        by_case.setdefault((one.case, one.backend), []).append(one)
    bad, good = [], []
    for (case, backend), mine in by_case.items():
        failed = [one for one in mine if one.failed]
        if failed:
            places = [f"{o.shape} M={o.m} {o.dtype} {o.check}: {o.failed[:90]}" for o in failed[:3]]
            bad.append(
                f"FAILED {backend} {case}, {len(failed)} of {len(mine)}: " + " | ".join(places)
            )
        else:
            worst = max((one.value for one in mine if one.check == "error"), default=0.0)
            good.append((worst, f"{worst:.2f} {backend} {case}"))
    lines = sorted(bad)
    good.sort(reverse=True)
    lines.append(f"right: {len(good)} kernels; worst error relative to its bound:")
    lines += ["; ".join(text for _, text in good[i : i + 3]) for i in range(0, len(good), 3)]
    if left:
        lines.append("no time was left for: " + ", ".join(f"{b} {c}" for c, b in left))
    return lines


def main(
    formats: Annotated[str, typer.Option(help="all, or specifications of formats.")] = "all",
    backends: str = "triton,cuda",
    jobs: Annotated[
        int, typer.Option(help="Worker processes, which also compile side by side.")
    ] = 2,
    seconds: Annotated[
        float, typer.Option(help="Seconds after which the other cases are given up.")
    ] = 1e9,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="One small shape, for machines without a GPU.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for smoke.json.")] = None,
) -> None:
    started = time.monotonic()
    cases = cases_of(formats, backends)
    shares = [Share(cases[i::jobs], tiny) for i in range(min(jobs, len(cases)))]
    checks: list[Check] = []
    shown = started
    try:
        while shares and time.monotonic() - started < seconds:
            for share in list(shares):
                results, more = share.poll()
                checks += results
                if not more:
                    shares.remove(share)
            if output is not None and time.monotonic() - shown > 5:
                shown = time.monotonic()
                _write(output, checks)
    finally:
        for share in shares:
            share.worker.end()
        for share in shares:
            share.worker.kill()
    if output is not None:
        _write(output, checks)
    left = [case for share in shares for case in share.cases]
    print("\n".join(summary(checks, left)))
    print(f"{len(checks)} checks in {time.monotonic() - started:.0f} s")
    raise typer.Exit(1 if left or any(one.failed for one in checks) else 0)


def _write(output: Path, checks: list[Check]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    report = {"environment": race.environment(), "checks": [asdict(one) for one in checks]}
    supervisor.write(output / "smoke.json", json.dumps(report) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].isdigit():
        with os.fdopen(int(sys.argv[1]), "w", buffering=1) as pipe:
            ended = work(
                Job(**json.load(sys.stdin)), lambda event: pipe.write(json.dumps(event) + "\n")
            )
        sys.stdout.flush()
        os._exit(ended)  # at a normal exit a spoilt context prints errors that are known already
    typer.run(main)
