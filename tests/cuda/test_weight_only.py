"""The CUDA weight-only kernels against the float64 oracle: emulated, or on a GPU."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk
from qkernels import counters
from qkernels.backends.cuda import weight_only as launcher
from qkernels.layouts import codecs

from ..conftest import CASES, DEVICE, case_id, k_of, layout_of
from ..kernels.test_weight_only import ODD, SHORT
from ..reference import assert_fused_close, every_power
from . import conftest as emulation

pytestmark = pytest.mark.usefixtures("without_wgmma", "poisoned")
FAMILY = [case for case in CASES if layout_of(*case) == "weight_only"]


def has_kernel(name: str, params: dict[str, object]) -> bool:
    fmt, shape = qk.formats.get(name), (40, k_of(name, 192))
    stored = {key: value for key, value in params.items() if key not in fmt.quantize_only}
    traits = fmt.weight_only_traits(shape, fmt.resolve(shape, stored))
    return codecs.cuda_kernel(traits.codes, traits.scaler) is not None


FUSED = [case for case in FAMILY if has_kernel(*case)]
fused_cases = pytest.mark.parametrize(("name", "params"), FUSED, ids=map(case_id, FUSED))
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def run(name, params, n, k, m, dtype, with_bias=True, **options):
    p = qk.quantize(torch.randn(n, k), name, **params).to(DEVICE)
    x = torch.randn(m, k).to(dtype).to(DEVICE)
    bias = torch.randn(n).to(dtype).to(DEVICE) if with_bias else None
    return qk.matmul(x, p, bias, backend="cuda", **options), x, p, bias


def test_every_format_has_a_kernel() -> None:
    assert FUSED == FAMILY


def test_what_has_no_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    row_scale = codecs.SCALES["row_scale"]._replace(codes=("half_integer3",))
    monkeypatch.setitem(codecs.SCALES, "row_scale", row_scale)
    p = qk.quantize(torch.randn(8, 256), "quip", bits=2).to(DEVICE)
    with pytest.raises(
        ValueError, match="no CUDA kernel for 2-bit half_integer codes with scales 'row_scale'"
    ):
        qk.matmul(torch.randn(2, 256).half().to(DEVICE), p, backend="cuda")


@fused_cases
@dtypes
@pytest.mark.parametrize("m", [1, 7, 13, 33])
def test_every_format(name: str, params: dict[str, object], m: int, dtype: torch.dtype) -> None:
    """N is between one and two blocks of 64 rows of W, which take one row of x, and of 32 rows."""
    y, x, p, bias = run(name, params, 72 if m == 1 else 40, k_of(name, 192), m, dtype)
    assert p.layout == "weight_only"
    assert_fused_close(y, x, p, bias)


#: blocks that end between the two features of a pair
SPLIT_PAIRS = [
    ("nf4", {"block_size": 64}, 37, 45),
    ("fp4", {"block_size": 32, "double_quant": True}, 20, 51),
]


#: N ends inside a block; K is a single block, or ends inside a tile; groups of SpQR cross slices
ONE_SCALER = [
    ("q4_0", {}, 3, 32), ("q5_1", {}, 37, 160), ("q8_0", {}, 21, 96),
    ("q2_k", {}, 19, 256), ("q6_k", {}, 9, 256),
    ("spqr", {"group_size": 10, "row_group": 7}, 33, 70),
    ("spqr", {"bits": 4, "group_size": 144, "row_group": 16, "threshold": 0.01}, 21, 144),
    ("spqr", {"bits": 2, "group_size": 1, "row_group": 1}, 5, 9),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "n", "k"), ODD + SPLIT_PAIRS + ONE_SCALER, ids=str)
@dtypes
def test_odd_shapes(
    name: str, params: dict[str, object], n: int, k: int, dtype: torch.dtype
) -> None:
    """N is below 32, where the GEMM takes any M, and 64 more."""
    for m, rows in ((5, n), (1, n + 64), (11, n + 64), (17, n)):
        y, x, p, bias = run(name, params, rows, k, m, dtype)
        assert_fused_close(y, x, p, bias)


@pytest.mark.parametrize(("name", "params", "n", "k"), SHORT, ids=str)
@dtypes
def test_short_last_groups(
    name: str, params: dict[str, object], n: int, k: int, dtype: torch.dtype
) -> None:
    """In each kernel. The emulator reports reads past the last scale."""
    for m, rows in ((1, n + 64), (3, n + 32), (17, n)):
        y, x, p, bias = run(name, params, rows, k, m, dtype)
        assert_fused_close(y, x, p, bias)


@pytest.mark.parametrize("m", [2, 9])
@pytest.mark.parametrize("k", [576, 580], ids=["along-k", "flat"])
def test_nested_scales_of_several_outer_blocks(m: int, k: int) -> None:
    """More than 256 blocks of absmax need several outer scales; the weights make them differ."""
    weight = torch.randn(64, k) * torch.linspace(0.1, 10, 64)[:, None]
    p = qk.quantize(weight, "nf4", block_size=64, double_quant=True).to(DEVICE)
    x = torch.randn(m, k).half().to(DEVICE)
    assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p)


def test_x_that_starts_anywhere() -> None:
    """A slice of a larger tensor may be less aligned than the kernels' loads."""
    p = qk.quantize(torch.randn(64, 64), "gptq", group_size=32).to(DEVICE)
    for m in (1, 3, 10, 20):
        x = torch.randn(m * 64 + 1).half().to(DEVICE)[1:].view(m, 64)
        assert x.data_ptr() % 4 != 0
        assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p)


@dtypes
@pytest.mark.parametrize("m", [16, 65])
def test_gemm_of_several_blocks(m: int, dtype: torch.dtype) -> None:
    y, x, p, bias = run("gptq", {"bits": 4, "group_size": 64}, 72, 256, m, dtype)
    assert_fused_close(y, x, p, bias)


LONG = [
    ("gptq", {"bits": 4, "group_size": 128}), ("gptq", {"bits": 2, "group_size": 64}), ("nf4", {}),
    ("q5_k", {}), ("spqr", {"threshold": 0.05}),
]  # fmt: skip
#: not a multiple of a tile where the format allows it
LONG_K = {"nf4": 4500, "q5_k": 2048, "spqr": 3600}


def k_slices(p: qk.PackedWeight, m: int) -> int:
    words = str(qk.explain(p, m, backend="cuda"))
    return int(words.split("K in ")[1].split(" slices")[0])


@pytest.mark.parametrize("m", [1, 3, 9, 17])
@pytest.mark.parametrize(("name", "params"), LONG, ids=str)
def test_split_k_in_any_order_of_blocks(name: str, params: dict[str, object], m: int) -> None:
    """Split-K is right, and bitwise the same whichever block is last. The counters end at 0."""
    y, x, p, bias = run(name, params, 70, LONG_K.get(name, 4480), m, torch.float16)
    assert k_slices(p, m) > 1
    assert_fused_close(y, x, p, bias)
    for order in (1, 2, 3):
        emulation.ORDER[0] = order
        assert torch.equal(qk.matmul(x, p, bias, backend="cuda"), y)
    assert not counters.region(x.device, 1).any()


@fused_cases
@pytest.mark.parametrize("n", [24, 40])
def test_rows_do_not_depend_on_m(name: str, params: dict[str, object], n: int) -> None:
    """The GEMM takes weights of fewer than 32 rows."""
    dtype, k = torch.bfloat16, k_of(name, 1152)
    p = qk.quantize(torch.randn(n, k), name, **params).to(DEVICE)
    x = torch.randn(19, k).to(dtype).to(DEVICE)
    full = qk.matmul(x, p, backend="cuda", batch_invariant=True)
    assert_fused_close(full, x, p)
    for m in (1, 2, 7, 8, 9, 16, 17):
        assert torch.equal(qk.matmul(x[:m], p, backend="cuda", batch_invariant=True), full[:m]), (
            f"M={m}"
        )


@pytest.mark.parametrize(("kib", "warps"), [(227, 8), (163, 4), (99, 2)])
@pytest.mark.parametrize(("name", "params"), LONG, ids=str)
def test_shared_memory_decides_the_warps_of_a_block(
    name: str, params: dict[str, object], kib: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an H100, an A100 and the smallest GPU. NF4 takes most, for its table."""
    monkeypatch.setattr(launcher, "device_shared_bytes", lambda device: kib * 1024)
    monkeypatch.setattr(launcher, "sm_count", lambda device: 1)
    launcher.warps_for.cache_clear()
    for m in (1, 6, 12):
        y, x, p, bias = run(name, params, 70, k_of(name, 1024), m, torch.float16)
        assert_fused_close(y, x, p, bias)
        words = str(qk.explain(p, m, backend="cuda"))
        got = int(words.split("a block of ")[1].split(" warps")[0])
        assert got == warps if name == "nf4" else got >= warps
    launcher.warps_for.cache_clear()


def test_scales_with_zero_points_of_any_dtype() -> None:
    """float32 scales are looked up; those of 16 bits have kernels of their own."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = dict(qk.quantize(torch.randn(72, 256), "gptq", group_size=64).tensors)
        tensors["scales"] = tensors["scales"].to(dtype)
        p = qk.pack("gptq", tensors, shape=(72, 256), group_size=64).to(DEVICE)
        for m in (1, 4, 12):
            x = torch.randn(m, 256).bfloat16().to(DEVICE)
            assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p)


def test_many_rows_go_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkernels.backends.cuda.weight_only.MAX_ROWS", 16)
    y, x, p, bias = run("gptq", {"group_size": 32}, 40, 64, 35, torch.float16, batch_invariant=True)
    assert_fused_close(y, x, p, bias)


def with_outliers(weight: torch.Tensor, counts: torch.Tensor, first: int) -> qk.PackedWeight:
    """`weight` in SpQR with random outliers: counts[n] in row n, in columns from `first` on."""
    shape = (weight.shape[0], weight.shape[1])
    tensors = dict(qk.quantize(weight, "spqr", bits=4, group_size=16).tensors)
    columns = [
        first + torch.randperm(shape[1] - first)[:count].sort().values for count in counts.tolist()
    ]
    values = torch.randn(int(counts.sum())).half().view(torch.int16).int()
    tensors["row_offsets"] = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    tensors["col_vals"] = (values << 16) | torch.cat(columns).int()
    return qk.pack("spqr", tensors, shape=shape, bits=4, group_size=16).to(DEVICE)


@pytest.mark.parametrize("m", [2, 9])
def test_weights_that_are_all_outliers_or_none(m: int) -> None:
    """SpQR's sparse weights with codes of 0: rows with all weights sparse, with none, with many."""
    counts = torch.randint(0, 40, (18,))
    counts[1], counts[-1] = 96, 0
    p = with_outliers(torch.zeros(18, 96), counts, 0)
    x = torch.randn(m, 96).half().to(DEVICE)
    y = qk.matmul(x, p, backend="cuda")
    assert y.abs().max() > 1
    assert_fused_close(y, x, p)


def test_one_input_that_is_infinite_stays_with_its_row() -> None:
    """Reads for outliers that do not exist must not make NaN, and must not reach other rows."""
    p = with_outliers(torch.randn(20, 96), torch.arange(20), 1)
    for m in (3, 11):
        x = torch.randn(m, 96).half().to(DEVICE)
        want = qk.matmul(x, p, backend="cuda")
        x[1, 0] = float("inf")
        y = qk.matmul(x, p, backend="cuda")
        others = [i for i in range(m) if i != 1]
        assert torch.equal(y[others], want[others])
        assert m == 3 or bool(y[1].isinf().all())  # few rows: scale * inf - minimum * inf


def test_uneven_groups_of_act_order() -> None:
    p = qk.quantize(torch.randn(32, 64), "gptq", group_size=32, act_order=True)
    tensors = dict(p.tensors)
    tensors["g_idx"] = (torch.arange(64) % 5 == 0).to(torch.int32)
    p = qk.pack("gptq", tensors, shape=(32, 64), group_size=32, act_order=True).to(DEVICE)
    x = torch.randn(4, 64).half().to(DEVICE)
    assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p)


def test_auto_prefers_others_and_explain_says_why() -> None:
    p = qk.quantize(torch.randn(32, 64), "nf4").to(DEVICE)
    assert "cuda.weight_only_decode: not compiled yet" in str(qk.explain(p, 1))
    assert "K in 1 slices" in str(qk.explain(p, 1, backend="cuda"))


@pytest.mark.parametrize("m", [8, 512])
def test_every_power_of_two_as_a_scale(m: int) -> None:
    """As in tests/kernels/test_decoders.py, by the decode kernel and the GEMM."""
    p = every_power("mxfp4").to(DEVICE)
    x = torch.eye(512, dtype=torch.bfloat16, device=DEVICE)
    weight = p.dequantize(torch.bfloat16).T
    for first in range(0, 512, m):
        y = qk.matmul(x[first : first + m], p, backend="cuda")
        assert torch.equal(y, weight[first : first + m])
