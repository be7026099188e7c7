"""SpQR on one layer: outliers are found, errors are passed on, better than GPTQ at fewer bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkernels.formats.spqr import Spqr
from qkernels.formats.spqr_grid import outlier_columns
from qkernels.formats.spqr_search import spqr
from qkernels.quantizers import gptq

from .test_gptq import objective, problem


def weight_of(grid: object, n: int, k: int, **params: object) -> Tensor:
    fmt = Spqr()
    resolved = fmt.resolve((n, k), params)
    tensors = fmt.from_spqr(grid, (n, k), resolved)
    fmt.validate(tensors, (n, k), resolved)
    return fmt.dequantize(tensors, (n, k), resolved).double()


@pytest.mark.parametrize("act_order", [False, True])
def test_planted_outliers_are_found_and_exact(act_order: bool) -> None:
    n, k = 48, 96
    weight = torch.randn(n, k)
    planted = torch.arange(n), torch.randint(0, k, (n,))  # one a row, so that no group has two
    weight[planted] = 20.0 * (1 - 2 * (torch.arange(n) % 2))
    grid = spqr(weight, None, bits=3, act_order=act_order)
    found = weight_of(grid, n, k, act_order=act_order)
    # The code says at most 10, float16 holds the difference, and float32 adds them up.
    assert (found[planted] - weight[planted].double()).abs().max() <= 30 * 2.0**-11
    columns = outlier_columns(grid.col_vals)
    rows = torch.arange(n).repeat_interleave(grid.row_offsets.diff().long())
    if grid.perm is not None:
        columns = grid.perm[columns]
    places = set(zip(*(i.tolist() for i in planted), strict=True))
    assert places <= set(zip(rows.tolist(), columns.tolist(), strict=True))


@pytest.mark.parametrize("bits", [3, 4])
def test_beats_gptq_at_equal_size(bits: int) -> None:
    """A weight with a few large entries, at the size of GPTQ with groups of 32.

    Such a group has a float16 scale and a zero.
    """
    n, k = 64, 256
    weight, hessian = problem(n, k)
    weight = torch.where(torch.rand(n, k) < 0.005, weight * 6, weight)
    grid = spqr(weight.float(), hessian.float(), bits=bits, group_size=32)
    size = bits + 6 / 32 + 64 / 512 + 32 * grid.col_vals.numel() / (n * k)
    ours = objective(weight_of(grid, n, k, bits=bits, group_size=32) - weight, hessian)
    other = gptq.gptq(weight.float(), hessian.float(), bits=bits, group_size=32, symmetric=False)
    assert size < bits + (16 + bits) / 32 + 0.5
    assert ours < 0.8 * objective(other.dequantize() - weight, hessian)


def test_errors_are_passed_on() -> None:
    weight, hessian = problem(32, 128)
    options = {"bits": 3, "threshold": -1.0}
    blind = weight_of(spqr(weight.float(), None, **options), 32, 128)
    seeing = weight_of(spqr(weight.float(), hessian.float(), **options), 32, 128)
    assert objective(seeing - weight, hessian) < 0.9 * objective(blind - weight, hessian)


def test_threshold_buys_accuracy_with_outliers() -> None:
    weight, hessian = problem(32, 128)
    counts, errors = [], []
    for threshold in (-1.0, 0.3, 0.1, 0.03):
        grid = spqr(weight.float(), hessian.float(), bits=3, threshold=threshold)
        counts.append(grid.col_vals.numel())
        errors.append(objective(weight_of(grid, 32, 128) - weight, hessian))
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] > 20
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e3])
def test_any_magnitude(scale: float) -> None:
    weight = torch.randn(20, 64) * scale
    weight[3] = 0  # beside rows that are not
    weight[:, 7] = scale
    found = weight_of(spqr(weight, None, bits=3, threshold=0.2), 20, 64)
    assert bool((found - weight).abs().mean() <= 0.15 * weight.abs().mean() + 1e-6)


def test_dead_inputs_and_bad_hessians() -> None:
    x = torch.randn(20, 64)
    x[:, 5] = 0
    grid = spqr(torch.randn(16, 64), x.T @ x / 20, bits=3)
    assert bool(torch.isfinite(weight_of(grid, 16, 64)).all())
    with pytest.raises(ValueError, match=r"hessian: expected shape \(32, 32\), got \(16, 16\)"):
        spqr(torch.randn(4, 32), torch.eye(16), bits=3)
