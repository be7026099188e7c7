"""The fused weight-only kernel against the float64 oracle: formats, odd shapes, both dtypes."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk

from ..conftest import CASES, DEVICE, case_id, k_of, layout_of
from ..reference import assert_fused_close

pytest.importorskip("triton")

FUSED = [case for case in CASES if layout_of(*case) == "weight_only"]
fused_cases = pytest.mark.parametrize(("name", "params"), FUSED, ids=map(case_id, FUSED))
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


pytestmark = pytest.mark.usefixtures("poisoned_outputs")


#: one row, odd counts, and both sides of the bounds where shape class and block size change
ROWS = (1, 3, 16, 17, 65)


def packed(name, params, n, k, dtype, with_bias=True):
    p = qk.quantize(torch.randn(n, k), name, **params).to(DEVICE)
    return p, torch.randn(n).to(dtype).to(DEVICE) if with_bias else None


def assert_right(p, bias, m, dtype):
    x = torch.randn(m, p.shape[1]).to(dtype).to(DEVICE)
    assert_fused_close(qk.matmul(x, p, bias, backend="triton"), x, p, bias)


@fused_cases
def test_every_format(name: str, params: dict[str, object]) -> None:
    """One weight serves all M and dtypes, so it is packed once. N ends inside a tile, and so does
    K, if the format allows it.
    """
    p, _ = packed(name, params, 72, k_of(name, 192), torch.float16)
    for m in ROWS:
        for dtype in (torch.float16, torch.bfloat16):
            assert_right(p, torch.randn(72).to(dtype).to(DEVICE), m, dtype)
    assert p.layout == "weight_only"


@dtypes
def test_each_scale_group_of_a_tile_has_its_own_sums(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two dots a tile, each with its own scale: no group may use the other's scale or zero."""
    from qkernels.backends.triton import weight_only

    p, bias = packed("gptq", {"bits": 4, "group_size": 64, "symmetric": False}, 72, 640, dtype)
    seen, real = [], weight_only.post_scale
    monkeypatch.setattr(
        weight_only,
        "post_scale",
        lambda *a: seen.append((weight_only._scale_groups(a[0]), real(*a))) or seen[-1][1],
    )
    for m in (9, 16):
        assert_right(p, bias, m, dtype)
    if DEVICE == "cpu":  # some GPUs' configurations scale weights instead
        assert seen == [(2, True), (2, True)]


@pytest.mark.parametrize(
    ("name", "params", "rows"),
    [
        ("nf4", {"block_size": 64}, 8),
        ("q4_k", {}, 4),  # mins
        ("gptq", {"bits": 4, "group_size": 32, "act_order": True}, 4),  # zero points
        ("gptq", {"bits": 2, "group_size": 128}, 8),
        ("q6_k", {}, 2),
        ("q2_k", {}, 1),
        ("spqr", {"bits": 4}, 2),  # zero points that are no integers; outliers, added once
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@dtypes
def test_unused_columns_hold_other_scale_groups(
    name: str,
    params: dict[str, object],
    rows: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to `rows` rows; batch-invariant mode and products of more rows do not fold."""
    from qkernels.backends.triton import weight_only

    p, bias = packed(name, params, 72, k_of(name, 640), dtype)
    seen, real = [], weight_only.folded
    monkeypatch.setattr(weight_only, "folded", lambda *a: seen.append(real(*a)) or seen[-1])
    for m in {1, rows, rows + 1, 17}:
        assert_right(p, bias, m, dtype)
        assert seen.pop() == (m <= rows), m
    qk.matmul(
        torch.randn(1, p.shape[1]).to(dtype).to(DEVICE), p, backend="triton", batch_invariant=True
    )
    assert not seen.pop()


ODD = [
    # K that ends inside a tile and inside a slice, N that ends inside a block, blocks across rows.
    ("gptq", {"bits": 4, "group_size": -1}, 40, 88),
    ("gptq", {"bits": 3, "group_size": 10}, 33, 70),
    ("gptq", {"bits": 4, "group_size": 8, "act_order": True}, 24, 40),
    ("gptq", {"bits": 2, "group_size": 16}, 16, 16),
    ("gptq", {"bits": 8, "group_size": -1}, 1, 1),
    ("awq", {"group_size": 20}, 8, 60),
    ("nf4", {"block_size": 64}, 7, 9),
    ("nf4", {"block_size": 32, "double_quant": True}, 70, 100),
    ("nf4", {"block_size": 64, "double_quant": True}, 3, 17),
    ("nf4", {"block_size": 128}, 65, 80),
    ("fp4", {"block_size": 1024}, 9, 576),
]


#: weights whose last group is short: it ends inside a tile, at a slice or not, or is the only group
SHORT = [
    ("gptq", {"group_size": 128, "symmetric": False}, 24, 576),
    ("gptq", {"group_size": 128, "act_order": True, "symmetric": False}, 24, 576),
    ("gptq", {"bits": 8, "group_size": 128}, 21, 192),
    ("gptq", {"bits": 3, "group_size": 128, "symmetric": False}, 20, 96),
    ("gptq", {"bits": 2, "group_size": 64, "symmetric": False}, 20, 272),
    ("gptq", {"group_size": 24, "symmetric": False}, 24, 80),
    ("gptq", {"group_size": 24, "act_order": True, "symmetric": False}, 24, 80),
    ("gptq", {"group_size": 300}, 8, 80),
    ("pack_quantized", {"group_size": 32, "symmetric": False}, 9, 75),
]


@pytest.mark.parametrize(("name", "params", "n", "k"), SHORT, ids=str)
def test_short_last_groups(name: str, params: dict[str, object], n: int, k: int) -> None:
    p, _ = packed(name, params, n, k, torch.float16)
    p.prepack_("weight_only")
    size = params["group_size"]
    whole = not params.get("act_order") and (size % 16 == 0 or size >= k)  # type: ignore[operator]
    assert ("perm" in p.storage) != whole, "features are only moved if slices would have two scales"
    # NaN behind the last scale and 255 behind the last zero, so that a read there shows.
    for key, behind in (("scaler.scales", float("nan")), ("scaler.zeros", 255)):
        tensor = p.storage[key]
        longer = torch.full((2 * tensor.numel(),), behind, dtype=tensor.dtype, device=tensor.device)
        p.storage[key] = longer[: tensor.numel()].view(tensor.shape).copy_(tensor)
    for m in (1, 3, 17):
        for dtype in (torch.float16, torch.bfloat16):
            assert_right(p, torch.randn(n).to(dtype).to(DEVICE), m, dtype)


@pytest.mark.parametrize(("name", "params", "n", "k"), ODD, ids=str)
@dtypes
def test_odd_shapes(
    name: str, params: dict[str, object], n: int, k: int, dtype: torch.dtype
) -> None:
    assert_right(*packed(name, params, n, k, dtype), 5, dtype)


@pytest.mark.parametrize(("name", "params", "n", "k"), ODD + SHORT, ids=str)
def test_prepack_is_invertible_on_odd_shapes(
    name: str, params: dict[str, object], n: int, k: int
) -> None:
    p = qk.quantize(torch.randn(n, k), name, **params)
    before = {key: t.clone() for key, t in p.tensors.items()}
    after = p.prepack_("weight_only").tensors
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


def test_uneven_groups_of_act_order() -> None:
    """A g_idx that is no permutation of equal groups is legal and takes the same kernel."""
    p = qk.quantize(torch.randn(32, 64), "gptq", group_size=32, act_order=True)
    tensors = dict(p.tensors)
    tensors["g_idx"] = (torch.arange(64) % 5 == 0).to(torch.int32)
    p = qk.pack("gptq", tensors, shape=(32, 64), group_size=32, act_order=True).to(DEVICE)
    x = torch.randn(4, 64).half().to(DEVICE)
    assert_fused_close(qk.matmul(x, p, backend="triton"), x, p)
    assert torch.equal(p.tensors["g_idx"].cpu(), tensors["g_idx"])


def test_leading_dimensions_and_strided_x() -> None:
    p = qk.quantize(torch.randn(40, 64), "gptq", group_size=32).to(DEVICE)
    x = torch.randn(2, 64, 3).half().to(DEVICE).transpose(1, 2)
    y = qk.matmul(x, p, backend="triton")
    assert y.shape == (2, 3, 40)
    assert_fused_close(y.reshape(6, 40), x.reshape(6, 64), p)


def test_same_input_same_bits() -> None:
    p = qk.quantize(torch.randn(72, 192), "nf4", double_quant=True).to(DEVICE)
    x = torch.randn(5, 192).half().to(DEVICE)
    first = qk.matmul(x, p, backend="triton")
    assert all(torch.equal(first, qk.matmul(x, p, backend="triton")) for _ in range(3))
