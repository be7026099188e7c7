"""Rows taken by slices, for want of scratch memory, come out with the bits that all rows at once give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkernels as qk
from qkernels import dispatch
from qkernels.backends.cuda import eight_bit, gemm, hopper, weight_only
from qkernels.backends.triton import workspace

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
]


def case_of(case: Any) -> str:
    return f"{case[0].__name__.rpartition('.')[2]}-{case[1]}"


@pytest.mark.parametrize("case", CASES, ids=case_of)
def test_slices_change_no_bit(
    case: tuple[Any, str, dict[str, object], int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last slice has few rows, of which a call of its own would go to another kernel or cut K otherwise."""
    module, name, params, m, invariant = case
    n = 40
    p = qk.quantize(torch.randn(n, k_of(name, 320)), name, **params).to(DEVICE)
    x = torch.randn(m, p.shape[1]).half().to(DEVICE)
    bias = torch.randn(n).half().to(DEVICE)
    problem = dispatch.problem_of(p, m, x.dtype, x.device, invariant)
    p.prepack_("eight_bit" if module is eight_bit else "weight_only")
    whole = module.run(x, p, bias, problem)
    assert bool(whole.isfinite().all())
    sizes: list[list[slice]] = []

    def cut(rows: int, row_bytes: int, held: int = 0) -> list[slice]:
        assert row_bytes > 0, "what is copied was not counted"
        sizes.append([slice(first, min(first + 16, rows)) for first in range(0, rows, 16)])
        return sizes[-1]

    monkeypatch.setattr(workspace, "slices", cut)
    sliced = module.run(x, p, bias, problem)
    assert len(sizes) == 1
    assert len(sizes[0]) > 1
    assert torch.equal(sliced, whole)
