"""The decode kernel where a tile, a group or a weight ends, and in the order of its sums."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk

from ..conftest import DEVICE
from ..reference import assert_fused_close

pytestmark = pytest.mark.usefixtures("without_wgmma", "poisoned")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 2, 9])
def test_groups_of_any_size_are_looked_up(bits: int, m: int) -> None:
    """A tile of 8-bit codes has four slices, as many as there may be scale groups in a row."""
    p = qk.quantize(torch.randn(64, 256), "gptq", bits=bits, group_size=64, act_order=True)
    tensors, k = dict(p.tensors), torch.arange(256)
    tensors["g_idx"] = ((k % 5 == 0) * 1 + (k % 7 == 0) * 2).int()
    p = qk.pack("gptq", tensors, shape=(64, 256), bits=bits, group_size=64, act_order=True)
    p, x = p.to(DEVICE), torch.randn(m, 256).half().to(DEVICE)
    y = qk.matmul(x, p, backend="cuda")
    assert "slice_group" in p.storage
    assert_fused_close(y, x, p)


def test_few_rows_of_w_do_not_depend_on_m() -> None:
    """The GEMM takes them. It would cut K as the number of its blocks wants it."""
    p = qk.quantize(torch.randn(24, 8960), "gptq", group_size=128).to(DEVICE)
    x = torch.randn(130, 8960).bfloat16().to(DEVICE)
    y = qk.matmul(x, p, backend="cuda", batch_invariant=True)
    assert_fused_close(y, x, p)
    for m in (1, 17, 64, 65):
        assert torch.equal(qk.matmul(x[:m], p, backend="cuda", batch_invariant=True), y[:m]), m


@pytest.mark.parametrize("size", [45, 70])
def test_a_single_group_that_ends_inside_a_slice(size: int) -> None:
    p = qk.quantize(torch.randn(64, size), "spqr", bits=4, group_size=size, row_group=16).to(DEVICE)
    for m in (1, 2):
        x = torch.randn(m, size).half().to(DEVICE)
        assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p)


def test_scales_of_many_rows() -> None:
    """The last row of the first scale's, where the quotient without division is one too large."""
    rows = 32950
    weight = torch.randn(rows + 1, 16)
    weight[-1] *= 100
    p = qk.quantize(weight, "fp8", granularity="block", block_rows=rows, block_columns=16)
    p, x = p.to(DEVICE), torch.randn(1, 16).half().to(DEVICE)
    assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p)
