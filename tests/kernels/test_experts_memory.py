"""Codes of the experts' activations stay within 32 MB: tokens are computed in slices for that, with
the same bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels import layouts

from ..conftest import DEVICE, case_id

pytest.importorskip("triton")
from qkernels.backends import workspace
from qkernels.backends.eight_bit import Activations
from qkernels.backends.problem import Problem, problem_of
from qkernels.backends.triton import eight_bit
from qkernels.backends.triton import experts as backend
from qkernels.ops import operator_plans

from .launches import Launches
from .test_experts import activations, make, route

QUANTIZED: list[tuple[str, dict[str, Any]]] = [
    ("w8a8", {}),
    ("fp8", {"activation": "dynamic"}),
    ("fp8", {"granularity": "block", "activation": "dynamic"}),
]
quantized = pytest.mark.parametrize(("name", "params"), QUANTIZED, ids=map(case_id, QUANTIZED))
EXPERTS, TOP_K = 3, 2


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of codes and scales of each quantization of activations in a plan.

    A plan of slices has been declared for all rows first.
    """
    seen: list[int] = []
    real = eight_bit.quantize

    def quantize(*args: Any, **kwargs: Any) -> Activations:
        a = real(*args, **kwargs)
        seen.append(a.codes.numel() + 4 * a.scale.numel())
        return a

    monkeypatch.setattr(eight_bit, "quantize", quantize)
    return seen


def experts_problem(experts: qk.PackedExperts, ids: Tensor) -> Problem:
    return problem_of(experts, ids.numel(), torch.float16, ids.device)  # type: ignore[arg-type]


@quantized
@pytest.mark.parametrize("rows", ["token", "slot", "layer"])
def test_codes_stay_within_32_mb(
    rows: str, name: str, params: dict[str, Any], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed: x and its products are never touched, so they take no memory."""
    launches = Launches(monkeypatch)
    tokens, k = (40_000 if rows == "slot" else 70_000), 512
    experts = make(name, params, EXPERTS, 2 * k, k).prepack(layouts.EIGHT_BIT)
    ids = torch.zeros(tokens, TOP_K, dtype=torch.int64, device=DEVICE)
    weights = torch.ones(tokens, TOP_K, device=DEVICE)
    x = torch.empty(
        tokens, *([TOP_K] if rows == "slot" else []), k, dtype=torch.float16, device=DEVICE
    )
    problem = experts_problem(experts, ids)
    if rows == "layer":
        down = make(name, params, EXPERTS, 64, k).prepack(layouts.EIGHT_BIT)
        y = backend.fused(
            x, experts, down, weights, ids, "silu", (problem, experts_problem(down, ids))
        )
        assert y.shape == (tokens, 64)
    else:
        y = backend.run(x, experts, ids, None, None, problem)
        assert y.shape == (tokens, TOP_K, 2 * k)
    started = [call[0].startswith("experts_") for call in launches.calls].count(True)
    del sizes[: len(sizes) - started]
    assert len(sizes) > 1
    assert max(sizes) <= 32 * 2**20
    assert sum(sizes) >= x.numel()  # and all of x was quantized
    quantized = [named for name, _, named in launches.calls if name == "quantize_rows"]
    assert [named["M"] * named["KP"] for named in quantized] == [
        size - 4 * named["M"] * (-(-named["K"] // 128) if named["SHARED"] == "group" else 1)
        for size, named in zip(sizes, quantized, strict=True)
    ]


@quantized
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.usefixtures("dots_in_one_order")
def test_slices_change_no_bit(
    invariant: bool,
    name: str,
    params: dict[str, Any],
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, n, k = 41, 48, 144
    gate_up, down = make(name, params, EXPERTS, 2 * n, k), make(name, params, EXPERTS, 40, n)
    x, ids = activations(tokens, k), route(tokens, TOP_K, EXPERTS)
    ids[3, 1] = -1
    each, weights = activations(tokens, TOP_K, k), torch.rand(tokens, TOP_K).to(DEVICE)
    bias = activations(EXPERTS, 2 * n)

    def results() -> list[Tensor]:
        sizes.clear()
        common: dict[str, Any] = {"backend": "triton", "batch_invariant": invariant}
        return [
            qk.grouped_matmul(x, gate_up, ids, bias=bias, **common),
            qk.grouped_matmul(each, gate_up, ids, weights, **common),
            qk.fused_moe(x, gate_up, down, weights, ids, **common),
        ]

    whole = results()
    assert len(sizes) == 4
    monkeypatch.setattr(workspace, "BYTES", 17 * k)
    operator_plans._PLANS.clear()  # kept plans have all rows at once
    sliced = results()
    assert len(sizes) > 4 + 3 * 4
    assert all(torch.equal(a, b) for a, b in zip(sliced, whole, strict=True))
