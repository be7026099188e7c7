"""csrc/eight_bit/rows.h: the GEMV that quantizes x itself has the bits of the two kernels that it
replaces, a quantization and a product.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels.backends import eight_bit as shared
from qkernels.backends.cuda import eight_bit
from qkernels.backends.plan import SCRATCH, Plan

from ..conftest import DEVICE, case_id
from . import conftest as emulation

pytest.importorskip("triton")
from ..kernels import eight_bit_halves
from ..kernels.test_activations import packed, problem
from ..kernels.test_eight_bit import (  # noqa: F401  # the last two are fixtures
    EIGHT_BIT,
    FP8,
    assert_close,
    counters_end_as_zeros,
    dtypes,
    operands,
    poisoned_outputs,
)

pytestmark = pytest.mark.usefixtures("emulated")

#: the formats of the family, every kind of codes and of scales, without outlier columns
CASES: list[tuple[str, dict[str, object]]] = [
    *(case for case in EIGHT_BIT if case[0] not in ("int8", "fp8")),
    *FP8,
    ("int8", {"threshold": 0.0}),
]
cases = pytest.mark.parametrize(("name", "params"), CASES, ids=map(case_id, CASES))
#: scales of rows
PER_TOKEN: list[tuple[str, dict[str, object]]] = [("w8a8", {}), ("fp8", {"activation": "dynamic"})]


def most_rows(name: str, params: dict[str, object]) -> int:
    """Rows that the GEMV quantizes at most."""
    p = packed(name, params, 16, n=1)
    return eight_bit.QUANTIZED_ROWS[shared.traits_of(problem(p, torch.ones(1, 16))).activation]


def launches(x: Tensor, p: qk.PackedWeight, bias: Tensor | None = None) -> list[str]:
    """Names of the kernels of a product."""
    return [step.name for step in declared(x, p, bias).steps]


def declared(x: Tensor, p: qk.PackedWeight, bias: Tensor | None = None) -> Plan:
    plan = Plan([x, bias], (x.shape[0], p.shape[0]))
    eight_bit.declare(plan, p.prepack_("eight_bit"), problem(p, x))
    return plan


def in_two_steps(
    x: Tensor, p: qk.PackedWeight, bias: Tensor | None, *config: eight_bit.Config
) -> Tensor:
    p.prepack_("eight_bit")
    a = eight_bit_halves.quantize(eight_bit, x, p, problem(p, x))
    return eight_bit_halves.multiply(eight_bit, a, p, bias, problem(p, x), *config)


def in_one(x: Tensor, p: qk.PackedWeight, bias: Tensor | None, *config: eight_bit.Config) -> Tensor:
    p.prepack_("eight_bit")
    a = shared.Activations(None, p.storage.get("input_scale"), x)
    return eight_bit_halves.multiply(eight_bit, a, p, bias, problem(p, x), *config)


def bits(y: Tensor) -> Tensor:
    """Bits that can be compared, with one NaN for all."""
    return torch.where(y.isnan(), torch.full_like(y, math.nan), y).view(torch.int16)


@cases
@dtypes
@pytest.mark.parametrize(("n", "k"), [(73, 520), (16, 8), (35, 1544), (1, 128)])
def test_same_bits_as_two_kernels(
    name: str, params: dict[str, object], dtype: torch.dtype, n: int, k: int
) -> None:
    for m in range(1, most_rows(name, params) + 1) if k == 520 else (1, 3):
        x, p, bias = operands(name, params, n, k, m, dtype)
        x = (x.float() * torch.exp2(torch.randint(-9, 5, (m, 1), device=x.device))).to(dtype)
        x[m // 2, : k // 2] = 0
        y = in_one(x, p, bias)
        assert_close(y, x, p, bias)
        assert torch.equal(bits(y), bits(in_two_steps(x, p, bias))), f"M={m}"


@cases
def test_numbers_that_are_not_finite(name: str, params: dict[str, object]) -> None:
    for value in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float16, torch.bfloat16):
            x, p, bias = operands(name, params, 20, 264, 4, dtype)
            x[1, 77], x[3, 130] = value, value
            x[2] = 0
            y = in_one(x, p, bias)
            assert torch.equal(bits(y), bits(in_two_steps(x, p, bias)))
            assert bool(y[[0, 2]].isfinite().all())


@cases
def test_tiny_and_huge_numbers(name: str, params: dict[str, object]) -> None:
    """Where 1 / absmax overflows, and where scales reach their floors."""
    for dtype in (torch.float16, torch.bfloat16):
        largest = torch.finfo(dtype).max
        _, p, bias = operands(name, params, 20, 264, 1, dtype)
        for sizes in ([1e-40, 1e-38, 1e-6, 1e4], [1e38]):
            x = torch.randn(len(sizes), 264) * torch.tensor(sizes)[:, None]
            x = x.clamp(-largest, largest).to(dtype).to(DEVICE)
            assert torch.equal(bits(in_one(x, p, bias)), bits(in_two_steps(x, p, bias)))


@pytest.mark.parametrize(("m", "k"), [(1, 8 * 1024 + 136), (3, 4 * 1024 + 8), (8, 2 * 1024 + 24)])
@pytest.mark.parametrize("at", [0, -1])
def test_the_largest_is_anywhere_in_a_long_row(m: int, k: int, at: int) -> None:
    """In the first pass of all threads over the row, or in the rest after the last whole pass."""
    for name, params in PER_TOKEN:
        x, p, bias = operands(name, params, 9, k, m, torch.float16)
        x[m - 1, at] = 300
        y = in_one(x, p, bias)
        assert_close(y, x, p, bias)
        assert torch.equal(bits(y), bits(in_two_steps(x, p, bias)))


@cases
@pytest.mark.parametrize("order", [1, 9])
def test_any_order_of_blocks_and_slices(name: str, params: dict[str, object], order: int) -> None:
    for m in (1, 3, most_rows(name, params)):
        x, p, bias = operands(name, params, 40, 856, m, torch.float16)
        for config in (eight_bit.Config(True, 8, 1, 7), eight_bit.Config(True, 8, 3, 3)):
            emulation.ORDER[0] = 0
            want = in_two_steps(x, p, bias, config)
            emulation.ORDER[0] = order
            assert torch.equal(bits(in_one(x, p, bias, config)), bits(want))


@pytest.mark.parametrize("zero", [0, -128, 127, 5])
def test_zero_points(zero: int) -> None:
    params = {"activation": "static", "input_scale": 0.01, "input_zero_point": zero}
    for m in (1, 4):  # a scale at which x saturates
        x, p, bias = operands("w8a8", params, 70, 200, m, torch.float16)
        y = in_one(x, p, bias)
        assert_close(y, x, p, bias)
        assert torch.equal(bits(y), bits(in_two_steps(x, p, bias)))


@pytest.mark.parametrize(("name", "params"), FP8, ids=map(case_id, FP8))
def test_gpus_without_fp8(name: str, params: dict[str, object]) -> None:
    if DEVICE == "cuda":
        pytest.skip("emulates a GPU that this machine does not have")
    emulation.DEFINES.append("QK_EMULATED_ARCH=800")
    x, p, bias = operands(name, params, 33, 304, 3, torch.float16)
    y = in_one(x, p, bias)
    assert_close(y, x, p, bias)
    assert torch.equal(bits(y), bits(in_two_steps(x, p, bias)))


# ---------------------------------------------------------------------- which way
@cases
def test_rows_are_the_same_both_ways(name: str, params: dict[str, object]) -> None:
    """Rows of the GEMV do not depend on M, not even where M changes the way."""
    x, p, bias = operands(name, params, 24, 1104, 16, torch.float16)
    full = qk.matmul(x, p, bias, backend="cuda")
    most, product = most_rows(name, params), f"eight_bit_{shared.traits_of(problem(p, x)).kind}"
    assert launches(x, p) == ["quantize_rows", product]
    if DEVICE == "cuda" and name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        most = 0
    for m in (1, 2, 4, 5, 8, 9):
        assert launches(x[:m], p) == ["quantize_rows", product][m <= most :]
        assert torch.equal(qk.matmul(x[:m], p, bias, backend="cuda"), full[:m]), f"M={m}"


def test_no_scratch_memory_for_codes() -> None:
    for k in (512, 511):
        x, p, _ = operands("w8a8", {}, 24, k, 8, torch.float16)
        tensors, _ = declared(x, p).allocation().take([x, None], [x.data_ptr(), 0])
        assert (tensors[SCRATCH] is None) == (k == 512)


def test_two_kernels_where_one_does_not_fit() -> None:
    x, p, bias = operands("w8a8", {}, 24, 512, 8, torch.float16)
    assert launches(x, p) == ["eight_bit_int8"]
    two = ["quantize_rows", "eight_bit_int8"]
    odd = torch.empty(8 * 512 + 1, dtype=x.dtype, device=DEVICE)[1:].view(8, 512).copy_(x)
    assert odd.data_ptr() % 16 != 0
    assert launches(odd, p) == two
    y = qk.matmul(x, p, bias, backend="cuda")
    assert torch.equal(qk.matmul(odd, p, bias, backend="cuda"), y)
    assert launches(*operands("int8", {}, 24, 512, 8, torch.float16)[:2]) == two
    assert launches(*operands("w8a8", {}, 24, 500, 8, torch.float16)[:2]) == two
    assert launches(*operands("w8a8", {}, 3, 1 << 14, 4, torch.float16)[:2]) == two[1:]
    assert launches(*operands("w8a8", {}, 3, 1 << 14, 5, torch.float16)[:2]) == two
    static = {"activation": "static", "input_scale": 0.01}
    assert launches(*operands("w8a8", static, 3, 1 << 15, 4, torch.float16)[:2]) == two[1:]


def test_fp8_needs_the_instruction_that_rounds() -> None:
    for (name, params), other in zip(PER_TOKEN, (True, False), strict=True):
        p = packed(name, params, 64, n=24)
        on_cpu = problem(p, torch.ones(1, 64, dtype=torch.float16))
        config = eight_bit.configure(shared.traits_of(on_cpu).kind, p.shape, 1, False, 132)
        for capability, expected in (((8, 0), other), ((8, 6), other), ((8, 9), True)):
            gpu = on_cpu._replace(device="cuda", capability=capability)
            assert eight_bit.quantizes(gpu, config) == expected


@cases
def test_more_rows_are_refused(name: str, params: dict[str, object]) -> None:
    x, p, _ = operands(name, params, 24, 64, most_rows(name, params) + 1, torch.float16)
    with pytest.raises(RuntimeError, match="more rows than the GEMV quantizes"):
        in_one(x, p, None)


@pytest.mark.parametrize(("m", "when"), [(8, "in it"), (9, "before")])
def test_explain_says_which(m: int, when: str) -> None:
    p = qk.quantize(torch.randn(24, 512), "w8a8")
    assert f"activations quantized {when}" in eight_bit.configuration(
        problem(p, torch.empty(m, 512, dtype=torch.float16))
    )
