"""QuIP and QuIP#: the weight spelled out, the public storage bit by bit, and bad input."""

from __future__ import annotations

import math

import pytest
import torch

import qkernels as qk
from qkernels.formats import e8p, transforms


def whole(factors: list[torch.Tensor]) -> torch.Tensor:
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        product = torch.kron(product, factor.double())
    return product


@pytest.mark.parametrize(("n", "k"), [(16, 64), (36, 24), (10, 40)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quip_sharp_spelled_out(n: int, k: int, bits: int) -> None:
    p = qk.quantize(torch.randn(n, k), "quip_sharp", bits=bits)
    t = p.tensors
    codes = t["Qidxs"].int() & 0xFFFF
    inside = e8p.points().double()[codes.long()]
    if bits == 4:
        inside = inside + e8p.points().double()[(t["Qidxs_resid"].int() & 0xFFFF).long()] / 3.45
    if bits == 3:
        inside = inside + e8p.residual_points().double()[t["Qidxs_resid"].long()] / 2.04
    h_n, h_k = (whole(transforms.hadamard_factors(size)) / math.sqrt(size) for size in (n, k))
    want = (
        t["SV"].double()[:, None]
        * (h_n @ inside.view(n, k) @ h_k.T)
        * t["SU"].double()
        * t["Wscale"]
    )
    torch.testing.assert_close(p.dequantize(torch.float64), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quip_spelled_out(bits: int) -> None:
    n, k = 24, 35
    p = qk.quantize(torch.randn(n, k) * torch.rand(k), "quip", bits=bits)
    t = dict(p.tensors)
    t["in_scale"] = (torch.rand(k) + 0.5).half()
    p = qk.pack("quip", t, (n, k), bits=bits)
    codes = [
        [(int(t["qweight"][j * bits // 32, i]) & 0xFFFFFFFF) >> (j * bits % 32) for j in range(k)]
        for i in range(n)
    ]
    for i in range(n):
        for j in range(k):
            if j * bits % 32 + bits > 32:
                codes[i][j] |= (int(t["qweight"][j * bits // 32 + 1, i]) & 0xFFFFFFFF) << (
                    32 - j * bits % 32
                )
            codes[i][j] &= (1 << bits) - 1
    inside = (torch.tensor(codes).double() - ((1 << bits) - 1) / 2) * t["scale"]
    before = whole([t["in0"], t["in1"]]).T
    after = whole([t["out0"], t["out1"]])
    seeds = t["perm_seeds"].tolist()
    p_in = torch.eye(k, dtype=torch.float64)[transforms.random_permutation(k, seeds[0])]
    p_out = torch.eye(n, dtype=torch.float64)[transforms.random_permutation(n, seeds[1])]
    want = p_out.T @ after @ inside @ before @ p_in * t["in_scale"].double()
    torch.testing.assert_close(p.dequantize(torch.float64), want, rtol=1e-5, atol=1e-5)


def test_public_storage_bit_by_bit() -> None:
    n, k = 32, 128
    weight = torch.randn(n, k)
    ours = qk.quantize(weight, "quip_sharp")
    public = qk.quantize(weight, "quip_sharp", checkpoint_format="quip_sharp")
    codes = ours.tensors["Qidxs"].int() & 0xFFFF
    words = public.tensors["Qidxs"].reshape(n // 16, k // 64, 8, 4)
    for i, j, g, c in torch.cartesian_prod(*(torch.arange(size) for size in words.shape)).tolist():
        word = int(words[i, j, g, c]) & (1 << 64) - 1
        for number, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            signs = sum((word >> (32 + 4 * s + number) & 1) << s for s in range(8))
            code = (word >> 8 * number & 255) << 8 | signs
            assert code == int(codes[16 * i + 2 * g + row, 8 * j + 2 * c + column])
    assert torch.equal(ours.dequantize(), public.dequantize())
    assert public.bits_per_weight == ours.bits_per_weight == 2 + (16 * (n + k) + 32 + 64) / (n * k)


def test_large_entries_are_spread() -> None:
    """Transforms let a weight with a few large entries round almost as well as a Gaussian one."""
    weight = torch.randn(256, 512)
    weight[torch.rand(256, 512) < 0.01] *= 20
    size = weight.square().mean()
    sharp, plain = (
        float((qk.quantize(weight, name).dequantize() - weight).square().mean() / size)
        for name in ("quip_sharp", "quip")
    )
    assert sharp < 0.1  # 0.0912 for Gaussian weights
    assert sharp < plain < 0.13  # 0.1188 for the uniform grid
    step = weight.square().mean().sqrt() * 0.9957  # the same grid without the transforms
    alone = (torch.round(weight / step + 1.5).clamp(0, 3) - 1.5) * step
    assert (alone - weight).square().mean() / size > 0.3


BAD = [
    (
        "quip_sharp",
        {"Wscale": torch.tensor(float("nan"))},
        "Wscale: expected finite values, got nan",
    ),
    (
        "quip_sharp",
        {"SU": torch.full((64,), float("inf")).half()},
        "SU: expected finite values, got inf",
    ),
    ("quip_sharp", {"SV": torch.ones(15).half()}, r"SV: expected shape \(16,\), got \(15,\)"),
    ("quip_sharp", {"codebook_id": torch.tensor(3)}, "codebook_id: expected 7 for bits=2, got 3"),
    ("quip_sharp", {"Qidxs": torch.zeros(16, 8)}, "Qidxs: expected dtype int16, got float32"),
    ("quip", {"perm_seeds": torch.tensor([-1, 0])}, "perm_seeds: expected values in"),
    (
        "quip",
        {"in_scale": torch.full((64,), float("nan")).half()},
        "in_scale: expected finite values",
    ),
    ("quip", {"out1": torch.zeros(4, 5).half()}, r"out1: expected shape \(4, 4\), got \(4, 5\)"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), BAD, ids=lambda v: v if isinstance(v, str) else ""
)
def test_bad_tensors(name: str, change: dict[str, torch.Tensor], message: str) -> None:
    p = qk.quantize(torch.randn(16, 64), name)
    with pytest.raises(ValueError, match=message):
        qk.pack(name, {**p.tensors, **change}, (16, 64))


@pytest.mark.parametrize(
    ("name", "shape", "params", "message"),
    [
        ("quip_sharp", (16, 20), {}, "shape: expected K to be a multiple of 8, got K=20"),
        (
            "quip_sharp",
            (131, 8),
            {},
            "hadamard: expected a size whose odd part is at most 128, got 131",
        ),
        ("quip_sharp", (16, 64), {"bits": 5}, r"bits: expected one of \(2, 3, 4\), got 5"),
        (
            "quip_sharp",
            (20, 64),
            {"checkpoint_format": "quip_sharp"},
            "checkpoint_format: expected 'compact'",
        ),
        ("quip", (16, 64), {"bits": 8}, r"bits: expected one of \(2, 3, 4\), got 8"),
    ],
)
def test_bad_parameters(
    name: str, shape: tuple[int, int], params: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        qk.quantize(torch.randn(*shape), name, **params)
