"""Orthogonal transforms that spread a weight's large entries over all others (QuIP, QuIP#).

All are Kronecker products of small square matrices, A0 (x) A1 (x) ..., applied to the last
dimension of a tensor: with x viewed as an (a0, a1, ...) box, A_i mixes axis i. The cost per element
is a0 + a1 + ..., instead of their product.

Sources: Chee et al. 2023 (arXiv 2307.13304) for random orthogonal factors, Tseng et al. 2024 (arXiv
2402.04396) for Hadamard factors, Paley 1933 for Hadamard matrices whose order is no power of two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

#: the largest factor that fused kernels hold in registers and shared memory
LARGEST_FACTOR = 128


def kronecker(x: Tensor, factors: list[Tensor], *, transposed: bool = False) -> Tensor:
    """(A0 (x) A1 (x) ...) x along the last dimension of x (..., n), in x's dtype.

    transposed: apply the transpose of the product instead.
    """
    shape = x.shape
    box = x.reshape(-1, *(f.shape[0] for f in factors))
    for axis, factor in enumerate(factors, start=1):
        matrix = factor.to(x.dtype).T if transposed else factor.to(x.dtype)
        box = torch.tensordot(box, matrix, dims=([axis], [1])).movedim(-1, axis)
    return box.reshape(shape)


# ---------------------------------------------------------------------- Hadamard
@lru_cache(maxsize=64)
def hadamard_orders(n: int) -> tuple[int, ...]:
    """Orders of the factors of `hadamard_factors(n)`; an order that is no power of two is first.

    Raises ValueError if that order is larger than LARGEST_FACTOR.
    """
    odd = n // (n & -n)
    two = n // odd
    dense = 1
    if odd > 1:
        dense = odd
        if two >= 4 and 4 * odd <= 64 and _paley_field(4 * odd) is not None:
            dense, two = 4 * odd, two // 4
        if dense > LARGEST_FACTOR:
            raise ValueError(
                f"hadamard: expected a size whose odd part is at most {LARGEST_FACTOR}, "
                f"got {n} = {odd} * {two}"
            )
    orders = [] if dense == 1 else [dense]
    if two > 1:
        bits = two.bit_length() - 1
        count = max(1, bits // 4)  # orders of 16 to 128, which tensor cores take without padding
        orders += [1 << (bits * (i + 1) // count - bits * i // count) for i in range(count)]
    return tuple(orders) or (1,)


def hadamard_factors(n: int) -> list[Tensor]:
    """Factors, float16, of an n x n matrix H with H H^T = n I and entries of +-1.

    n = 4b * 2^r with b odd needs a Paley matrix of order 4b. Where there is none, or it is too
    large, the odd part is a real Fourier matrix (Hartley) with entries of at most sqrt(2).
    """
    return [_factor(order) for order in hadamard_orders(n)]


@lru_cache(maxsize=64)
def _factor(order: int) -> Tensor:
    if order & (order - 1) == 0:
        return _sylvester(order).half()
    if order % 4 == 0:
        return _paley(order).half()
    return _hartley(order).half()


def _sylvester(order: int) -> Tensor:
    """Sylvester's Hadamard matrix; the order is a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _hartley(order: int) -> Tensor:
    """The real Fourier matrix cos + sin."""
    angle = torch.arange(order).outer(torch.arange(order)) % order * (2 * math.pi / order)
    return (angle.double().cos() + angle.double().sin()).float()


def _paley_field(order: int) -> tuple[int, int, int] | None:
    """(1 or 2, p, e): which of Paley's constructions gives this order with a field of p^e elements.

    None if neither does.
    """
    for construction, q in ((1, order - 1), (2, order // 2 - 1)):
        power = _prime_power(q)
        if power is not None and q % 4 == (3 if construction == 1 else 1):
            return (construction, *power)
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with p prime and q = p^e, or None."""
    for p in range(2, q + 1):
        if q % p == 0:
            e = 0
            while q % p == 0:
                q, e = q // p, e + 1
            return (p, e) if q == 1 else None
    return None


def _paley(order: int) -> Tensor:
    """Paley's matrix, from the quadratic residues of a field of q elements."""
    field = _paley_field(order)
    assert field is not None
    construction, p, e = field
    residues = _jacobsthal(p, e)
    q = residues.shape[0]
    border = torch.zeros(q + 1, q + 1)
    border[0, 1:], border[1:, 0], border[1:, 1:] = 1, (-1 if construction == 1 else 1), residues
    if construction == 1:
        return border + torch.eye(q + 1)
    plus, minus = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
    return torch.kron(border, plus) + torch.kron(torch.eye(q + 1), minus)


def _jacobsthal(p: int, e: int) -> Tensor:
    """chi(a - b) for all a, b of the field of p^e elements.

    chi(x) is 0 for zero, 1 for squares and -1 for all other elements.
    """
    elements = list(itertools.product(range(p), repeat=e))
    modulus = _irreducible(p, e)

    def times(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        product = [0] * (2 * e - 1)
        for i, j in itertools.product(range(e), repeat=2):
            product[i + j] = (product[i + j] + a[i] * b[j]) % p
        for i in range(2 * e - 2, e - 1, -1):  # x^e = -(modulus without its leading term)
            for j in range(e):
                product[i - e + j] = (product[i - e + j] - product[i] * modulus[j]) % p
        return tuple(product[:e])

    squares = {times(a, a) for a in elements if any(a)}
    matrix = torch.zeros(len(elements), len(elements))
    for i, a in enumerate(elements):
        for j, b in enumerate(elements):
            if i != j:
                difference = tuple((x - y) % p for x, y in zip(a, b, strict=True))
                matrix[i, j] = 1 if difference in squares else -1
    return matrix


def _irreducible(p: int, e: int) -> tuple[int, ...]:
    """Coefficients 0..e-1 of a monic polynomial of degree e <= 3 without roots modulo p."""
    for low in itertools.product(range(p), repeat=e):
        if e == 1 or all((sum(c * x**i for i, c in enumerate(low)) + x**e) % p for x in range(p)):
            return low
    raise AssertionError("there is one for every p and e")


# ---------------------------------------------------------------------- random
@lru_cache(maxsize=64)
def balanced(n: int) -> tuple[int, ...]:
    """The two factors of n that are nearest to each other.

    If one of them is over 64, three factors, with the smallest in the middle.
    """

    def pairs(size: int) -> Iterator[tuple[int, int]]:
        return ((p, size // p) for p in range(1, math.isqrt(size) + 1) if size % p == 0)

    two = max(pairs(n))
    if two[1] <= 64:
        return two
    three = min((sorted((p, *max(pairs(q)))) for p, q in pairs(n)), key=lambda f: (f[2], sum(f)))
    return three[1], three[0], three[2]


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniformly (Haar) distributed, float16 (n, n)."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).half().contiguous()


def random_permutation(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of n, int64: the indices sorted by their SplitMix64 hash.

    It is the same on every machine and with every version of torch.
    """
    x = (
        torch.arange(1, n + 1, dtype=torch.int64) + (torch.tensor(seed) << 32)
    ) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return x.argsort(stable=True).to(device)
