"""The Hopper kernels (wgmma) against the float64 reference: emulated, or on a Hopper GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkernels as qk
from qkernels.backends import workspace
from qkernels.backends.cuda import calls, eight_bit, hopper, launch, transforms
from qkernels.backends.plan import Plan, Symbolic
from qkernels.layouts import weight_only as layout

from ..conftest import DEVICE, case_id, k_of
from ..reference import assert_fused_close
from . import conftest as emulation
from . import test_transforms as incoherent
from . import test_weight_only as weight_only

pytest.importorskip("triton")
from ..kernels.test_activations import with_outliers
from ..kernels.test_eight_bit import EIGHT_BIT, FP8, assert_close

pytestmark = [
    pytest.mark.usefixtures("emulated", "poisoned"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="for sm_90",
    ),
]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
CODES = list({case[0]: case for case in [*EIGHT_BIT, *FP8]}.values())
eight_bit_cases = pytest.mark.parametrize(
    ("name", "params"), [*EIGHT_BIT, *FP8[-2:]], ids=map(case_id, [*EIGHT_BIT, *FP8[-2:]])
)


@pytest.fixture
def two_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two SMs, so that a block computes several work tiles."""
    for module in ("weight_only", "gemm", "hopper", "eight_bit"):
        monkeypatch.setattr(f"qkernels.backends.cuda.{module}.sm_count", lambda device: 2)


def takes_hopper(p: qk.PackedWeight, m: int) -> bool:
    return "wgmma" in str(qk.explain(p, m, backend="cuda"))


# ---------------------------------------------------------------------- weight-only
@weight_only.fused_cases
@dtypes
def test_every_format(name: str, params: dict[str, object], dtype: torch.dtype) -> None:
    y, x, p, bias = weight_only.run(name, params, 40, k_of(name, 384), 130, dtype)
    assert takes_hopper(p, 130)
    assert_fused_close(y, x, p, bias)


@pytest.mark.parametrize(
    ("name", "params", "n", "k"),
    weight_only.ODD + weight_only.SHORT + weight_only.SPLIT_PAIRS + weight_only.ONE_SCALER[:5],
    ids=str,
)
@dtypes
def test_odd_shapes(
    name: str, params: dict[str, object], n: int, k: int, dtype: torch.dtype
) -> None:
    y, x, p, bias = weight_only.run(name, params, n, k, 137, dtype, with_bias=n % 2 == 0)
    assert_fused_close(y, x, p, bias)


#: a kernel for each kind of scales and of decoders, and for each number of pairs in a word
KINDS = [
    ("gptq", {"bits": 4, "group_size": 128, "symmetric": False}),
    ("gptq", {"bits": 8, "group_size": 64}),
    ("nf4", {"block_size": 64}),
    ("q4_k", {}),
    ("q6_k", {}),
    ("spqr", {"bits": 3}),
    ("quip_sharp", {"bits": 4}),
]


@pytest.mark.parametrize(("name", "params"), KINDS, ids=str)
@pytest.mark.parametrize("m", [17, 64, 100])
def test_every_tiling(
    name: str, params: dict[str, object], m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 64 and of 128 rows of x, K in 1, 2 and 3 slices, of which the last is shorter.

    With slices, the first block or the first two of W's two times x's two are not cut.
    """
    n, k = 210, 256 * 5
    p = qk.quantize(torch.randn(n, k), name, **params).to(DEVICE)
    x, bias = torch.randn(m, k).bfloat16().to(DEVICE), torch.randn(n).bfloat16().to(DEVICE)
    problem = qk.backends.problem.problem_of(p, m, x.dtype, x.device, False)
    traits = qk.backends.weight_only.traits_of(problem)
    for columns in hopper.columns_of(traits.codes, traits.outliers):
        for count in (1, 2, 3):
            tiling = hopper.Tiling(columns, count, whole=count - 1)
            monkeypatch.setattr(hopper, "tiling_for", lambda *_, tiling=tiling: tiling)
            p.plans.clear()
            assert f"{columns} rows of x" in str(qk.explain(p, m, backend="cuda"))
            assert_fused_close(qk.matmul(x, p, bias, backend="cuda"), x, p, bias)


def test_slices_are_added_in_order_whatever_finishes_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper, "tiling_for", lambda *_: hopper.Tiling(64, 4, 0))
    p = qk.quantize(torch.randn(200, 1024), "gptq", group_size=128).to(DEVICE)
    x = torch.randn(40, 1024).half().to(DEVICE)
    y = qk.matmul(x, p, backend="cuda")
    for order in (1, 2):
        monkeypatch.setattr("tests.cuda.conftest.ORDER", [order])
        assert torch.equal(qk.matmul(x, p, backend="cuda"), y)


def test_slices_of_rows_have_fewer_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows have six blocks, and the last is cut; slices of rows have up to four, all whole."""
    monkeypatch.setattr(hopper, "tiling_for", lambda *_: hopper.Tiling(64, 2, whole=5))
    monkeypatch.setattr(workspace, "BYTES", 128 * 1024)
    p = qk.quantize(torch.randn(200, 512), "gptq", group_size=64, act_order=True).to(DEVICE)
    x = torch.randn(150, 512).half().to(DEVICE)  # act-order copies it, which is too much
    grids: list[int] = []
    real = launch.start

    def noting(plan: Plan, name: str, call: Any, *tensors: Any) -> None:
        grids.append(call.grid_x)
        real(plan, name, call, *tensors)

    monkeypatch.setattr(launch, "start", noting)
    assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p)
    assert grids[0] == 5 + 2, "all rows, which were declared, but need too much memory"
    assert set(grids[1:]) <= {2, 4}


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@dtypes
def test_scales_of_every_dtype(scales: torch.dtype, dtype: torch.dtype) -> None:
    """Scales from 2^-20 to 1: in float16 they are multiplied in 16 bits only if a file has them."""
    n, k, m = 48, 256, 20
    p = qk.quantize(torch.randn(n, k), "gptq", group_size=64, symmetric=False)
    tensors = dict(p.tensors)
    exponents = torch.linspace(-20, 0, tensors["scales"].numel())
    tensors["scales"] = (torch.rand(exponents.shape) + 1).mul(exponents.exp2()).reshape(
        tensors["scales"].shape
    ).to(scales)  # fmt: skip
    p = qk.pack("gptq", tensors, p.shape, **p.params).to(DEVICE)
    x = torch.randn(m, k).to(dtype).to(DEVICE)
    assert takes_hopper(p, m)
    assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p, None)


@pytest.mark.parametrize(
    ("name", "params"), [("gptq", {"bits": 8, "group_size": 64, "symmetric": False}), ("fp8", {})]
)
def test_scales_that_float16_has_not(name: str, params: dict[str, object]) -> None:
    """Below 2^-17, where float16 has too few bits for bfloat16 and float32 scales.

    Values, weights and x are positive, so that a scale's error does not average out.
    """
    n, k, m = 48, 256, 20
    p = qk.quantize(torch.rand(n, k) * 1e-3, name, **params)
    if name == "gptq":  # its quantizer makes no scales below 2^-14
        p = qk.quantize(torch.rand(n, k), name, **params)
        scales = ((torch.rand(p.tensors["scales"].shape) + 1) * 2.0**-19).bfloat16()
        p = qk.pack("gptq", {**p.tensors, "scales": scales}, p.shape, **p.params)
    p = p.to(DEVICE)
    x = torch.rand(m, k).half().to(DEVICE)
    assert takes_hopper(p, m)
    assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p, None)


TILES = [
    ("gptq", {"bits": 4, "group_size": 64, "symmetric": False}),
    ("gptq", {"bits": 3, "group_size": 128}),
    ("gptq", {"bits": 8, "group_size": 64}),
]


@pytest.mark.parametrize(("name", "params"), TILES, ids=str)
def test_several_tiles_a_block(name: str, params: dict[str, object], two_sms: None) -> None:
    """More work tiles than blocks, rings that wrap several times, edges of both W and x."""
    y, x, p, bias = weight_only.run(name, params, 200, 768, 300, torch.float16)
    assert_fused_close(y, x, p, bias)


def test_tiles_shorter_than_a_ring(two_sms: None) -> None:
    """No ring wraps between work tiles, so only the warpgroup's barrier keeps their rows apart."""
    y, x, p, bias = weight_only.run(
        "gptq", {"bits": 4, "group_size": 64}, 300, 64, 600, torch.float16
    )
    assert_fused_close(y, x, p, bias)


# ---------------------------------------------------------------------- between transforms
#: several blocks of W, with an edge; several tiles along K, of which the last is not whole
WIDE = [
    *(("quip", {"bits": bits}, 130, 390) for bits in (2, 3, 4)),
    *(("quip_sharp", {"bits": bits}, 260, 568) for bits in (2, 3, 4)),
]


@pytest.mark.parametrize(("name", "params", "n", "k"), incoherent.ODD + WIDE, ids=str)
@dtypes
def test_odd_shapes_between_transforms(
    name: str, params: dict[str, object], n: int, k: int, dtype: torch.dtype
) -> None:
    p = incoherent.any_weight(name, n, k, params)
    x, bias = torch.randn(131, k).to(dtype).to(DEVICE), torch.randn(n).to(dtype).to(DEVICE)
    assert takes_hopper(p, 131)
    assert_fused_close(qk.matmul(x, p, bias, backend="cuda"), x, p, bias)


@pytest.mark.parametrize(("name", "params", "n", "k"), WIDE, ids=str)
@dtypes
def test_products_between_transforms_round_in_float32_alone(
    name: str, params: dict[str, object], n: int, k: int, dtype: torch.dtype, two_sms: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Sums are scaled, not weights: QuIP's and 2-bit codes are exact, other values round once."""
    p = incoherent.any_weight(name, n, k, params)
    seen: dict[str, torch.Tensor] = {}
    before, after = transforms.before, transforms.after

    def keep_before(plan: Plan, x: Symbolic, *rest: Any) -> Symbolic:
        y = before(plan, x, *rest)
        plan.by_torch(lambda y: seen.update(x=y.clone()), y)
        return y

    def keep_after(plan: Plan, y: Symbolic, *rest: Any) -> None:
        plan.by_torch(lambda y: seen.update(y=y.clone()), y)
        after(plan, y, *rest)

    monkeypatch.setattr(transforms, "before", keep_before)
    monkeypatch.setattr(transforms, "after", keep_after)
    qk.matmul(torch.randn(150, k).to(dtype).to(DEVICE), p, backend="cuda")
    x, y = seen["x"].double(), seen["y"].double()
    if name == "quip_sharp":
        x = x[:, layout.codebook_order(k, DEVICE)]
    values = qk.formats.get(name).grid_values(p.tensors, p.shape, p.params).double()  # type: ignore[attr-defined]
    rounded = name == "quip_sharp" and params["bits"] != 2
    # A rounding for each feature's sum, one for the scale; one of the weight, if it has one
    bound = (k + 2) * 2.0**-24 + (incoherent.U[dtype] if rounded else 0)
    assert bool(((y - x @ values.T).abs() <= bound * (x.abs() @ values.abs().T)).all())


def test_calls_that_a_kernel_does_not_support_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 results of kernels without them, and vice versa; scales along K; a bias."""
    real = launch.start
    for name, field, value, why in (
        ("nf4", "is_float", 1, "float32 results for weights with transforms alone"),
        ("quip", "is_float", 0, "float32 results for weights with transforms alone"),
        ("quip", "group", 256, "made for one scale a row"),
        ("quip", "bias", 16, "and for no bias"),
    ):
        p = qk.quantize(torch.randn(4, 512), name).to(DEVICE)

        def other(
            plan: Plan, name: str, call: Any, *tensors: Any, field: str = field, value: int = value
        ) -> None:
            if isinstance(call, calls.WeightOnlyCall):
                setattr(call.args, field, value)
            real(plan, name, call, *tensors)

        monkeypatch.setattr(launch, "start", other)
        with pytest.raises(RuntimeError, match=why):
            qk.matmul(torch.randn(130, 512).half().to(DEVICE), p, backend="cuda")


@pytest.mark.parametrize("name", ["nf4", "quip", "quip_sharp"])
def test_rows_do_not_depend_on_m(name: str) -> None:
    p = qk.quantize(torch.randn(72, 256), name).to(DEVICE)
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
def test_several_eight_bit_tiles_a_block(
    name: str, params: dict[str, object], two_sms: None
) -> None:
    params = params | ({"activation": "dynamic"} if name == "fp8" else {})
    p = qk.quantize(torch.randn(301, 1100), name, **params).to(DEVICE)
    x = torch.randn(270, 1100).half().to(DEVICE)
    assert takes_hopper(p, 270)
    assert_close(qk.matmul(x, p, backend="cuda"), x, p)


# ---------------------------------------------------------------------- the launch
def test_tilings_fill_the_gpu_and_fit_in_the_workspace() -> None:
    p = qk.quantize(torch.randn(16, 128), "awq", group_size=64)
    traits = qk.formats.get("awq").weight_only_traits(p.shape, p.params)  # type: ignore[attr-defined]
    few = hopper.tiling_for((4096, 4096), 32, traits, 132)
    assert few.columns == 64
    assert few.k_slices * -(-4096 // hopper.ROWS) > 66
    many = hopper.tiling_for((4096, 4096), 1024, traits, 132)
    assert many == (128, 3, 132)  # of 176 blocks, 132 fill all SMs, and the others in three slices
    for m in (17, 200, 3000):
        columns, count, whole = hopper.tiling_for((1024, 28672), m, traits, 132)
        cut = -(-1024 // hopper.ROWS) * -(-m // columns) - whole
        assert count == 1 or count * cut * hopper.ROWS * columns * 4 <= workspace.BYTES


@pytest.mark.skipif(DEVICE == "cuda", reason="emulates a GPU that this machine does not have")
def test_a_kernel_without_a_body_fails() -> None:
    """Such as one that is compiled for plain sm_90, which has no wgmma."""
    emulation.DEFINES.append("QK_EMULATED_ARCH=800")
    p = qk.quantize(torch.randn(32, 128), "fp8", activation="dynamic")
    with pytest.raises(RuntimeError, match="that is not for this GPU"):
        qk.matmul(torch.randn(300, 128).half(), p, backend="cuda")


def test_fewer_rows_and_other_gpus_take_other_kernels() -> None:
    p = qk.quantize(torch.randn(16, 128), "awq", group_size=64).to(DEVICE)
    assert not takes_hopper(p, 16)
    problem = qk.backends.problem.problem_of(p, 512, torch.float16, torch.device(DEVICE), False)
    assert "sm_90" in str(hopper.rejects(problem._replace(capability=(10, 0))))
    assert hopper.rejects(problem._replace(capability=(9, 0))) is None
    assert eight_bit.configure("e4m3", (256, 256), 512, False, 8, hopper=False).rows > 0
    assert eight_bit.configure("e4m3", (256, 256), 512, False, 8, hopper=True).rows == 0
    assert eight_bit.configure("e4m3", (256, 256), 512, True, 8, hopper=True).rows > 0
