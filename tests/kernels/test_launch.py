"""Kept plans of products: the same kernels with the same arguments, and the same results.

To compare arguments, a stand-in for the driver takes the launches of kernels compiled for sm_90, so
no GPU is needed. That runs in a separate process, because in this one kernels may be interpreted.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels as qk
from bench import host
from qkernels.backends import registry, workspace
from qkernels.backends.plan import Plan, Plans
from qkernels.backends.problem import problem_of
from qkernels.ops import operator_plans

from ..conftest import DEVICE, k_of

pytest.importorskip("triton")
from .instances import cases_by_launch


def launched(name: str, params: dict[str, object], bias: bool, m: int) -> None:
    """Compare kept launches with triton's, argument for argument. Needs a process without the
    interpreter.
    """
    p = qk.quantize(torch.randn(96, 256), name, **params)
    added = torch.randn(96).half() if bias else None
    plain, odd = torch.randn(m, 256).half(), torch.randn(m * 256 + 1).half()[1:].view(m, 256)
    assert plain.data_ptr() % 16 == 0
    assert odd.data_ptr() % 16 != 0, "of another alignment, so of another kernel"
    with (
        host.null_driver(record=True) as driver,
        host.only(host.launcher_of("triton", name, params)),
    ):
        for x in (plain, odd):
            taken = []
            for _ in range(4):  # triton's, then those of the kept plan
                driver.launches.clear()
                with torch.inference_mode():
                    y = qk.matmul(x, p, added)
                taken.append((y, list(driver.launches)))
            kept = taken[-1][1]
            for _, _, values in kept:
                assert not any(isinstance(v, torch.Tensor) for v in flat(values)), (
                    "this was no kept launch"
                )
            for y, found in taken:
                assert [(function, grid) for function, grid, _ in found] == [
                    (function, grid) for function, grid, _ in kept
                ]
                assert y.data_ptr() in addresses(found[-1][2]), (
                    "the output is not what the kernel writes"
                )
                assert (plain if x is plain else odd).data_ptr() in addresses(found[0][2])
            first = taken[0][1]
            for (_, _, theirs), (_, _, ours) in zip(first, kept, strict=True):
                # Only the addresses of this call's own memory may differ.
                assert len(theirs) == len(ours)
                weights = {t.data_ptr() for t in p.storage.values()}
                for a, b in zip(flat(theirs), addresses(ours), strict=True):
                    if isinstance(a, torch.Tensor) and a.data_ptr() not in weights:
                        assert b > 2**20, "an address"
                    else:
                        assert addresses([a]) == [b]
            # In both, the next kernel reads the address that a kernel writes.
            assert shared(first) == shared(kept)


def shared(launches: list[tuple[Any, Any, tuple[Any, ...]]]) -> list[tuple[int, int]]:
    """Pairs of arguments, of all kernels together, that are the same address."""
    found = [a for _, _, values in launches for a in addresses(values)]
    large = [(i, a) for i, a in enumerate(found) if isinstance(a, int) and a > 2**20]
    return [(i, j) for i, a in large for j, b in large if i < j and a == b]


def flat(values: Any) -> list[Any]:
    return [part for v in values for part in (flat(v) if type(v) is tuple else [v])]


def addresses(values: Any) -> list[Any]:
    return [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in flat(values)]


@pytest.mark.parametrize(
    "case",
    [
        ("gptq", {"bits": 4, "group_size": 64}, True, 1),
        ("gptq", {"bits": 4, "group_size": 64, "act_order": True}, True, 20),
        ("w8a8", {}, False, 1),
        ("int8", {}, True, 3),
        ("spqr", {}, True, 1),
        ("quip_sharp", {}, True, 2),
    ],
    ids=lambda case: f"{case[0]}-{case[3]}",
)
def test_kept_launches_are_tritons_own(case: tuple[str, dict[str, object], bool, int]) -> None:
    elsewhere(f"launched(*{case!r})")


def freed() -> None:
    """Plans of an operator do not keep its weight alive. Needs a process without the
    interpreter.
    """
    p = qk.quantize(torch.randn(96, 256), "gptq", group_size=64)
    kernel = host.launcher_of("triton", "gptq", {"group_size": 64})
    with host.null_driver(record=True) as driver, host.only(kernel), torch.inference_mode():
        x, spec = torch.randn(1, 256).half(), ""
        for _ in range(4):
            driver.launches.clear()
            p.prepack_("weight_only")
            spec = qk.ops.matmul.spec_of(p)
            torch.ops.qkernels.matmul(x, list(p.storage.values()), None, spec, "auto", False)
        kept = driver.launches[-1][2]
        assert not any(isinstance(v, torch.Tensor) for v in flat(kept)), "this was no kept launch"
        assert len(operator_plans._PLANS) == 1
        gone = [weakref.ref(t) for t in p.storage.values()]
        del p
        gc.collect()
        assert [t() for t in gone] == [None] * len(gone)
        assert not operator_plans._PLANS


@pytest.mark.parametrize(
    ("version", "waits"),
    [
        ("3.6.0", True),
        ("3.8.0+git1234", True),
        ("3.9.0", False),
        ("3.10.1", False),
        ("4.0.0", False),
    ],
)
def test_who_waits_for_products(version: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where triton lets decoding overtake a product; waiting would cost much on Blackwell."""
    import triton

    from qkernels.backends.triton.launch import overtakes

    monkeypatch.setattr(triton, "__version__", version)
    overtakes.cache_clear()
    assert [overtakes(arch) for arch in (0, 80, 89, 90, 100, 120)] == [
        False,
        False,
        False,
        waits,
        False,
        False,
    ]
    overtakes.cache_clear()


def test_weights_of_operators_are_freed() -> None:
    elsewhere("freed()")


def elsewhere(call: str) -> None:
    """Run `call` in a process without the interpreter."""
    code = f"from tests.kernels import test_launch; test_launch.{call}"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def planned(p: qk.PackedWeight) -> Plans:
    """The one product of `p`."""
    (plan,) = [plan for plan in p.plans.values() if isinstance(getattr(plan, "run", None), Plans)]
    run: Plans = plan.run
    return run


def kept_runs(storage: dict[str, torch.Tensor]) -> list[Any]:
    """The products that operators keep for a weight of these tensors."""
    return [
        plan.bound
        for weight, plans in operator_plans._PLANS.values()
        if weight() is next(iter(storage.values()))
        for plan in plans.values()
    ]


def replays(
    name: str,
    params: dict[str, object],
    m: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five calls, each with another x and bias; new memory is full of NaN."""
    n, k = 40, k_of(name, 192)
    p = qk.quantize(torch.randn(n, k), name, **params).to(DEVICE)
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = real(*args, **kwargs)
        made.view(-1).view(torch.uint8).fill_(255)
        return made

    monkeypatch.setattr(torch, "empty", poisoned)
    for call in range(5):
        x, bias = torch.randn(m, k).to(dtype).to(DEVICE), torch.randn(n).to(DEVICE)
        y = qk.matmul(x, p, bias, backend="triton")
        problem = problem_of(p, m, dtype, x.device)
        want = registry.select(problem, "triton").run(x, p, bias, problem)
        assert bool(want.isfinite().all())
        assert torch.equal(y, want), f"call {call}"
        as_operator = torch.ops.qkernels.matmul(
            x, list(p.storage.values()), bias, qk.ops.matmul.spec_of(p), "triton", False
        )
        assert torch.equal(as_operator, want), f"call {call}"
    (operator,) = kept_runs(p.storage)
    for run in (planned(p), operator):
        assert list(run._plans) == [0]


@cases_by_launch
def test_replays_equal_runs(
    name: str, params: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays(name, params, 3, torch.bfloat16, monkeypatch)


@pytest.mark.parametrize(
    "case",
    [
        ("gptq", {"bits": 3, "group_size": 64, "act_order": True}, 20),  # x is gathered first
        ("spqr", {}, 64),  # outliers read a transposed copy of x
        ("quip_sharp", {}, 17),
        ("int8", {}, 17),
    ],
    ids=lambda case: f"{case[0]}-{case[2]}",
)
def test_replays_equal_runs_for_many_rows(
    case: tuple[str, dict[str, object], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays(*case, torch.float16, monkeypatch)


def test_operands_of_another_alignment_are_planned_anew() -> None:
    p = qk.quantize(torch.randn(40, 192), "spqr").to(DEVICE)
    room = torch.randn(4 * 192 + 1).half().to(DEVICE)
    biases = torch.randn(41).half().to(DEVICE)
    assert room.data_ptr() % 16 == biases.data_ptr() % 16 == 0
    for _ in range(3):
        for at in (0, 1):
            for bias_at in (0, 1):
                room.normal_()
                x, bias = room[at : at + 4 * 192].view(4, 192), biases[bias_at : bias_at + 40]
                y = qk.matmul(x, p, bias, backend="triton")
                problem = problem_of(p, 4, x.dtype, x.device)
                assert torch.equal(y, registry.select(problem, "triton").run(x, p, bias, problem))
    assert sorted(planned(p)._plans) == [0, 2, 0x20, 0x22]  # x, bias and both, 2 bytes off


def test_bias_within_x() -> None:
    """A plan says by name, not by address, whether a kernel reads x or bias."""
    p = qk.quantize(torch.randn(192, 192), "w8a8").to(DEVICE)
    for _ in range(4):
        x = torch.randn(2, 192).half().to(DEVICE)
        for bias in (x[0], torch.randn(192).half().to(DEVICE)):
            y = qk.matmul(x, p, bias, backend="triton")
            problem = problem_of(p, 2, x.dtype, x.device)
            assert torch.equal(y, registry.select(problem, "triton").run(x, p, bias, problem))


def test_scratch_memory_of_a_plan() -> None:
    plan = Plan((torch.randn(100, 8), None), (100, 4))
    x = plan.operands[0]
    assert plan.place(torch.randn(8).data_ptr()) is None
    assert plan.place(x[3:].data_ptr()) == (4, 3 * 8 * 4)
    first, second = plan.empty((4,), torch.float32), plan.empty((4,), torch.int64)
    assert plan.place(first.data_ptr()) == (2, 0)
    assert plan.place(second[1:].data_ptr()) == (2, 512 + 8)
    assert plan.used == 2 * 512
    with plan.reused():
        third = plan.empty((1,), torch.uint8)
        apart = plan.empty((1,), torch.uint8, limited=False)
        assert plan.used == 3 * 512
    again = plan.zeros((3,), torch.uint8), plan.empty((3,), torch.uint8)
    assert [t.offset for t in (third, apart, *again)] == [1024, 1536, 0, 1024]
    memory, _ = plan.allocation().take((torch.randn(100, 8), None), [0, 0])
    assert [None if t is None else t.nbytes for t in memory[:4]] == [1600, None, 2048, 512]


def test_addresses_of_a_plan() -> None:
    """They tell the alignment, and where the tensor is in a call's memory."""
    x = torch.randn(101)[1:].view(10, 10)
    assert x.data_ptr() % 16 == 4
    plan = Plan((x,))
    (operand,) = plan.operands
    for symbolic, real in (
        (operand, x),
        (operand[3:], x[3:]),
        (operand[2:7].view(-1, 25), x[2:7].view(-1, 25)),
        (operand.view(torch.int32), x.view(torch.int32)),
    ):
        assert symbolic.shape == real.shape
        assert (symbolic.nbytes, symbolic.dtype) == (real.nbytes, real.dtype)
        assert symbolic.data_ptr() % 16 == real.data_ptr() % 16
        assert plan.place(symbolic.data_ptr()) == (4, real.data_ptr() - x.data_ptr())
        assert torch.equal(symbolic.within([None] * 4 + [x]), real)
        assert symbolic.within([None] * 4 + [x]).data_ptr() == real.data_ptr()


def test_rows_go_in_slices_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if what a slice needs is not proportional to its rows."""
    monkeypatch.setattr(workspace, "BYTES", 20_000)
    for rows, row, whole in ((100, 1000, 0), (100, 999, 5000), (64, 100, 16_000), (3, 30_000, 1)):
        plan = Plan((torch.empty(rows, 1),), (rows, 1))
        taken: list[tuple[int, int]] = []

        def declare(x: Any, y: Any, plan: Plan = plan, row: int = row, whole: int = whole) -> None:
            assert x.shape[0] == y.shape[0]
            plan.empty((x.shape[0] * row + whole,), torch.uint8)
            plan.by_torch(print, x, y)

        plan.by_rows(declare, plan.operands[0], plan.y)
        taken = [(step.tensors[0].offset // 4, step.tensors[0].shape[0]) for step in plan.steps]
        assert len(taken) > 1
        assert [first for first, _ in taken] == [
            sum(n for _, n in taken[:i]) for i in range(len(taken))
        ]
        assert sum(n for _, n in taken) == rows
        most = max(n for _, n in taken)
        assert most * row + whole <= workspace.BYTES or most == 1
        assert plan.allocation()._scratch >= most * row + whole


@pytest.mark.parametrize(
    "case",
    [("awq", {"group_size": 64}), ("fp8", {"activation": "dynamic"})],
    ids=lambda case: case[0],
)
@pytest.mark.parametrize("tokens", [1, 9])
def test_layers_of_experts_are_replayed(case: tuple[str, dict[str, Any]], tokens: int) -> None:
    name, params = case
    gate_up, down = (
        qk.quantize_experts(torch.randn(4, *shape), name, **params).to(DEVICE)
        for shape in ((128, 192), (40, 64))
    )
    for call in range(4):
        x = torch.randn(tokens, 192).half().to(DEVICE)
        ids, weights = (
            torch.randint(-1, 4, (tokens, 2)).to(DEVICE),
            torch.rand(tokens, 2).to(DEVICE),
        )
        y = qk.fused_moe(x, gate_up, down, weights, ids, backend="triton")
        first, second = (problem_of(p, ids.numel(), x.dtype, x.device) for p in (gate_up, down))
        kernel = registry.select_experts(first, "triton")
        assert kernel.run_layer is not None
        want = kernel.run_layer(x, gate_up, down, weights, ids, "silu", (first, second))
        assert bool(want.isfinite().all())
        assert torch.equal(y, want), f"call {call}"
    (layer,) = kept_runs(gate_up.storage)
    assert list(layer._plans) == [0]
