"""LDLQ against a spelled-out float64 version, and what it and the transforms gain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels.formats import ldlq

from .test_gptq import objective, problem


def to_integers(target: Tensor) -> tuple[Tensor, Tensor]:
    value = target.round().clamp(-2, 2)
    return value, value


def naive(weight: Tensor, hessian: Tensor, block: int) -> Tensor:
    """Eliminate blocks of columns, the last first; the Schur complement of H remains."""
    k = weight.shape[1]
    h = hessian + ldlq.DAMP * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    result = torch.zeros_like(weight)
    for begin in range(k - block, -1, -block):
        own, behind = slice(begin, begin + block), slice(begin + block, k)
        # Given the errors behind, the best real choice of all columns before them is still free:
        # eliminate those.
        before = slice(0, begin)
        reduced = h[begin:, begin:]
        if begin:
            reduced = reduced - h[begin:, before] @ torch.linalg.solve(
                h[before, before], h[before, begin:]
            )
        error = weight[:, behind] - result[:, behind]
        shift = error @ reduced[block:, :block] @ torch.linalg.inv(reduced[:block, :block])
        result[:, own] = to_integers(weight[:, own] + shift)[1]
    return result


@pytest.mark.parametrize(("k", "block"), [(24, 1), (300, 1), (24, 8), (264, 8)])
def test_equals_the_naive_algorithm(k: int, block: int) -> None:
    weight, hessian = problem(5, k)
    found = ldlq.ldlq(weight, hessian, to_integers, block=block)
    assert torch.equal(found, naive(weight, hessian, block))


@pytest.mark.parametrize("block", [1, 8])
def test_passes_only_help(block: int) -> None:
    weight, hessian = problem(16, 320)
    damped = hessian + ldlq.DAMP * hessian.diagonal().mean() * torch.eye(320, dtype=torch.float64)
    errors = [
        objective(
            ldlq.ldlq(weight, hessian, to_integers, block=block, passes=passes) - weight, damped
        )
        for passes in (0, 1, 3)
    ]
    assert errors[2] <= errors[1] < errors[0]


def test_without_hessian_every_column_is_rounded_alone() -> None:
    weight = torch.randn(4, 40)
    assert torch.equal(ldlq.ldlq(weight, None, to_integers, block=8), weight.round().clamp(-2, 2))


@pytest.mark.parametrize(
    ("name", "bits"), [("quip", 2), ("quip", 3), ("quip_sharp", 2), ("quip_sharp", 4)]
)
def test_errors_are_passed_on(name: str, bits: int) -> None:
    weight, hessian = (t.float() for t in problem(64, 128))

    def error(**more: object) -> float:
        p = qk.quantize(weight, name, bits=bits, **more)
        return objective(p.dequantize() - weight, hessian.double())

    assert error(hessian=hessian) < 0.7 * error()


def test_bad_hessians() -> None:
    with pytest.raises(ValueError, match=r"hessian: expected shape \(64, 64\), got \(8, 8\)"):
        qk.quantize(torch.randn(16, 64), "quip_sharp", hessian=torch.eye(8))
    with pytest.raises(ValueError, match="hessian: expected a positive definite matrix"):
        qk.quantize(torch.randn(16, 64), "quip_sharp", hessian=-torch.eye(64))
