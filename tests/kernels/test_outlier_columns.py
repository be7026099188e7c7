"""Outlier columns found before rows are quantized in slices: the same as with all rows at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ..conftest import DEVICE
from ..plans import at_once

pytest.importorskip("triton")
from qkernels.backends.plan import Plan, Symbolic
from qkernels.backends.triton import eight_bit, outlier_columns
from qkernels.backends.triton.launch import Compiled
from qkernels.triton_kernels.activations import quantize_rows

from . import eight_bit_halves
from .test_activations import dtypes, packed, problem, with_outliers
from .test_eight_bit import (  # noqa: F401  # two are fixtures
    counters_end_as_zeros,
    full_arena,
    poisoned_outputs,
)

#: the last of three chunks of 128 features has one
K, THRESHOLD = 257, 6.0


def before(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    if kind == "norm":
        return {"norm": (1 + 3 * torch.rand(K)).to(dtype).to(DEVICE), "eps": 1e-5}
    return {"up": (3 * torch.randn(5, K)).to(dtype).to(DEVICE)} if kind == "up" else {}


def found(x: Tensor, **given: Any) -> Tensor:
    names = [name for name in ("up", "norm") if name in given]

    def find(plan: Plan, x: Symbolic, *operands: Symbolic) -> Symbolic:
        more = dict(zip(names, operands, strict=True))
        return outlier_columns.find(plan, x, THRESHOLD, eps=given.get("eps", 0.0), **more)

    columns: Tensor = at_once(Compiled, find, x, *(given[name] for name in names))
    return columns


def listed(columns: Tensor) -> list[int]:
    return columns[: int(columns[-1])].tolist()


@dtypes
@pytest.mark.parametrize("kind", ["plain", "norm", "up"])
@pytest.mark.parametrize("block", [16384, 128])
@pytest.mark.parametrize("planted", ["none", "one", "many", "all", "row"])
def test_the_same_columns(
    planted: str, block: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlier_columns, "ROW_BLOCK", block)
    x, given, p = with_outliers(5, K, planted, dtype), before(kind, dtype), packed("int8", {}, K)
    want = eight_bit_halves.quantize(eight_bit, x, p, problem(p, x), **given)
    assert want.columns is not None
    for _ in range(2):  # the second call starts from the flags and the counter of the first
        assert listed(found(x, **given)) == listed(want.columns)
    if kind == "plain":
        assert listed(want.columns) == (x.abs() >= THRESHOLD).any(0).nonzero()[:, 0].tolist()
        assert planted == "none" or listed(want.columns)


def test_columns_if_no_counters_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    full_arena(monkeypatch)
    x = with_outliers(3, K, "many", torch.float16)
    want = (x.abs() >= THRESHOLD).any(0).nonzero()[:, 0].tolist()
    assert listed(found(x)) == want


@pytest.mark.parametrize("kind", ["plain", "norm", "up"])
def test_slices_of_rows_whose_columns_are_known(kind: str) -> None:
    """The kernel with OUTLIERS = 2: codes, scales and 16-bit rows are the same as with all rows at
    once, and the counter is not touched.
    """
    x, given, p = (
        with_outliers(5, K, "many", torch.float16),
        before(kind, torch.float16),
        packed("int8", {}, K),
    )
    want = eight_bit_halves.quantize(eight_bit, x, p, problem(p, x), **given)
    for rows in (slice(0, 3), slice(3, 5)):
        part = x[rows]
        up, norm = (given["up"][rows] if kind == "up" else part), given.get("norm", part)
        m, kp = part.shape[0], want.codes.shape[1]
        codes = torch.empty(m, kp, dtype=torch.int8, device=DEVICE)
        scale, normed = torch.empty(m, device=DEVICE), torch.empty_like(part)
        counter = torch.full((1,), 41, dtype=torch.int32, device=DEVICE)
        quantize_rows[(m,)](
            part, up, codes, scale, norm, normed, scale, counter, counter,
            given.get("eps", 0.0), THRESHOLD, m, K, kp,
            INT8=True, SHARED="token", HAS_ZERO=False, OUTLIERS=2,
            NORM=kind == "norm", GATED=kind == "up", NATIVE=False, BLOCK=512, PDL=False,
        )  # fmt: skip
        assert torch.equal(codes, want.codes[rows])
        assert torch.equal(scale, want.scale[rows])
        assert kind == "plain" or torch.equal(normed, want.x[rows])
        assert counter.tolist() == [41]
