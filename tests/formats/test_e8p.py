"""QuIP#'s codebook: its entries from the definition, exact nearest points, the published error."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch

from qkernels.formats import e8p


def decode_by_hand(code: int) -> list[float]:
    """The vector of a code by the paper's appendix, with Python numbers, from the packed table."""
    word = int(e8p.table(torch.device("cpu"))[code >> 8]) & 0xFFFFFFFF
    signs = code & 0xFF
    odd = bin(signs).count("1") % 2
    signs ^= odd
    nibbles = [((word >> 4 * i & 15) - 8) / 2 * (-1 if signs >> i & 1 else 1) for i in range(8)]
    return [v + (-0.25 if odd else 0.25) for k in range(4) for v in (nibbles[k], nibbles[k + 4])]


def test_table_is_the_public_one() -> None:
    """Compare the first words and the SHA-256 with the table in the public release."""
    words = e8p.table(torch.device("cpu"))[:256]
    first = [w & 0xFFFFFFFF for w in words[:4].tolist()]
    assert first == [0x99999999, 0x59999999, 0xD9999999, 0x7999B999]
    assert hashlib.sha256(words.numpy().tobytes()).hexdigest().startswith("efc2c03c60acd955")


def test_every_entry() -> None:
    magnitudes = e8p.magnitudes().double()
    assert magnitudes.unique(dim=0).shape == (256, 8)
    assert bool((magnitudes % 1 == 0.5).all())
    assert bool((magnitudes > 0).all())
    norms = magnitudes.square().sum(1).tolist()
    assert norms.count(12) == 29
    assert sum(n <= 10 for n in norms) == 227
    every = {v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in v) <= 10}
    assert {tuple(v) for v in magnitudes[:227].tolist()} == every
    points = e8p.points()
    for code in [*range(0, 1 << 16, 37), 0xFFFF]:
        assert points[code].tolist() == decode_by_hand(code), code
    assert points.unique(dim=0).shape == (1 << 16, 8)
    # take the shift off
    lattice = torch.where((points % 1 == 0.75)[:, :1], points - 0.25, points + 0.25)
    assert bool((lattice % 1 == 0.5).all())
    assert bool((lattice.sum(1) % 2 == 0).all())


def test_residual_points_are_e8() -> None:
    points = e8p.residual_points().double()
    assert points.unique(dim=0).shape == (256, 8)
    assert sorted(points.square().sum(1).int().tolist()) == [0] + [2] * 240 + [4] * 15
    inner = points @ points.T
    assert torch.equal(inner, inner.round()), "E8 is integral"
    words = e8p.table(torch.device("cpu"))[256:].long() & 0xFFFFFFFF
    for word, point in zip(words.tolist(), points.tolist(), strict=True):
        nibbles = [(word >> 4 * i & 15) / 2 - 4 for i in range(8)]
        assert [v for k in range(4) for v in (nibbles[k], nibbles[k + 4])] == point


@pytest.mark.parametrize("scale", [0.2, 1.03, 3.0])
def test_nearest_is_nearest(scale: float) -> None:
    x = torch.randn(300, 8, dtype=torch.float64) * scale
    found = (x - e8p.points().double()[e8p.nearest(x)]).square().sum(1)
    best = torch.cdist(x, e8p.points().double()).min(1).values.square()
    torch.testing.assert_close(found, best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("bits", "published"), [(2, 0.0912), (3, 0.0294), (4, 0.0096)])
def test_gaussian_error_is_the_published_one(bits: int, published: float) -> None:
    """Mean squared error per weight of N(0, 1).

    The best scalar 2-bit grid has 0.1175 (Max 1960).
    """
    x, rms = torch.randn(100_000, 8), e8p.ROUNDING[bits].rms
    error = (x - e8p.decode(e8p.encode(x * rms, bits), bits) / rms).square().mean()
    assert abs(error / published - 1) < 0.02  # of 800,000 weights; sampling gives 0.3%
