"""backend="auto" chooses by measurements: from the rows of a race to the chosen kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import faster
from qkernels import formats, layouts
from qkernels.backends import measured, registry
from qkernels.backends.problem import Problem
from qkernels.benchmark import shapes

from ..conftest import CASES, case_id, k_of


def row(backend: str, spec: str, m: int, chain: float | None, n: int = 8192) -> dict[str, Any]:
    return {"contestant": f"qkernels {backend} {spec}", "n": n, "k": 8192, "m": m, "chain": chain}


def test_the_table_of_a_race() -> None:
    gptq, awq = "gptq:bits=4,group_size=128", "awq:group_size=128"
    rows = [
        row("cuda", gptq, 1, 20.0), row("triton", gptq, 1, 30.0),
        row("cuda", gptq, 8, 20.0), row("triton", gptq, 8, 21.0),
        row("cuda", gptq, 64, 30.0), row("triton", gptq, 64, 20.0),
        row("cuda", gptq, 4096, 10.0), row("triton", gptq, 4096, 10.2),  # within the margin
        row("cuda", "nf4", 1, None), row("triton", "nf4", 1, 9.0),  # one of them was not timed
        {**row("cuda", gptq, 1, 1.0), "contestant": "torch bf16"},
    ]  # fmt: skip
    assert faster.table(rows) == {"linear4 group": [(8, "cuda"), (4096, "triton")]}
    # AWQ has the same kernels: at M = 8 both together are 1.05 * 0.9 as fast with CUDA.
    rows += [row("cuda", awq, 8, 20.0), row("triton", awq, 8, 18.0)]
    assert faster.table(rows)["linear4 group"] == [(1, "cuda"), (4096, "triton")]


def test_every_kind_that_races_has_a_name() -> None:
    kinds = {
        faster._kind(
            f"{name}:{','.join(f'{k}={v}' for k, v in params.items())}".rstrip(":"), (512, 512), 1
        )
        for name, params in shapes.formats_of("all")
        if name != "bf16"
    }
    assert None not in kinds
    assert {"linear4 group", "lut164 scale", "int8 row token outliers", "e4m3 block group"} <= kinds


@pytest.fixture
def two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels triton.one, cuda.one, cuda.two, in this order; CUDA measured faster up to M = 8."""

    def kernel(name: str) -> registry.Kernel:
        return registry.Kernel(
            name,
            name.split(".")[0],
            layouts.WEIGHT_ONLY,
            lambda: None,
            lambda problem: None,
            lambda *_: None,
        )

    names = ("triton.one", "cuda.one", "cuda.two")
    monkeypatch.setattr(registry, "_KERNELS", {name: kernel(name) for name in names})
    monkeypatch.setattr(measured, "FASTER", {"lut164 scale": ((8, "cuda"), (64, "triton"))})
    monkeypatch.setattr(measured, "RUN", "bench/results/here")
    registry.choose.cache_clear()
    yield
    registry.choose.cache_clear()


@pytest.mark.usefixtures("two_kernels")
def test_auto_takes_the_faster_one() -> None:
    params = (("block_size", 64), ("double_quant", False))
    problem = Problem("nf4", params, (512, 512), 8, torch.bfloat16, "cuda", (9, 0))

    def chosen(backend: str = "auto", **changes: Any) -> str:
        return registry.select(problem._replace(**changes), backend).name

    assert chosen() == "cuda.one"
    assert [chosen(m=m) for m in (1, 9, 64, 4096)] == [
        "cuda.one",
        "triton.one",
        "triton.one",
        "triton.one",
    ]
    assert chosen("triton") == "triton.one"
    # what was measured says nothing about another GPU, or about sums in one order
    assert chosen(capability=(8, 0)) == chosen(batch_invariant=True) == "triton.one"
    _, rejected = registry.choose(problem, "auto")
    assert ("triton.one", measured.words("cuda")) in rejected
    assert ("cuda.two", "cuda.one is preferred") in rejected


@pytest.mark.parametrize(("name", "params"), CASES, ids=map(case_id, CASES))
def test_every_format_can_be_looked_up(name: str, params: dict[str, Any]) -> None:
    """On the measured GPU every call of every format looks into the table."""
    fmt = formats.get(name)
    shape = (72, k_of(name, 192))
    known = {key: value for key, value in params.items() if key not in fmt.quantize_only}
    items = tuple(sorted(fmt.resolve(shape, known).items()))
    problem = Problem(name, items, shape, 1, torch.float16, "cuda", measured.CAPABILITY)
    assert measured.faster(problem) in (None, "cuda", "triton")


def test_the_table_is_well_formed() -> None:
    for kind, entries in measured.FASTER.items():
        assert [m for m, _ in entries] == sorted({m for m, _ in entries}), kind
        assert {backend for _, backend in entries} <= {"cuda", "triton"}, kind
