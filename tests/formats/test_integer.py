"""GPTQ and AWQ against byte vectors worked out by hand from the published layouts."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk


def signed(*words: int) -> list[int]:
    return [w - (1 << 32) if w >= 1 << 31 else w for w in words]


def test_gptq_4bit_words_by_hand() -> None:
    # One column, K=8: codes 1..8 along K, lowest nibble first -> 0x87654321. Zeros along N=8:
    # stored 7 means 8 in v1. Scale 0.5: w = 0.5 * (code - 8).
    n = 8
    qweight = torch.tensor([signed(*[0x87654321] * n)], dtype=torch.int32)
    qzeros = torch.tensor([signed(0x77777777)], dtype=torch.int32)
    scales = torch.full((1, n), 0.5, dtype=torch.float16)
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    p = qk.pack("gptq", tensors, shape=(n, 8), bits=4, group_size=8)
    want = 0.5 * (torch.arange(1, 9) - 8)
    assert torch.equal(p.dequantize(), want.expand(n, 8))
    v2 = qk.pack(
        "gptq", tensors, (n, 8), bits=4, group_size=8, checkpoint_format="gptq_v2", symmetric=False
    )
    assert torch.equal(v2.dequantize(), (want + 0.5).expand(n, 8))


def test_gptq_v1_zero_wraps() -> None:
    # A stored 15 is zero point 0 (zero minus one, in four bits).
    tensors = {
        "qweight": torch.zeros(1, 8, dtype=torch.int32),
        "qzeros": torch.tensor([signed(0xFFFFFFFF)], dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    p = qk.pack("gptq", tensors, shape=(8, 8), group_size=8)
    assert torch.equal(p.dequantize(), torch.zeros(8, 8))


def test_gptq_3bit_words_by_hand() -> None:
    # 32 codes in three words; code 10 has 2 bits in word 0 and 1 in word 1, code 21 has 1 and 2.
    codes = [i % 8 for i in range(32)]
    words = [0, 0, 0]
    for i in range(10):
        words[0] |= codes[i] << (3 * i)
    words[0] |= (codes[10] & 3) << 30
    words[1] |= codes[10] >> 2
    for i in range(11, 21):
        words[1] |= codes[i] << (3 * (i - 11) + 1)
    words[1] |= (codes[21] & 1) << 31
    words[2] |= codes[21] >> 1
    for i in range(22, 32):
        words[2] |= codes[i] << (3 * (i - 22) + 2)
    n = 32
    tensors = {
        "qweight": torch.tensor([signed(w) * n for w in words], dtype=torch.int32),
        "qzeros": torch.zeros(1, 3, dtype=torch.int32),
        "scales": torch.ones(1, n, dtype=torch.float16),
    }
    p = qk.pack("gptq", tensors, shape=(n, 32), bits=3, group_size=32, checkpoint_format="gptq_v2")
    assert torch.equal(p.dequantize()[0], torch.tensor(codes, dtype=torch.float32))


def test_gptq_act_order_takes_each_feature_from_its_group() -> None:
    g_idx = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.int32)
    tensors = {
        "qweight": torch.full((1, 8), signed(0x99999999)[0], dtype=torch.int32),
        "qzeros": torch.full((2, 1), 0x77777777, dtype=torch.int32),
        "scales": torch.tensor([[1.0] * 8, [3.0] * 8], dtype=torch.float16),
        "g_idx": g_idx,
    }
    p = qk.pack("gptq", tensors, shape=(8, 8), group_size=4, act_order=True)
    assert torch.equal(p.dequantize()[3], torch.where(g_idx == 1, 3.0, 1.0))


def test_awq_words_by_hand() -> None:
    # Column c holds code c; the word's nibbles, lowest first, are columns 0 2 4 6 1 3 5 7.
    word = signed(0x75316420)[0]
    tensors = {
        "qweight": torch.full((2, 1), word, dtype=torch.int32),
        "qzeros": torch.full((1, 1), 0x11111111, dtype=torch.int32),
        "scales": torch.full((1, 8), 0.25, dtype=torch.float16),
    }
    p = qk.pack("awq", tensors, shape=(8, 2), group_size=2)
    want = 0.25 * (torch.arange(8) - 1.0)
    assert torch.equal(p.dequantize(), want[:, None].expand(8, 2))


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_agrees_with_compressed_tensors_packing(bits: int) -> None:
    """compressed-tensors packs along K with the lowest bits first, code + 2^(bits-1), row major."""
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (16, 64), dtype=torch.int8)
    theirs = packing.pack_to_int32(codes, bits)  # (N, K*bits/32)
    from qkernels.formats.bits import pack_rows

    ours = pack_rows((codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8).T, bits)
    assert torch.equal(ours.T, theirs)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_to_the_nearest_grid_point(bits: int, symmetric: bool) -> None:
    w = torch.randn(64, 96) * torch.rand(64, 1)
    p = qk.quantize(w, "gptq", bits=bits, group_size=32, symmetric=symmetric)
    scale = p.tensors["scales"].float().T.repeat_interleave(32, dim=1)
    error = (p.dequantize() - w).abs()
    # Half a step inside the grid; up to half more where the top code is clamped (the symmetric grid
    # has one step less above zero, the asymmetric zero point is rounded); and the scale itself is
    # rounded to float16, which shifts the far end of the grid.
    assert bool((error <= scale * (1 + 2**bits * 2.0**-11) + 1e-6).all())
    assert error.mean() <= 0.3 * scale.mean()


def test_zero_weight_and_tiny_weight() -> None:
    for name in ("gptq", "awq"):
        assert torch.equal(
            qk.quantize(torch.zeros(8, 32), name, group_size=32).dequantize(), torch.zeros(8, 32)
        )
        tiny = qk.quantize(torch.full((8, 32), 1e-9), name, group_size=32).dequantize()
        assert bool(torch.isfinite(tiny).all())


def gptq_tensors() -> dict[str, torch.Tensor]:
    return dict(qk.quantize(torch.randn(32, 64), "gptq", group_size=32, act_order=True).tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(8, 32)}, r"qweight: expected dtype int32, got float32"),
        ({"qweight": torch.zeros(9, 32, dtype=torch.int32)},
         r"qweight: expected shape \(8, 32\), got \(9, 32\)"),
        ({"scales": torch.full((2, 32), float("nan"), dtype=torch.float16)},
         r"scales: expected finite.* nan"),
        ({"scales": torch.ones(3, 32, dtype=torch.float16)},
         r"scales: expected shape \(2, 32\), got \(3, 32\)"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)},
         r"g_idx: expected values in \[0, 2\), got 2..2"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)},
         r"g_idx: expected values in \[0, 2\), got -1..-1"),
        ({"qzeros": None}, r"qzeros: expected a tensor of shape \(2, 4\), got none"),
        ({"absmax": torch.ones(1)}, r"absmax: unexpected tensor"),
        ({"qweight": "x"}, r"qweight: expected a torch.Tensor, got str"),
    ],
)  # fmt: skip
def test_gptq_bad_tensors(change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = gptq_tensors() | change
    tensors = {k: v for k, v in tensors.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        qk.pack("gptq", tensors, shape=(32, 64), group_size=32, act_order=True)


def test_gptq_scrambled_g_idx_needs_act_order() -> None:
    with pytest.raises(
        ValueError, match="g_idx: expected k // group_size because act_order is False"
    ):
        qk.pack("gptq", gptq_tensors(), shape=(32, 64), group_size=32, act_order=False)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        (
            "awq",
            {"group_size": 48},
            r"group_size: expected -1 or a divisor of K=64, because awq stores no",
        ),
        ("gptq", {"group_size": 0}, r"group_size: expected -1 or at least 1, got 0"),
        ("gptq", {"bits": 5}, r"bits: expected one of \(2, 3, 4, 8\), got 5"),
        ("gptq", {"bits": True}, r"bits: expected an int, got True"),
        ("gptq", {"group": 64}, r"unknown parameter 'group'; expected one of: bits, group_size"),
        ("gptq", {"checkpoint_format": "marlin"}, r"checkpoint_format: expected one of"),
        ("awq", {"bits": 3}, r"bits: expected one of \(4,\), got 3"),
        ("nope", {}, r"format: expected one of fp16, bf16, gptq"),
    ],
)
def test_bad_params(name: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk.quantize(torch.randn(32, 64), name, **params)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((32, 64), float("nan")), "weight: expected finite values, got 2048 NaN"),
        (torch.randn(64), r"weight: expected a non-empty \(N, K\) matrix, got shape \(64,\)"),
        (torch.randn(0, 64), r"weight: expected a non-empty"),
        (torch.ones(32, 64, dtype=torch.int32), "weight: expected a floating dtype, got int32"),
        (torch.full((32, 64), 1e9), "expected scales below 65504"),
    ],
)
def test_bad_weight(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk.quantize(weight, "gptq", group_size=64)


def test_awq_needs_n_in_eights() -> None:
    with pytest.raises(ValueError, match="expected N to be a multiple of 8, got N=12"):
        qk.quantize(torch.randn(12, 64), "awq", group_size=64)
