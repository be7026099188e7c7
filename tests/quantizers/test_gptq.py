"""GPTQ on one layer against a column-by-column float64 version of the paper's algorithm 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkernels.formats import grid as integer_grid
from qkernels.quantizers import gptq


def problem(n: int, k: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, float64."""
    mix = torch.randn(k, k, dtype=torch.float64) / k**0.5 + torch.eye(k, dtype=torch.float64)
    x = (
        torch.randn(tokens, k, dtype=torch.float64)
        @ mix
        * (torch.rand(k, dtype=torch.float64) * 3 + 0.1)
    )
    return torch.randn(n, k, dtype=torch.float64), x.T @ x / tokens


def naive(
    weight: Tensor, hessian: Tensor, bits: int, size: int, symmetric: bool, act_order: bool
) -> Tensor:
    """Round one column, update all columns behind it, eliminate it from the inverse.

    There are no blocks and no Cholesky factors.
    """
    k = weight.shape[1]
    order = (
        hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(k)
    )
    w, h = weight[:, order].clone(), hessian[order][:, order]
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(k, dtype=torch.float64))
    result = torch.empty_like(w)
    for j in range(k):
        if j % size == 0:
            scale, zero = integer_grid.fit(w[:, None, j : j + size], bits, symmetric)
        s, z = scale[:, 0].double(), zero[:, 0].double()
        code = (torch.round(w[:, j] / s) + z).clamp(0, 2**bits - 1)
        result[:, j] = (code - z) * s
        error = (w[:, j] - result[:, j]) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:][None]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    back = torch.empty_like(result)
    back[:, order] = result
    return back


def objective(difference: Tensor, hessian: Tensor) -> float:
    return float(((difference.double() @ hessian) * difference.double()).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("k", "size"), [
    (96, 32), (160, -1), (320, 160), (384, 384), (288, 96), (60, 20),
    (80, 24), (96, 128), (200, 128), (340, 160),  # the last group is short
])  # fmt: skip
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_the_naive_algorithm(
    bits: int, k: int, size: int, symmetric: bool, act_order: bool
) -> None:
    weight, hessian = problem(6, k)
    grid = gptq.gptq(
        weight, hessian, bits=bits, group_size=size, symmetric=symmetric, act_order=act_order
    )
    want = naive(weight, hessian, bits, k if size == -1 else size, symmetric, act_order)
    torch.testing.assert_close(grid.dequantize().double(), want, rtol=1e-6, atol=1e-9)


def test_float32_reaches_the_same_objective() -> None:
    weight, hessian = problem(16, 256)
    options = {"bits": 4, "group_size": 64, "symmetric": False}
    exact = gptq.gptq(weight, hessian, **options)
    single = gptq.gptq(weight.float(), hessian.float(), **options)
    errors = [objective(g.dequantize() - weight, hessian) for g in (exact, single)]
    # A code at a midpoint may fall either way and changes those after it, not what they achieve.
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize(
    "options",
    [{}, {"act_order": True}, {"act_order": True, "static_groups": True}, {"clip_search": True}],
)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("size", [64, 100])  # the last group has 56 columns
def test_beats_rounding_to_nearest(options: dict[str, bool], bits: int, size: int) -> None:
    weight, hessian = problem(32, 256)
    grid = gptq.gptq(weight, hessian, bits=bits, group_size=size, symmetric=False, **options)
    nearest = torch.empty(32, 256)
    for begin in range(0, 256, size):
        group = weight[:, None, begin : begin + size].float()
        scale, zero = integer_grid.fit(group, bits, False)
        codes = integer_grid.encode(group, scale, zero, bits)[:, 0].float()
        nearest[:, begin : begin + size] = (codes - zero.float()) * scale.float()
    assert objective(grid.dequantize() - weight, hessian) < 0.9 * objective(
        nearest - weight, hessian
    )


def test_static_groups_keep_the_checkpoint_order() -> None:
    weight, hessian = problem(4, 128)
    grid = gptq.gptq(
        weight, hessian, bits=4, group_size=32, symmetric=True, act_order=True, static_groups=True
    )
    assert torch.equal(grid.group_of, torch.arange(128, dtype=torch.int32) // 32)
    order = gptq.gptq(
        weight, hessian, bits=4, group_size=32, symmetric=True, act_order=True
    ).group_of
    assert torch.equal(order.bincount(), torch.full((4,), 32))
    assert not torch.equal(order, grid.group_of)


def test_a_short_last_group_in_either_order() -> None:
    weight, hessian = problem(4, 80)
    options = {"bits": 4, "group_size": 24, "symmetric": True, "act_order": True}
    static = gptq.gptq(weight, hessian, static_groups=True, **options)
    assert torch.equal(static.group_of, torch.arange(80, dtype=torch.int32) // 24)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    assert torch.equal(gptq.gptq(weight, hessian, **options).group_of[order], static.group_of)


def test_clip_search_never_fits_worse() -> None:
    grouped = torch.randn(8, 4, 64) ** 3
    for symmetric in (False, True):
        full = gptq._error(grouped, *integer_grid.fit(grouped, 3, symmetric), 3)
        found = gptq._error(grouped, *gptq.fit(grouped, 3, symmetric, True), 3)
        assert bool((found <= full).all())
        assert found.sum() < 0.95 * full.sum()


def test_inputs_that_are_always_zero_and_singular_hessians() -> None:
    weight = torch.randn(8, 64)
    x = torch.randn(20, 64)  # fewer tokens than features: H has rank 20
    x[:, 5] = 0
    grid = gptq.gptq(weight, x.T @ x / 20, bits=4, group_size=32, symmetric=False)
    dequantized = grid.dequantize()
    assert bool((dequantized[:, 5].abs() <= grid.scale[:, 0].float() / 2).all())
    assert bool(torch.isfinite(dequantized).all())


def test_bad_hessians() -> None:
    weight = torch.randn(4, 32)
    with pytest.raises(ValueError, match=r"hessian: expected shape \(32, 32\), got \(16, 16\)"):
        gptq.gptq(weight, torch.eye(16), bits=4, group_size=32, symmetric=True)
    with pytest.raises(ValueError, match="hessian: expected a positive definite matrix"):
        gptq.gptq(weight, -torch.eye(32), bits=4, group_size=32, symmetric=True)
