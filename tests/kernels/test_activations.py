"""Activations to codes: bit for bit the codes that qkernels/formats computes in float32. RMSNorm;
LLM.int8().
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels.formats.eightbit import per_token_int8
from qkernels.formats.fp8 import to_fp8

from ..conftest import DEVICE, case_id
from ..reference import static_scale
from . import eight_bit_halves, ptx
from .test_eight_bit import (  # noqa: F401  # the last two are fixtures
    EIGHT_BIT,
    assert_close,
    counters_end_as_zeros,
    dtypes,
    eight_bit_cases,
    full_arena,
    poisoned_outputs,
)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from qkernels.backends.eight_bit import Activations  # noqa: E402
from qkernels.backends.problem import Problem, problem_of  # noqa: E402
from qkernels.backends.triton import eight_bit, outlier_columns  # noqa: E402
from qkernels.triton_kernels import activations  # noqa: E402
from qkernels.triton_kernels import eight_bit as kernels  # noqa: E402


def packed(name: str, params: dict[str, object], k: int, n: int = 8) -> qk.PackedWeight:
    return qk.quantize(torch.randn(n, k), name, **params).prepack_("eight_bit").to(DEVICE)


def problem(p: qk.PackedWeight, x: Tensor, invariant: bool = False) -> Problem:
    return problem_of(p, x.shape[0], x.dtype, x.device, invariant)


def expected(x: Tensor, p: qk.PackedWeight) -> tuple[Tensor, Tensor]:
    """Codes (M, K) and scales, by the formats' references in float32."""
    x, tensors = x.float(), p.tensors
    if p.format == "fp8":
        if (scale := static_scale(p)) is not None:
            scale = scale.reshape(1)
            return to_fp8(x / scale, torch.float8_e4m3fn), scale
        if p.params["granularity"] == "block":
            groups = torch.nn.functional.pad(x, (0, -x.shape[1] % 128)).view(x.shape[0], -1, 128)
            scale = groups.abs().amax(2).clamp(min=1e-4) / 448
            codes = to_fp8(groups / scale[:, :, None], torch.float8_e4m3fn)
            return codes.view(x.shape[0], -1)[:, : x.shape[1]], scale.T
        scale = (x.abs().amax(1) / 448).clamp(min=1 / (448 * 512))
        return to_fp8(x / scale[:, None], torch.float8_e4m3fn), scale
    if "input_scale" in tensors:
        scale = tensors["input_scale"]
        zero = tensors.get("input_zero_point", torch.zeros(1, dtype=torch.int8)).to(x.device)
        return (torch.round(x / scale) + zero).clamp(-128, 127).to(torch.int8), scale
    if threshold := p.params.get("threshold"):
        x = x.masked_fill(x.abs() >= threshold, 0)
    codes, scale = per_token_int8(x)
    return codes, scale[:, 0]


def assert_codes(a: Activations, x: Tensor, p: qk.PackedWeight) -> None:
    codes, scale = expected(x, p)
    k = x.shape[1]
    assert torch.equal(
        a.codes[:, :k].contiguous().view(torch.uint8), codes.contiguous().view(torch.uint8)
    )
    assert a.codes.shape[1] == -(-k // 16) * 16
    assert not bool(a.codes[:, k:].contiguous().view(torch.uint8).any())
    assert torch.equal(a.scale, scale)


# ---------------------------------------------------------------------- codes
@eight_bit_cases
@dtypes
@pytest.mark.parametrize(
    ("m", "k", "block"), [(5, 300, 16384), (1, 16, 16384), (3, 257, 128), (2, 512, 256)]
)
def test_codes_bit_for_bit(
    name: str,
    params: dict[str, object],
    dtype: torch.dtype,
    m: int,
    k: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also for rows longer than a program handles at once (block), and numbers of every size."""
    monkeypatch.setattr(outlier_columns, "ROW_BLOCK", block)
    p = packed(name, params, k)
    for spread in (0, 4):
        x = (
            (torch.randn(m, k) * torch.exp(spread * torch.randn(m, k)))
            .clamp(-6e4, 6e4)
            .to(dtype)
            .to(DEVICE)
        )
        x[-1, : k // 2] = 0
        x[0, -1] = x.abs().max()
        assert_codes(eight_bit_halves.quantize(eight_bit, x, p, problem(p, x)), x, p)


@pytest.mark.parametrize(("name", "params"), EIGHT_BIT, ids=map(case_id, EIGHT_BIT))
def test_midpoints_round_to_even_and_tiny_rows_meet_the_floor(
    name: str, params: dict[str, object]
) -> None:
    halves = torch.arange(-127, 128) / 2
    rows = [halves * 2, halves, halves.sign() * 63.5, halves * 0, halves * 2.0**-22, halves * 1e-7]
    rows[1][0] = 127.0  # then every code is a midpoint
    x = torch.stack(rows).half().to(DEVICE)
    p = packed(
        name, {**params, "input_scale": 1.0} if "input_scale" in params else params, x.shape[1]
    )
    assert_codes(eight_bit_halves.quantize(eight_bit, x, p, problem(p, x)), x, p)


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, activations.e4m3_bits(tl.load(x_ptr + i)))


@triton.jit
def half_kernel(x_ptr, y_ptr, E4M3: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(y_ptr + i, kernels._half(tl.load(x_ptr + i), E4M3, False))


def test_e4m3_of_every_16_bit_float_and_between_codes() -> None:
    sixteen = torch.arange(-32768, 32768).to(torch.int16)
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat(
        [middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1]), -middles]
    )
    random = (torch.randn(4096) * torch.exp(4 * torch.randn(4096)))[: 4096 - near.numel()]
    for x in (
        sixteen.view(torch.float16).float(),
        sixteen.view(torch.bfloat16).float(),
        torch.cat([near, random]),
    ):
        found = torch.empty(x.numel(), dtype=torch.uint8, device=DEVICE)
        cast_kernel[(x.numel() // 4096,)](x.to(DEVICE), found, BLOCK=4096)
        nan = x.isnan()
        want = to_fp8(x, torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(found.cpu()[~nan], want[~nan])
        assert bool((found.cpu()[nan] & 0x7F == 0x7F).all())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_fp8_code_in_float16(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    found = torch.empty(256, dtype=torch.float16, device=DEVICE)
    half_kernel[(1,)](codes, found, E4M3=dtype == torch.float8_e4m3fn)
    torch.testing.assert_close(found, codes.view(dtype).half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_ptx_of_every_fp8_code_in_every_place(kind: str) -> None:
    source = kernels.E4M3_HALVES if kind == "e4m3" else kernels.E5M2_HALVES
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    for code in range(256):
        codes = [(code * f + 31 * i) % 256 for i, f in enumerate((1, 3, 5, 7))]
        word = sum(c << (8 * i) for i, c in enumerate(codes))
        words = ptx.run(source.value, {"$2": word}, ["$0", "$1"])
        bits = torch.tensor([h for w in words for h in (w & 0xFFFF, w >> 16)])
        found = bits.to(torch.int16).view(torch.float16) * (256 if kind == "e4m3" else 1)
        want = torch.tensor(codes, dtype=torch.uint8).view(dtype).half()
        number = ~want.isnan()
        assert torch.equal(found[number], want[number])


# ---------------------------------------------------------------------- RMSNorm
@eight_bit_cases
@dtypes
@pytest.mark.parametrize(("k", "block"), [(300, 16384), (257, 128)])
def test_rms_norm_and_codes_in_one_kernel(
    name: str,
    params: dict[str, object],
    dtype: torch.dtype,
    k: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outlier_columns, "ROW_BLOCK", block)
    m, eps = 4, 1e-5
    x = (torch.randn(m, k) * torch.tensor([[1.0], [1e-3], [100.0], [0.0]])).to(dtype).to(DEVICE)
    weight = torch.randn(k).to(dtype).to(DEVICE)
    # LLM.int8() keeps the norm's result, so the test can check its arithmetic.
    llm = packed("int8", {"threshold": 2.0}, k)
    normed = eight_bit_halves.quantize(eight_bit, x, llm, problem(llm, x), norm=weight, eps=eps).x
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + eps).sqrt() * weight.double()
    u = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    # Two roundings to dtype, and float32 before them. 2^-24 is for float16 below its normal range,
    # times |weight|.
    assert bool(
        (
            (normed.double() - exact).abs()
            <= 2.01 * u * exact.abs() + 2.0**-24 * (1 + weight.abs())
        ).all()
    )

    p = packed(name, params, k)
    a = eight_bit_halves.quantize(eight_bit, x, p, problem(p, x), norm=weight, eps=eps)
    assert_codes(a, normed, p)
    y = eight_bit_halves.multiply(eight_bit, a, p, None, problem(p, x))
    assert torch.equal(y, qk.matmul(normed, p, backend="triton"))


def test_rms_norm_rounds_where_models_do() -> None:
    """x / rms(x) is rounded to x's dtype before the weight multiplies it."""
    k = 16
    x = torch.full((1, k), 1.0).half().to(DEVICE)
    x[0, 0] = 1.5
    weight = torch.full((k,), 1.0 + 2**-10).half().to(DEVICE)
    p = packed("int8", {}, k)
    normed = eight_bit_halves.quantize(eight_bit, x, p, problem(p, x), norm=weight, eps=0.0).x
    inner = (x.float() * x.float().square().mean(1, keepdim=True).rsqrt()).half()
    assert torch.equal(normed, inner * weight)


# ---------------------------------------------------------------------- LLM.int8()
def with_outliers(m: int, k: int, planted: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(m, k).clamp(-5, 5)
    if planted == "one":
        x[m // 2, 3] = -40.0
    elif planted == "many":  # in one row, in several, and just at the threshold
        x[0, ::7] = 30 * torch.randn(x[0, ::7].shape).sign()
        x[-1, 5::11] = 7.0
        x[:, 1] = 6.0
    elif planted == "all":
        x = x.sign() * (x.abs() + 6.5)
        x[: m // 2, 1::2] = 0.25
    elif planted == "row":
        x[0] = 9.0
    return x.to(dtype).to(DEVICE)


@dtypes
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("m", [1, 5, 18])
@pytest.mark.parametrize("planted", ["none", "one", "many", "all", "row"])
def test_outliers(planted: str, m: int, invariant: bool, dtype: torch.dtype) -> None:
    k = 203
    x = with_outliers(m, k, planted, dtype)
    p = packed("int8", {}, k, n=70)
    bias = torch.randn(70).to(dtype).to(DEVICE)
    y = qk.matmul(x, p, bias, backend="triton", batch_invariant=invariant)
    assert_close(y, x, p, bias, invariant)


@pytest.mark.parametrize(("k", "block"), [(300, 16384), (257, 128)])
@pytest.mark.parametrize("planted", ["none", "one", "many", "all", "row"])
def test_columns_are_listed_in_order(
    planted: str, k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlier_columns, "ROW_BLOCK", block)
    x = with_outliers(5, k, planted, torch.float16)
    p = packed("int8", {}, k)
    for _ in range(2):  # the second call starts from the flags and the counter of the first
        a = eight_bit_halves.quantize(eight_bit, x, p, problem(p, x))
        assert a.columns is not None
        count = int(a.columns[-1])
        want = (x.abs() >= 6).any(0).nonzero()[:, 0]
        assert torch.equal(a.columns[:count], want.to(torch.int32))
        assert_codes(a, x, p)


def test_flags_of_columns_if_no_counters_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    full_arena(monkeypatch)
    x = with_outliers(3, 300, "many", torch.float16)
    p = packed("int8", {}, 300)
    assert_close(qk.matmul(x, p, backend="triton"), x, p)


def test_threshold_zero_is_off() -> None:
    x = with_outliers(4, 100, "many", torch.float16)
    weight = torch.randn(20, 100)
    plain = qk.quantize(weight, "int8", threshold=0.0).to(DEVICE)
    w8a8 = qk.quantize(weight, "w8a8").to(DEVICE)
    y = qk.matmul(x, plain, backend="triton")
    assert_close(y, x, plain)
    assert torch.equal(y, qk.matmul(x, w8a8, backend="triton"))
    assert eight_bit_halves.quantize(eight_bit, x, plain, problem(plain, x)).columns is None


def test_outliers_keep_their_16_bits() -> None:
    """A column of outliers only is exact up to the result's rounding, because it has no codes."""
    x = torch.zeros(3, 64).half().to(DEVICE)
    x[:, 9] = torch.tensor([100.3, -77.7, 6.004]).half()
    p = packed("int8", {}, 64)
    w = p.dequantize(torch.float64)[:, 9]
    for rows in (x, x[:1]):
        y = qk.matmul(rows, p, backend="triton")
        exact = rows[:, 9].double()[:, None] * w
        # float32's roundings, then one to float16
        torch.testing.assert_close(y.double(), exact, rtol=2.0**-11 + 2.0**-20, atol=2.0**-25)


def test_scale_of_a_row_leaves_outliers_out() -> None:
    x = torch.full((2, 40), 0.01).half().to(DEVICE)
    x[0, 3] = 1000.0
    p = packed("int8", {}, 40)
    a = eight_bit_halves.quantize(eight_bit, x, p, problem(p, x))
    want = x[0, 0].float() / 127
    assert torch.equal(a.scale, want.expand(2))


def test_activations_serve_several_weights() -> None:
    x = with_outliers(4, 100, "many", torch.float16)
    q, v = packed("int8", {}, 100, n=24), packed("int8", {}, 100, n=8)
    a = eight_bit_halves.quantize(eight_bit, x, q, problem(q, x))
    for p in (q, v):
        y = eight_bit_halves.multiply(eight_bit, a, p, None, problem(p, x))
        assert torch.equal(y, qk.matmul(x, p, backend="triton"))
