"""Kronecker products, Hadamard matrices of every size, and permutations that never change."""

from __future__ import annotations

import math

import pytest
import torch

from qkernels.formats import transforms

SIZES = [1, 2, 8, 12, 20, 24, 28, 36, 44, 52, 60, 64, 96, 192, 576, 1536, 3584, 4096, 14336]
#: no Hadamard matrix of four times the odd part, or one too large: a Fourier matrix
FOURIER = [3, 10, 54, 140, 172, 11008, 13824, 18944]


def matrix(n: int) -> torch.Tensor:
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in transforms.hadamard_factors(n):
        product = torch.kron(product, factor.double())
    return product


@pytest.mark.parametrize("n", [n for n in SIZES if n <= 1536])
def test_hadamard_matrices(n: int) -> None:
    h = matrix(n)
    assert h.shape == (n, n)
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", SIZES + FOURIER)
def test_factors_are_orthogonal_and_flat(n: int) -> None:
    factors = transforms.hadamard_factors(n)
    assert math.prod(f.shape[0] for f in factors) == n
    largest = math.prod(f.abs().max().item() for f in factors)
    assert largest <= (math.sqrt(2) * 1.001 if n in FOURIER else 1)
    for f in factors:
        error = f.double() @ f.double().T - len(f) * torch.eye(len(f), dtype=torch.float64)
        assert error.abs().max() <= len(f) * 2.0**-11  # float16


def test_a_size_with_a_large_odd_part_is_an_error() -> None:
    with pytest.raises(ValueError, match="odd part is at most 128, got 1048 = 131 \\* 8"):
        transforms.hadamard_orders(131 * 8)


@pytest.mark.parametrize("orders", [(3,), (4, 5), (2, 3, 4)])
def test_kronecker(orders: tuple[int, ...]) -> None:
    factors = [torch.randn(n, n, dtype=torch.float64) for n in orders]
    whole = torch.ones(1, 1, dtype=torch.float64)
    for f in factors:
        whole = torch.kron(whole, f)
    x = torch.randn(2, 5, whole.shape[0], dtype=torch.float64)
    torch.testing.assert_close(transforms.kronecker(x, factors), x @ whole.T)
    torch.testing.assert_close(transforms.kronecker(x, factors, transposed=True), x @ whole)


@pytest.mark.parametrize(
    ("n", "want"),
    [
        (24, (4, 6)),
        (4096, (64, 64)),
        (8192, (16, 16, 32)),
        (7, (1, 7)),
        (11008, (16, 16, 43)),
        (14336, (28, 16, 32)),
    ],
)
def test_balanced(n: int, want: tuple[int, ...]) -> None:
    assert transforms.balanced(n) == want
    assert math.prod(transforms.balanced(n)) == n


def test_random_factors_and_permutations() -> None:
    q = transforms.random_orthogonal(40, torch.Generator().manual_seed(1)).double()
    assert (q @ q.T - torch.eye(40, dtype=torch.float64)).abs().max() < 2e-3
    perm = transforms.random_permutation(1000, 7)
    assert torch.equal(perm.sort().values, torch.arange(1000))
    assert not torch.equal(perm, transforms.random_permutation(1000, 8))


def splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


@pytest.mark.parametrize("seed", [0, 5, 2**31 - 1])
def test_permutations_by_hand(seed: int) -> None:
    """Stored files depend on the permutations, so they must never change."""

    def key(i: int) -> int:
        hashed = splitmix64((i + 1 + (seed << 32)) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
        return hashed - (1 << 64) if hashed >> 63 else hashed

    assert transforms.random_permutation(50, seed).tolist() == sorted(range(50), key=key)
