"""The Hopper kernels (wgmma) against the float64 reference: emulated, or on the GPU where it is a Hopper."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk
from qkernels.backends.cuda import eight_bit, hopper

from ..conftest import DEVICE, case_id, k_of
from ..reference import assert_fused_close
from . import test_weight_only as weight_only

pytest.importorskip("triton")
from ..kernels.test_activations import with_outliers
from ..kernels.test_eight_bit import EIGHT_BIT, FP8, assert_close

pytestmark = [
    pytest.mark.usefixtures("emulated", "poisoned"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="for sm_90"
    ),
]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
CODES = list({case[0]: case for case in [*EIGHT_BIT, *FP8]}.values())
eight_bit_cases = pytest.mark.parametrize(
    ("name", "params"), [*EIGHT_BIT, *FP8[-2:]], ids=map(case_id, [*EIGHT_BIT, *FP8[-2:]])
)


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a block has several tiles, one after another."""
    for module in ("weight_only", "eight_bit"):
        monkeypatch.setattr(f"qkernels.backends.cuda.{module}.processors", lambda device: 2)


def takes_hopper(p: qk.PackedWeight, m: int) -> bool:
    return "wgmma" in str(qk.explain(p, m, backend="cuda"))


# ---------------------------------------------------------------------- weight-only
#: QuIP's products are wanted in float32, which the other GEMM writes
PLAIN = [case for case in weight_only.FUSED if not case[0].startswith("quip")]


@pytest.mark.parametrize(("name", "params"), PLAIN, ids=map(case_id, PLAIN))
@dtypes
def test_every_format(name: str, params: dict[str, object], dtype: torch.dtype) -> None:
    y, x, p, bias = weight_only.run(name, params, 40, k_of(name, 384), 130, dtype)
    assert takes_hopper(p, 130)
    assert_fused_close(y, x, p, bias)


@pytest.mark.parametrize(
    ("name", "params", "n", "k"), weight_only.ODD + weight_only.SPLIT_PAIRS + weight_only.ONE_SCALER[:5], ids=str
)  # fmt: skip
@dtypes
def test_odd_shapes(name: str, params: dict[str, object], n: int, k: int, dtype: torch.dtype) -> None:
    y, x, p, bias = weight_only.run(name, params, n, k, 137, dtype, with_bias=n % 2 == 0)
    assert_fused_close(y, x, p, bias)


TILES = [
    ("gptq", {"bits": 4, "group_size": 64, "symmetric": False}),
    ("gptq", {"bits": 3, "group_size": 128}),
    ("gptq", {"bits": 8, "group_size": 64}),
]


@pytest.mark.parametrize(("name", "params"), TILES, ids=str)
def test_several_tiles_a_block(name: str, params: dict[str, object], two_processors: None) -> None:
    """More tiles than blocks, rings that go round several times, edges of both W and x."""
    y, x, p, bias = weight_only.run(name, params, 200, 768, 300, torch.float16)
    assert_fused_close(y, x, p, bias)


def test_tiles_shorter_than_a_ring(two_processors: None) -> None:
    """No ring goes round between two tiles, so nothing but the warpgroup's own barrier keeps one's rows apart."""
    y, x, p, bias = weight_only.run("gptq", {"bits": 4, "group_size": 64}, 300, 64, 600, torch.float16)
    assert_fused_close(y, x, p, bias)


def test_rows_do_not_depend_on_m() -> None:
    p = qk.quantize(torch.randn(72, 256), "nf4").to(DEVICE)
    x = torch.randn(270, 256).bfloat16().to(DEVICE)
    full = qk.matmul(x, p, backend="cuda")
    assert torch.equal(qk.matmul(x[:131], p, backend="cuda"), full[:131])


# ---------------------------------------------------------------------- 8 bits by 8 bits
@eight_bit_cases
@dtypes
def test_every_eight_bit_format(name: str, params: dict[str, object], dtype: torch.dtype) -> None:
    n, k, m = 140, 400, 150
    p = qk.quantize(torch.randn(n, k), name, **params).to(DEVICE)
    x = with_outliers(m, k, "many" if name == "int8" else "none", dtype).to(DEVICE)
    bias = torch.randn(n).to(dtype).to(DEVICE)
    assert p.format == "fp8" or takes_hopper(p, m)
    assert_close(qk.matmul(x, p, bias, backend="cuda"), x, p, bias)


@pytest.mark.parametrize(("name", "params"), CODES, ids=map(case_id, CODES))
def test_several_eight_bit_tiles_a_block(name: str, params: dict[str, object], two_processors: None) -> None:
    params = params | ({"activation": "dynamic"} if name == "fp8" else {})
    p = qk.quantize(torch.randn(301, 1100), name, **params).to(DEVICE)
    x = torch.randn(270, 1100).half().to(DEVICE)
    assert takes_hopper(p, 270)
    assert_close(qk.matmul(x, p, backend="cuda"), x, p)


# ---------------------------------------------------------------------- the launch
def test_fewer_rows_and_other_gpus_take_other_kernels() -> None:
    p = qk.quantize(torch.randn(16, 128), "awq", group_size=64).to(DEVICE)
    assert not takes_hopper(p, hopper.MIN_ROWS - 1)
    problem = qk.dispatch.problem_of(p, 512, torch.float16, torch.device(DEVICE), False)
    assert "sm_90" in str(hopper.rejects(problem._replace(capability=(10, 0))))
    assert hopper.rejects(problem._replace(capability=(9, 0))) is None
    assert eight_bit.configure("e4m3", (256, 256), 512, False, 8, hopper=False).rows > 0
    assert eight_bit.configure("e4m3", (256, 256), 512, False, 8, hopper=True).rows == 0
    assert eight_bit.configure("e4m3", (256, 256), 512, True, 8, hopper=True).rows > 0
