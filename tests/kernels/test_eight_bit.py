"""The 8-bit kernels: activations to codes bit for bit, products against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels import counters
from qkernels.formats.fp8 import to_fp8

from ..conftest import CASES, DEVICE, case_id, layout_of
from ..reference import ROUNDOFF, static_scale

pytest.importorskip("triton")
from qkernels.backends.triton import eight_bit

EIGHT_BIT = [case for case in CASES if layout_of(*case) == "eight_bit"]
FP8 = [case for case in EIGHT_BIT if case[0] == "fp8"] + [
    ("fp8", {"activation": "dynamic", "float_format": "e5m2"}),
    ("fp8", {"activation": "dynamic", "float_format": "e5m2", "granularity": "block"}),
]
eight_bit_cases = pytest.mark.parametrize(
    ("name", "params"), EIGHT_BIT, ids=map(case_id, EIGHT_BIT)
)
fp8_cases = pytest.mark.parametrize(("name", "params"), FP8, ids=map(case_id, FP8))
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialized tensors start as NaN, or as an integer that is wrong everywhere."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poison(*args: Any, real: Any = real, **kwargs: Any) -> Tensor:
            made = real(*args, **kwargs)
            return made.fill_(float("nan") if made.is_floating_point() else 77)

        monkeypatch.setattr(torch, name, poison)


@pytest.fixture(autouse=True)
def counters_end_as_zeros() -> Any:
    yield
    assert all(not bool(arena.zeros.any()) for arena in counters._arenas.values())


def full_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no counters be left."""
    monkeypatch.setattr(counters, "ARENA", 0)
    monkeypatch.setattr(counters, "_arenas", {})
    monkeypatch.setattr(counters, "_regions", {})


# ---------------------------------------------------------------------- the bound
def reference(
    x: Tensor, p: qk.PackedWeight, bias: Tensor | None, invariant: bool = False
) -> Tensor:
    y = qk.formats.get(p.format).matmul(x.double(), p.tensors, p.shape, p.params, invariant)
    return y if bias is None else y + bias.double()


def quantized(x: Tensor, p: qk.PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: the scale of each element of x, and its codes if the value before rounding is
    2^-22 lower and higher. The kernel's float32 has at most three roundings of 2^-24.
    """
    x, params = x.double(), p.params
    if (static := static_scale(p)) is not None:
        scale = static.double().reshape(1, 1)
    elif p.format != "fp8":
        threshold = params.get("threshold") or float("inf")
        scale = x.abs().masked_fill(x.abs() >= threshold, 0).amax(1, keepdim=True) / 127
        x = x.masked_fill(x.abs() >= threshold, 0)
    elif params["granularity"] == "block":
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 128)).view(x.shape[0], -1, 128)
        scale = (padded.abs().amax(2).clamp(min=1e-4) / 448).repeat_interleave(128, 1)[
            :, : x.shape[1]
        ]
    else:
        scale = (x.abs().amax(1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    value = torch.where(scale == 0, 0, x / scale)
    if p.format == "fp8":
        below, above = (
            to_fp8(value * f, torch.float8_e4m3fn).double() for f in (1 - 2**-22, 1 + 2**-22)
        )
    else:
        below, above = (torch.round(value * f) for f in (1 - 2**-22, 1 + 2**-22))
    return scale, below, above


def assert_close(
    y: Tensor, x: Tensor, p: qk.PackedWeight, bias: Tensor | None = None, invariant: bool = False
) -> None:
    """|error| <= u |y|, the rounding of the result, plus the errors that may come before it:

    - A code within 2^-22 of a midpoint may be its neighbour, because float32 cannot decide it. The
      error is the difference times |w|, only for such elements.
    - Float32 sums of K products have an error relative to the sum of their sizes. (The int8
      products are exact. A GPU's fp8 products may keep 13 bits within a step of 128.)
    - LLM.int8() rounds the difference between x and its codes in outlier columns to 16 bits; the
      difference is at most half a step.
    """
    want = reference(x, p, bias, invariant)
    scale, below, above = quantized(x, p)
    w = p.dequantize(torch.float64).abs().T
    u, k = ROUNDOFF[x.dtype], p.shape[1]
    sizes = (x.double().abs() + scale) @ w + (0 if bias is None else bias.double().abs())
    single = (k + 16) * 2.0**-24
    if p.format == "fp8" and torch.cuda.is_available():
        single += 2.0**-13
    bound = ((above - below).abs() * scale) @ w + single * sizes
    if p.params.get("threshold"):
        columns = (x.abs() >= p.params["threshold"]).any(0, keepdim=True)
        bound += u * (scale * columns) @ w
    # The last term is for results below float16's normal range.
    bound += u * (want.abs() + bound) + 2.0**-24 * (1 + w.sum(0))
    error = (y.double() - want).abs()
    assert bool((error <= bound).all()), f"error over its bound by {(error - bound).max().item()}"
    assert error.norm() <= bound.norm()  # NaN fails here, too


def operands(
    name: str, params: dict[str, object], n: int, k: int, m: int, dtype: torch.dtype
) -> tuple[Tensor, qk.PackedWeight, Tensor]:
    p = qk.quantize(torch.randn(n, k), name, **params).to(DEVICE)
    x = torch.randn(m, k)
    if name == "int8":  # a few outliers, in some rows only
        x[::3, torch.randperm(k)[: k // 50 + 1]] *= 20
    return x.to(dtype).to(DEVICE), p, torch.randn(n).to(dtype).to(DEVICE)


# ---------------------------------------------------------------------- products
@eight_bit_cases
@dtypes
@pytest.mark.parametrize("m", [1, 3, 16, 17, 65])
def test_every_format(name: str, params: dict[str, object], m: int, dtype: torch.dtype) -> None:
    x, p, bias = operands(name, params, 73, 523, m, dtype)
    y = qk.matmul(x, p, bias, backend="triton")
    assert p.layout == "eight_bit"
    assert_close(y, x, p, bias)


@eight_bit_cases
@pytest.mark.parametrize(
    ("n", "k", "m"), [(133, 200, 130), (1, 1, 1), (7, 16, 2), (64, 384, 5), (65, 129, 4)]
)
def test_odd_and_even_shapes(name: str, params: dict[str, object], n: int, k: int, m: int) -> None:
    x, p, _ = operands(name, params, n, k, m, torch.float16)
    assert_close(qk.matmul(x, p, backend="triton"), x, p)


@fp8_cases
@dtypes
def test_fp8_formats_and_gpus_without_them(
    name: str, params: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, p, bias = operands(name, params, 73, 300, 18, dtype)
    y = qk.matmul(x, p, bias, backend="triton")
    assert_close(y, x, p, bias)
    monkeypatch.setattr(eight_bit, "has_fp8", lambda capability: False)
    assert_close(qk.matmul(x, p, bias, backend="triton"), x, p, bias)


@pytest.mark.parametrize("float_format", ["e4m3", "e5m2"])
@pytest.mark.parametrize(("n", "k"), [(257, 300), (129, 129), (1, 640), (200, 127)])
def test_block_scales_stay_in_their_blocks(n: int, k: int, float_format: str) -> None:
    params = {"granularity": "block", "activation": "dynamic", "float_format": float_format}
    fmt = qk.formats.get("fp8")
    tensors = fmt.quantize(torch.randn(n, k), {**fmt.defaults, **params, "input_scale": None})
    scale = tensors["weight_scale_inv"]
    tensors["weight_scale_inv"] = scale * torch.exp2(torch.randint(-3, 4, scale.shape))
    p = qk.pack("fp8", tensors, (n, k), **params).to(DEVICE)
    for m in (3, 130) if n > 200 else (3,):
        groups = torch.exp2(torch.randint(-4, 5, (m, -(-k // 128)))).repeat_interleave(128, 1)[
            :, :k
        ]
        x = (torch.randn(m, k) * groups).half().to(DEVICE)
        assert_close(qk.matmul(x, p, backend="triton"), x, p)


@pytest.mark.parametrize("zero", [None, 0, -128, 127, 5])
def test_zero_points(zero: int | None) -> None:
    params = {"activation": "static", "input_scale": 0.01, "input_zero_point": zero}
    # x saturates with this scale.
    x, p, bias = operands("w8a8", params, 70, 203, 18, torch.float16)
    assert_close(qk.matmul(x, p, bias, backend="triton"), x, p, bias)
    assert ("row_sum" in p.storage) == (zero is not None)


@eight_bit_cases
def test_zeros_and_nan(name: str, params: dict[str, object]) -> None:
    x, p, _ = operands(name, params, 20, 200, 5, torch.float16)
    x[1] = 0
    y = qk.matmul(x, p, backend="triton")
    assert_close(y, x, p)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    if name != "fp8" and params.get("activation") == "static":
        return  # int8 codes have no NaN
    spoiled = x.clone()
    spoiled[3, 77] = float("nan")
    found = qk.matmul(spoiled, p, backend="triton")
    others = [0, 1, 2, 4]
    assert torch.equal(found[others], y[others])
    if torch.cuda.is_available() or params.get("activation") != "static":
        # triton's interpreter takes E4M3's NaN for 480
        assert bool(found[3].isnan().all())


@pytest.mark.parametrize("name", ["int8", "w8a8"])
def test_weights_of_zero(name: str) -> None:
    weight = torch.randn(9, 40)
    weight[4] = 0
    p = qk.quantize(weight, name).to(DEVICE)
    x = torch.randn(3, 40).half().to(DEVICE)
    y = qk.matmul(x, p, backend="triton")
    assert_close(y, x, p)
    assert not bool(y[:, 4].any())


@eight_bit_cases
def test_leading_dimensions_strides_and_repetition(name: str, params: dict[str, object]) -> None:
    p = qk.quantize(torch.randn(40, 640), name, **params).to(DEVICE)
    x = torch.randn(2, 640, 3).half().to(DEVICE).transpose(1, 2)
    y = qk.matmul(x, p, backend="triton")
    assert y.shape == (2, 3, 40)
    assert_close(y.reshape(6, 40), x.reshape(6, 640), p)
    assert torch.equal(y, qk.matmul(x, p, backend="triton"))


@pytest.mark.parametrize(("name", "params"), [("w8a8", {}), ("fp8", {"activation": "dynamic"})])
def test_parallel_and_sequential_k_slices_sum_alike(
    name: str, params: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, p, bias = operands(name, params, 40, 1000, 5, torch.float16)
    split = qk.matmul(x, p, bias, backend="triton")
    found = []
    real = eight_bit.split_of
    monkeypatch.setattr(eight_bit, "split_of", lambda *a: found.append(real(*a)) or 1)
    p.plans.clear()  # a kept launch would not ask again
    assert torch.equal(qk.matmul(x, p, bias, backend="triton"), split)
    assert found[0] > 1, "the first call did not split K, so this test compared nothing"


@eight_bit_cases
@pytest.mark.usefixtures("dots_in_one_order")
def test_rows_do_not_depend_on_m(name: str, params: dict[str, object]) -> None:
    x, p, _ = operands(name, params, 24, 700, 70, torch.float16)
    full = qk.matmul(x, p, backend="triton", batch_invariant=True)
    assert_close(full, x, p, invariant=True)
    for rows in (slice(0, 1), slice(1, 2), slice(0, 16), slice(3, 20), slice(2, 69)):
        part = qk.matmul(x[rows], p, backend="triton", batch_invariant=True)
        assert torch.equal(part, full[rows])


@eight_bit_cases
def test_gradient_in_the_kernel_layout(name: str, params: dict[str, object]) -> None:
    p = qk.quantize(torch.randn(24, 50), name, **params).to(DEVICE)
    x = torch.randn(3, 50).half().to(DEVICE).requires_grad_()
    grad = torch.randn(3, 24).half().to(DEVICE)
    qk.matmul(x, p, backend="triton").backward(grad)
    assert p.layout == "eight_bit"
    torch.testing.assert_close(x.grad, (grad.float() @ p.dequantize()).half())


# ---------------------------------------------------------------------- the layout
SCALES = [  # dtypes of scales in checkpoints that `quantize` does not write
    (
        "w8a8",
        {"activation": "static"},
        {"weight_scale": torch.float16, "input_scale": torch.bfloat16},
    ),
    ("fp8", {"activation": "dynamic", "granularity": "tensor"}, {"weight_scale": torch.bfloat16}),
    (
        "fp8",
        {"activation": "dynamic", "granularity": "block"},
        {"weight_scale_inv": torch.bfloat16},
    ),
]


@pytest.mark.parametrize(("n", "k"), [(5, 33), (3, 48), (130, 129)])
@pytest.mark.parametrize(
    ("name", "params", "cast"), [(*case, {}) for case in EIGHT_BIT] + SCALES, ids=lambda v: str(v)
)
def test_prepack_is_invertible(
    name: str, params: dict[str, object], cast: dict[str, torch.dtype], n: int, k: int
) -> None:
    if params.get("activation") == "static":
        params = {"input_scale": 0.5, **params}
    p = qk.quantize(torch.randn(n, k), name, **params)
    before = {key: t.clone().to(cast.get(key, t.dtype)) for key, t in p.tensors.items()}
    if cast and params.get("granularity") == "tensor":
        before["weight_scale"] = before["weight_scale"].reshape(())
    if name == "int8" and k == 33:
        del before["weight_format"]
    p = qk.pack(
        name,
        before,
        (n, k),
        **{key: v for key, v in params.items() if not key.startswith("input_")},
    )
    after = p.prepack_("eight_bit").tensors
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape), key
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, after[key]))), key
    assert p.storage["weight"].shape == (n, -(-k // 16) * 16)
    assert not bool(p.storage["weight"].view(torch.uint8)[:, k:].any())
