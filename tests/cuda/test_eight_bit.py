"""csrc/eight_bit, emulated or on a GPU: codes bit for bit, products against float64."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels.backends.cuda import eight_bit, launch
from qkernels.backends.plan import Plan, Symbolic

from ..conftest import DEVICE, case_id
from ..plans import at_once
from . import conftest as emulation

pytest.importorskip("triton")
from ..kernels import eight_bit_halves
from ..kernels.test_activations import assert_codes, packed, problem, with_outliers
from ..kernels.test_eight_bit import (  # noqa: F401  # the last two are fixtures
    EIGHT_BIT,
    FP8,
    assert_close,
    counters_end_as_zeros,
    dtypes,
    eight_bit_cases,
    operands,
    poisoned_outputs,
)

pytestmark = pytest.mark.usefixtures("emulated")


def product(
    x: Tensor, p: qk.PackedWeight, bias: Tensor | None = None, invariant: bool = False
) -> Tensor:
    return qk.matmul(x, p, bias, backend="cuda", batch_invariant=invariant)


def test_structs_of_another_version_are_refused() -> None:
    x = torch.randn(1, 16).half().to(DEVICE)
    for call, name in (
        (eight_bit.QuantizeCall, "quantize_rows"),
        (eight_bit.EightBitCall, "eight_bit_int8"),
    ):
        wrong = call(size=ctypes.sizeof(call) + 8)

        def declare(plan: Plan, x: Symbolic, name: str = name, wrong: Any = wrong) -> None:
            launch.start(plan, name, wrong, [x], [])

        with pytest.raises(RuntimeError, match="different versions"):
            at_once(launch.Compiled, declare, x)


# ---------------------------------------------------------------------- activations
@eight_bit_cases
@dtypes
@pytest.mark.parametrize(("m", "k"), [(5, 300), (1, 16), (3, 301), (2, 8 * 256 * 4 + 1000)])
def test_codes_bit_for_bit(
    name: str, params: dict[str, object], dtype: torch.dtype, m: int, k: int
) -> None:
    """Also for rows longer than a block's registers hold, and for numbers of every size."""
    p = packed(name, params, k, n=1)
    for spread in (0, 4):
        x = (
            (torch.randn(m, k) * torch.exp(spread * torch.randn(m, k)))
            .clamp(-6e4, 6e4)
            .to(dtype)
            .to(DEVICE)
        )
        x[-1, : k // 2] = 0
        assert_codes(eight_bit_halves.quantize(eight_bit, x, p, problem(p, x)), x, p)


@dtypes
@pytest.mark.parametrize("scale", [1e-42, 3e-36, 2e-25, 0.0173, 1.0, 771.3, 1e18, 6e29, 3e38])
def test_scales_of_every_size(dtype: torch.dtype, scale: float) -> None:
    """Quotients of all 16-bit numbers are those of IEEE division."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).to(DEVICE)
    x = torch.where(x.isnan(), 0, x)[None]
    for name, more in (
        ("fp8", {"granularity": "tensor"}),
        ("w8a8", {}),
        ("w8a8", {"input_zero_point": -7}),
    ):
        p = packed(name, {"activation": "static", "input_scale": scale, **more}, x.shape[1], n=1)
        assert_codes(eight_bit_halves.quantize(eight_bit, x, p, problem(p, x)), x, p)
    x = torch.where(x.isfinite() & (x.double().abs() <= 100 * scale), x, 0)
    for params in ({}, {"granularity": "block"}):
        p = packed("fp8", {"activation": "dynamic", **params}, x.shape[1], n=1)
        assert_codes(eight_bit_halves.quantize(eight_bit, x, p, problem(p, x)), x, p)


def test_rows_that_are_not_aligned() -> None:
    x = torch.randn(4 * 64 + 1).half().to(DEVICE)[1:].view(4, 64)
    p = packed("w8a8", {}, 64, n=1)
    assert x.data_ptr() % 16 != 0
    assert_codes(eight_bit_halves.quantize(eight_bit, x, p, problem(p, x)), x, p)


def test_not_a_number_stays_in_its_row() -> None:
    x = torch.randn(3, 200).half().to(DEVICE)
    x[1, 77] = float("nan")
    for name, params in (("w8a8", {}), ("fp8", {"activation": "dynamic"})):
        p = packed(name, params, 200, n=20)
        y = product(x, p)
        assert bool(y[1].isnan().all())
        assert not bool(y[[0, 2]].isnan().any())


@dtypes
@pytest.mark.parametrize("k", [300, 8 * 256 * 4 + 40])
def test_rms_norm(dtype: torch.dtype, k: int) -> None:
    x = (torch.randn(4, k) * torch.tensor([[1.0], [1e-3], [100.0], [0.0]])).to(dtype).to(DEVICE)
    weight, eps = torch.randn(k).to(dtype).to(DEVICE), 1e-5
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + eps).sqrt() * weight.double()
    u = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    for name, params in EIGHT_BIT:
        p = packed(name, params, k, n=1)
        a = eight_bit_halves.quantize(
            eight_bit, x, p, problem(p, x), norm=weight, eps=eps, keep=True
        )
        # two roundings to dtype, float32 before them; 2^-24: float16 below its normal range, times
        # |weight|
        bound = 2.01 * u * exact.abs() + 2.0**-24 * (1 + weight.abs())
        assert bool(((a.x.double() - exact).abs() <= bound).all())
        assert_codes(a, a.x, p)


@dtypes
def test_silu_and_product(dtype: torch.dtype) -> None:
    gate, up = (4 * torch.randn(2, 3, 200)).to(dtype).to(DEVICE)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    u = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    for name, params in EIGHT_BIT:
        p = packed(name, params, 200, n=1)
        a = eight_bit_halves.quantize(
            eight_bit, gate, p, problem(p, gate), up=up.contiguous(), keep=True
        )
        bound = 2.01 * u * exact.abs() + 2.0**-24 * (1 + up.abs())
        assert bool(((a.x.double() - exact).abs() <= bound).all())
        assert_codes(a, a.x, p)


def test_operands_that_do_not_fit() -> None:
    x = torch.randn(2, 64).half().to(DEVICE)
    p = packed("w8a8", {}, 64, n=1)
    with pytest.raises(ValueError, match=r"up: expected torch.float16 of shape \(2, 64\), got"):
        eight_bit_halves.quantize(eight_bit, x, p, problem(p, x), up=x[:1])
    with pytest.raises(ValueError, match=r"norm: expected torch.float16 of shape \(64,\), got"):
        eight_bit_halves.quantize(
            eight_bit, x, p, problem(p, x), norm=torch.ones(64, device=DEVICE)
        )


@pytest.mark.parametrize("planted", ["none", "one", "many", "all", "row"])
@pytest.mark.parametrize("order", [0, 1, 5])
def test_columns_are_listed_in_order(planted: str, order: int) -> None:
    emulation.ORDER[0] = order
    k = 300 if planted != "many" else 9000
    x = with_outliers(5, k, planted, torch.float16)
    p = packed("int8", {}, k, n=1)
    for _ in range(2):  # the second call finds mask and counter as the first one left them
        a = eight_bit_halves.quantize(eight_bit, x, p, problem(p, x))
        assert a.columns is not None
        want = (x.abs() >= 6).any(0).nonzero()[:, 0]
        assert torch.equal(a.columns[: int(a.columns[-1])], want.to(torch.int32))
        assert_codes(a, x, p)


# ---------------------------------------------------------------------- products
@eight_bit_cases
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 17, 33, 66])
def test_every_format(name: str, params: dict[str, object], m: int) -> None:
    for dtype in (torch.float16, torch.bfloat16) if m in (1, 17) else (torch.float16,):
        x, p, bias = operands(name, params, 73, 523, m, dtype)
        assert_close(product(x, p, bias), x, p, bias)


@eight_bit_cases
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (136, 384, 20), (7, 16, 70), (129, 129, 4)])
def test_odd_and_even_shapes(name: str, params: dict[str, object], n: int, k: int, m: int) -> None:
    x, p, _ = operands(name, params, n, k, m, torch.float16)
    assert_close(product(x, p), x, p)


@pytest.mark.parametrize(("name", "params"), FP8, ids=map(case_id, FP8))
def test_gpus_without_fp8(
    name: str, params: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cuda":
        pytest.skip("emulates a GPU that this machine does not have")
    emulation.DEFINES.append("QK_EMULATED_ARCH=800")
    for m in (3, 18):
        x, p, bias = operands(name, params, 33, 300, m, torch.float16)
        assert_close(product(x, p, bias), x, p, bias)
        x[1, 70] = float("nan")
        y = product(x, p, bias)
        assert bool(y[1].isnan().all())
        assert not bool(y[0].isnan().any())


@pytest.mark.parametrize("float_format", ["e4m3", "e5m2"])
@pytest.mark.parametrize(
    ("n", "k", "m"), [(257, 300, 3), (129, 129, 9), (1, 640, 130), (200, 127, 40)]
)
def test_block_scales_stay_in_their_blocks(n: int, k: int, m: int, float_format: str) -> None:
    params = {"granularity": "block", "activation": "dynamic", "float_format": float_format}
    fmt = qk.formats.get("fp8")
    tensors = fmt.quantize(torch.randn(n, k), {**fmt.defaults, **params, "input_scale": None})
    scale = tensors["weight_scale_inv"]
    tensors["weight_scale_inv"] = scale * torch.exp2(torch.randint(-3, 4, scale.shape))
    p = qk.pack("fp8", tensors, (n, k), **params).to(DEVICE)
    groups = torch.exp2(torch.randint(-4, 5, (m, -(-k // 128)))).repeat_interleave(128, 1)[:, :k]
    x = (torch.randn(m, k) * groups).half().to(DEVICE)
    assert_close(product(x, p), x, p)


@pytest.mark.parametrize("zero", [0, -128, 127, 5])
def test_zero_points(zero: int) -> None:
    params = {"activation": "static", "input_scale": 0.01, "input_zero_point": zero}
    for m in (2, 18):
        # a scale at which x saturates
        x, p, bias = operands("w8a8", params, 70, 203, m, torch.float16)
        assert_close(product(x, p, bias), x, p, bias)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("m", [1, 5, 18])
@pytest.mark.parametrize("planted", ["none", "one", "many", "all", "row"])
def test_outliers(planted: str, m: int, invariant: bool) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = with_outliers(m, 203, planted, dtype)
        p = packed("int8", {}, 203, n=70)
        bias = torch.randn(70).to(dtype).to(DEVICE)
        y = product(x, p, bias, invariant)
        assert_close(y, x, p, bias, invariant)


SPLITS = [  # both kernels, every tile, K split over blocks or not
    eight_bit.Config(True, 8, 1, 7), eight_bit.Config(True, 16, 3, 3),
    eight_bit.Config(False, 16, 2, 4), eight_bit.Config(False, 32, 7, 1),
    eight_bit.Config(False, 64, 4, 2), eight_bit.Config(False, 128, 3, 3),
]  # fmt: skip


@pytest.mark.parametrize("config", SPLITS, ids=str)
@pytest.mark.parametrize("name", ["int8", "w8a8", "fp8"])
def test_any_order_of_blocks_gives_the_same(name: str, config: eight_bit.Config) -> None:
    params = {"activation": "dynamic"} if name == "fp8" else {}
    m = min(config.rows, 20)
    x, p, bias = operands(name, params, 150, 850, m, torch.float16)
    p.prepack_("eight_bit")
    results = []
    for order in (0, 1, 9):
        emulation.ORDER[0] = order
        a = eight_bit_halves.quantize(eight_bit, x, p, problem(p, x))
        results.append(eight_bit_halves.multiply(eight_bit, a, p, bias, problem(p, x), config))
    assert_close(results[0], x, p, bias)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@eight_bit_cases
def test_rows_do_not_depend_on_m(name: str, params: dict[str, object]) -> None:
    x, p, _ = operands(name, params, 24, 1100, 70, torch.float16)
    full = product(x, p, invariant=True)
    assert_close(full, x, p, invariant=True)
    for m in (1, 2, 8, 9, 16, 17, 31, 32, 33, 40):  # each side of every change of tile
        assert torch.equal(product(x[:m], p, invariant=True), full[:m]), f"M={m}"
    assert torch.equal(product(x[69:], p, invariant=True), full[69:])


def test_split_and_sequential_k_slices_sum_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums cancel, so only rounding is left, and every other order gives another result."""
    weight, half = torch.randn(40, 1024), torch.randn(5, 1024)
    p = qk.quantize(torch.cat([weight, weight], 1), "fp8", activation="dynamic").to(DEVICE)
    x = torch.cat([half, -half], 1).bfloat16().to(DEVICE)
    monkeypatch.setattr(eight_bit, "sm_count", lambda device: 8)
    split = product(x, p, invariant=True)
    assert eight_bit.configure("e4m3", p.shape, 5, True, 8).split > 1, (
        "this test would compare nothing"
    )
    monkeypatch.setattr(eight_bit, "PARTIAL_BYTES", 0)
    config = eight_bit.configure("e4m3", p.shape, 5, True, 8)
    assert config.split == 1
    p.plans.clear()  # a kept plan would not ask again
    assert torch.equal(product(x, p, invariant=True), split)
    p.plans.clear()
    monkeypatch.setattr(eight_bit, "configure", lambda *a: config._replace(k_slice=16))
    assert not torch.equal(product(x, p, invariant=True), split)


def test_partial_sums_stay_small() -> None:
    for kind in eight_bit.KINDS:
        for invariant in (False, True):
            k_slices = set()
            for m in (1, 16, 17, 64, 65, 300, 4096, 65536):
                config = eight_bit.configure(kind, (1024, 28672), m, invariant, 132)
                tile = config.rows * (16 if config.gemv else 128)
                blocks = -(-1024 // (16 if config.gemv else 128)) * -(-m // config.rows)
                assert (
                    config.split == 1 or config.split * blocks * tile * 4 <= eight_bit.PARTIAL_BYTES
                )
                k_slices.add(config.k_slice)
            if invariant and kind != "int8":
                assert len(k_slices) == 1


@pytest.mark.parametrize("granularity", ["block", "channel"])
@pytest.mark.usefixtures("emulated")
def test_tiny_activations(granularity: str) -> None:
    from ..kernels.test_activation_floors import check

    check(granularity, "cuda")
