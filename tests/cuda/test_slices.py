"""If scratch memory is short, rows are computed in slices: the same bits as all rows at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkernels as qk
from qkernels.backends import workspace
from qkernels.backends.cuda import eight_bit, gemm, hopper, launch, weight_only
from qkernels.backends.plan import Plan, Product
from qkernels.backends.problem import problem_of

from ..conftest import DEVICE, k_of

pytestmark = pytest.mark.usefixtures("emulated", "poisoned")

CASES: list[tuple[Any, str, dict[str, object], int, bool]] = [
    (gemm, "gptq", {"group_size": 64, "act_order": True}, 70, False),
    (gemm, "spqr", {"act_order": True}, 70, False),
    (gemm, "quip", {"bits": 4}, 70, False),
    (gemm, "quip_sharp", {"bits": 2}, 70, False),
    (weight_only, "quip", {"bits": 2}, 21, True),
    (weight_only, "quip_sharp", {"bits": 4}, 21, True),
    (hopper, "gptq", {"group_size": 64, "act_order": True}, 150, False),
    (hopper, "spqr", {}, 150, False),
    (hopper, "quip", {"bits": 4}, 150, False),
    (hopper, "quip_sharp", {"bits": 3}, 150, False),
    (eight_bit, "w8a8", {}, 150, False),
    (eight_bit, "fp8", {"activation": "dynamic"}, 40, False),
    (eight_bit, "int8", {}, 40, True),
    (eight_bit, "int8", {}, 40, False),
]


def case_of(case: Any) -> str:
    return f"{case[0].__name__.rpartition('.')[2]}-{case[1]}"


@pytest.mark.parametrize("case", CASES, ids=case_of)
def test_slices_change_no_bit(
    case: tuple[Any, str, dict[str, object], int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last slice has few rows: a call with only these would use another kernel or split-K."""
    module, name, params, m, invariant = case
    n = 40
    p = qk.quantize(torch.randn(n, k_of(name, 320)), name, **params).to(DEVICE)
    x = torch.randn(m, p.shape[1]).half().to(DEVICE)
    x[5, ::50], x[m - 1, 7] = 9, -8  # outliers of LLM.int8(), which other slices have to know of
    bias = torch.randn(n).half().to(DEVICE)
    problem = problem_of(p, m, x.dtype, x.device, invariant)
    p.prepack_("eight_bit" if module is eight_bit else "weight_only")
    whole = module.run(x, p, bias, problem)
    assert bool(whole.isfinite().all())
    counted: list[int] = []

    def by_rows(plan: Plan, declare: Any, *tensors: Any, before_slices: Any = None) -> None:
        """16 rows at a time, without changing the limit, on which split-K depends."""
        shared = {} if before_slices is None else {"shared": before_slices()}
        for first in range(0, m, 16):
            with plan.reused():
                declare(*(t[first : first + 16] for t in tensors), **shared)
                counted.append(plan.used)

    monkeypatch.setattr(Plan, "by_rows", by_rows)
    sliced = module.run(x, p, bias, problem)
    assert len(counted) > 1
    assert min(counted) > 0, "what is copied was not counted"
    assert torch.equal(sliced, whole)


def test_a_call_in_slices_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its slices use the same scratch memory."""
    p = qk.quantize(torch.randn(40, 320), "quip_sharp").to(DEVICE)  # kernels transform x and y
    x = torch.randn(40, 320).half().to(DEVICE)
    monkeypatch.setattr(workspace, "BYTES", 24 * 1024)
    results = [qk.matmul(x, p, backend="cuda") for _ in range(3)]
    assert all(torch.equal(y, results[0]) for y in results)
    (plan,) = [plan for plan in p.plans.values() if isinstance(getattr(plan, "run", None), Product)]
    (compiled,) = plan.run._plans.values()
    assert len(compiled._starts) > 3, "one slice: this test compared nothing"
    assert compiled._allocation._scratch <= workspace.BYTES


EXPLAINED: list[tuple[Any, str, dict[str, object], int, int]] = [
    (weight_only, "gptq", {"group_size": 64}, 3, 4480),
    (weight_only, "gptq", {"group_size": 24}, 3, 4800),  # padded to more tiles than K has
    (weight_only, "quip_sharp", {"bits": 2}, 3, 4096),
    (gemm, "gptq", {"group_size": 64}, 20, 4480),
    (gemm, "gptq", {"group_size": 24}, 20, 4800),
    (gemm, "gptq", {"group_size": 64, "act_order": True}, 100, 4480),
    (gemm, "spqr", {}, 100, 3600),
    (gemm, "quip", {"bits": 4}, 100, 4096),
]


@pytest.mark.parametrize("case", EXPLAINED, ids=case_of)
@pytest.mark.parametrize("megabytes", [32, 1])
def test_explain_names_the_k_slices_that_run(
    megabytes: int,
    case: tuple[Any, str, dict[str, object], int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if copies of x leave little workspace, and for slices of rows, which stay within it."""
    module, name, params, m, k = case
    monkeypatch.setattr(workspace, "BYTES", megabytes * 2**20)
    p = qk.quantize(torch.randn(40, k), name, **params).to(DEVICE).prepack_("weight_only")
    x = torch.randn(m, k).half().to(DEVICE)
    launched: list[int] = []
    real = launch.start

    def noting(plan: Plan, name: str, call: Any, *tensors: Any) -> None:
        if name.startswith("weight_only"):
            launched.append(call.grid_y)
        real(plan, name, call, *tensors)

    for one in (launch, weight_only):
        monkeypatch.setattr(one, "start", noting)
    problem = problem_of(p, m, x.dtype, x.device)
    words = module.configuration(problem)
    y = module.run(x, p, None, problem)
    assert bool(y.isfinite().all())
    assert set(launched) == {int(words.split("K in ")[1].split(" slices")[0])}
    assert launched[0] > 1, "nothing was split"
