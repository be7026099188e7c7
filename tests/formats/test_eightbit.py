"""LLM.int8() against bitsandbytes on the CPU; W8A8 and FP8 against independent arithmetic."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk
from qkernels.formats.eightbit import int_matmul
from qkernels.formats.fp8 import to_fp8


def test_int_matmul_is_exact_past_float32() -> None:
    a = torch.full((2, 5000), 127, dtype=torch.int8)
    b = torch.full((3, 5000), -128, dtype=torch.int8)
    b[1] = 127
    b[2, ::2] = 1
    want = (a.long() @ b.long().T).to(torch.int32)
    assert torch.equal(int_matmul(a, b), want)
    a, b = (torch.randint(-128, 128, (7, 3001), dtype=torch.int8) for _ in range(2))
    assert torch.equal(int_matmul(a, b), (a.long() @ b.long().T).to(torch.int32))


# ---------------------------------------------------------------------- LLM.int8()
def test_int8_weight_bytes_are_bitsandbytes_own() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 96).half()
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight, threshold=0.0)
    p = qk.quantize(weight, "int8")
    assert torch.equal(p.tensors["weight"], codes)
    assert torch.equal(p.tensors["SCB"], absmax)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("outliers", [False, True])
def test_int8_matmul_is_bitsandbytes_own(rows: int, outliers: bool) -> None:
    modules = pytest.importorskip("bitsandbytes.nn")
    linear = torch.nn.Linear(96, 64, bias=True).half()
    theirs = modules.Linear8bitLt(96, 64, bias=True, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu").eval()  # in training mode their CPU path multiplies in 16 bit
    x = torch.randn(rows, 96).clamp(-5, 5)
    if outliers:
        x[0, 7], x[-1, 40] = 9.0, -30.0
    x = x.half()
    ours = qk.matmul(x, qk.quantize(linear.weight, "int8"), linear.bias)
    # Both compute the same integers. Theirs then rounds to float16 after the int8 part, after
    # adding the bias and after the outlier part, and the CPU constant 6.200124e-05 is 1.8e-5 off
    # 1/127^2.
    want = theirs(x).detach()
    torch.testing.assert_close(
        ours, want, rtol=4 * 2.0**-11, atol=4 * 2.0**-11 * want.abs().max().item()
    )


def test_int8_row_absmax_counts_the_small_elements_of_outlier_columns() -> None:
    weight = torch.randn(8, 4)
    p = qk.quantize(weight, "int8")
    x = torch.tensor([[8.0, 1.0, 0.0, 0.0], [5.0, 1.0, 0.0, 0.0]])
    w = p.dequantize(torch.float64)
    # Column 0 is an outlier for both rows. Row 1's absmax is its own 5.0 in that column, so its 1.0
    # is coded as round(127/5) = 25 of 5/127.
    want = torch.stack([8 * w[:, 0] + w[:, 1], 5 * w[:, 0] + 25 * 5 / 127 * w[:, 1]])
    torch.testing.assert_close(qk.matmul(x.double(), p), want, rtol=1e-6, atol=1e-6)


def test_int8_threshold_zero_is_off() -> None:
    weight, x = torch.randn(8, 32), torch.randn(3, 32).double()
    x[1, 4] = 100.0
    plain = qk.matmul(x, qk.quantize(weight, "int8", threshold=0.0))
    w8a8 = qk.matmul(x, qk.quantize(weight, "w8a8"))
    torch.testing.assert_close(plain, w8a8, rtol=1e-6, atol=1e-6)
    p = qk.quantize(weight, "int8")
    exact = x @ p.dequantize(torch.float64).T
    held = qk.matmul(x, p)
    assert (held[1] - exact[1]).norm() < 0.2 * (plain[1] - exact[1]).norm()


# ---------------------------------------------------------------------- W8A8
@pytest.mark.parametrize("zero", [None, -13])
def test_w8a8_static_is_the_affine_arithmetic(zero: int | None) -> None:
    weight, x = torch.randn(16, 40), torch.randn(5, 40).double()
    p = qk.quantize(weight, "w8a8", activation="static", input_scale=0.02, input_zero_point=zero)
    shift = zero or 0
    codes = (torch.round(x / torch.tensor(0.02).double()) + shift).clamp(-128, 127)
    want = ((codes - shift) * torch.tensor(0.02).double()) @ p.dequantize(torch.float64).T
    torch.testing.assert_close(qk.matmul(x, p), want, rtol=1e-6, atol=1e-6)


def test_w8a8_zero_rows_and_zero_weights_give_zero() -> None:
    weight = torch.randn(8, 32)
    weight[3] = 0
    x = torch.randn(4, 32)
    x[2] = 0
    for name in ("w8a8", "int8"):
        y = qk.matmul(x, qk.quantize(weight, name))
        assert bool(torch.isfinite(y).all())
        assert torch.equal(y[2], torch.zeros(8))
        assert torch.equal(y[:, 3], torch.zeros(4))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"activation": "static"}, "input_scale: expected a number > 0 .* got None"),
        ({"activation": "static", "input_scale": -1.0}, "input_scale: expected a number > 0"),
        ({"input_scale": 1.0}, "expected none with activation='dynamic'"),
        (
            {"activation": "static", "input_scale": 1.0, "input_zero_point": 300},
            "input_zero_point: expected",
        ),
        ({"granularity": "block"}, "granularity: expected one of"),
    ],
)
def test_w8a8_bad_params(params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk.quantize(torch.randn(8, 32), "w8a8", **params)


# ---------------------------------------------------------------------- FP8
def decode_fp8(bits: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The value of an FP8 pattern, by the format's definition; NaN and infinity are nan."""
    bias = (1 << exponent_bits - 1) - 1
    sign = -1.0 if bits >> 7 else 1.0
    exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = bits & ((1 << mantissa_bits) - 1)
    if exponent_bits == 4 and bits & 0x7F == 0x7F:
        return float("nan")
    if exponent_bits == 5 and exponent == 31:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize(
    ("dtype", "e", "m", "top"),
    [(torch.float8_e4m3fn, 4, 3, 448.0), (torch.float8_e5m2, 5, 2, 57344.0)],
)
def test_fp8_cast_is_saturating_nearest_even(
    dtype: torch.dtype, e: int, m: int, top: float
) -> None:
    table = sorted({v for b in range(256) if (v := decode_fp8(b, e, m)) == v})
    assert max(table) == top
    grid = torch.tensor(table)
    middles = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, middles, torch.randn(4000) * 100, torch.tensor([1e9, -1e9, top * 1.2])])
    got = to_fp8(x, dtype).float()
    # Nearest grid value; between two equally near the one with an even pattern.
    low = torch.searchsorted(grid, x.clamp(-top, top), right=True).clamp(1, len(table)) - 1
    high = (low + 1).clamp(max=len(table) - 1)
    below, above = grid[low], grid[high]
    capped = x.clamp(-top, top)
    down, up = capped - below, above - capped
    even = (to_fp8(below, dtype).view(torch.uint8) % 2) == 0
    want = torch.where((down < up) | ((down == up) & even), below, above)
    assert torch.equal(got, want)
    assert bool(torch.isnan(to_fp8(torch.tensor([float("nan")]), dtype).float()).all())


def test_fp8_block_scales_follow_their_blocks() -> None:
    weight = torch.randn(130, 300)
    weight[128:, 256:] *= 1e4
    p = qk.quantize(weight, "fp8", granularity="block")
    assert tuple(p.tensors["weight_scale_inv"].shape) == (2, 3)
    # Half an e4m3 step (2^-4 relative) of each value, or half the smallest step of its block.
    step = torch.maximum(weight.abs() * 2.0**-4, torch.full_like(weight, 2.0**-10))
    step[128:, 256:] *= 1 + 1e4
    assert bool(((p.dequantize() - weight).abs() <= step).all())


def test_fp8_dynamic_activation_is_per_token_or_per_group() -> None:
    weight, x = torch.randn(16, 256), torch.randn(3, 256)
    x[1] *= 1000
    for granularity in ("channel", "block"):
        p = qk.quantize(weight, "fp8", granularity=granularity, activation="dynamic")
        exact = x @ p.dequantize().T
        error = ((qk.matmul(x, p) - exact).norm(dim=1) / exact.norm(dim=1)).max()
        assert 1e-4 < error < 2.0**-4  # the activations are rounded, to 3 mantissa bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.full((8, 32), float("nan")).to(torch.float8_e4m3fn)},
            "weight: expected finite",
        ),
        (
            {"weight": torch.zeros(8, 32, dtype=torch.uint8)},
            "weight: expected dtype float8_e4m3fn, got uint8",
        ),
        ({"weight_scale": torch.ones(8)}, r"weight_scale: expected shape \(8, 1\), got \(8,\)"),
        (
            {"weight_scale": -torch.ones(8, 1)},
            "weight_scale: expected finite values >= 0, got -1.0",
        ),
    ],
)
def test_fp8_bad_tensors(change: dict[str, torch.Tensor], message: str) -> None:
    tensors = {**qk.quantize(torch.randn(8, 32), "fp8").tensors, **change}
    with pytest.raises(ValueError, match=message):
        qk.pack("fp8", tensors, shape=(8, 32))


def test_fp8_tensor_scale_must_be_one_element() -> None:
    tensors = {
        **qk.quantize(torch.randn(8, 32), "fp8", granularity="tensor").tensors,
        "weight_scale": torch.ones(8),
    }
    with pytest.raises(ValueError, match="weight_scale: expected one element, got shape"):
        qk.pack("fp8", tensors, shape=(8, 32), granularity="tensor")
