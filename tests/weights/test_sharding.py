"""Parts of packed weights: the whole's values, and an error if a cut would break a group."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk
from qkernels.weights.sharding import COLUMNS, ROWS, join_rows, narrow, shard

from ..conftest import DEVICE, all_cases


@all_cases
@pytest.mark.parametrize("dim", [ROWS, COLUMNS])
@pytest.mark.parametrize("prepacked", [False, True])
def test_parts_are_the_whole(
    name: str, params: dict[str, object], dim: int, prepacked: bool
) -> None:
    # multiples of every group, block and word of the formats, times three parts
    p = qk.quantize(
        torch.randn(384, 768 if params.get("block_size") != 4096 else 12288), name, **params
    )
    unit = qk.formats.get(name).cuts(p.shape, p.params)[dim]
    if p.shape[dim] % (3 * unit):
        with pytest.raises(ValueError, match="expected .* to be a multiple of 3 parts times"):
            shard(p, dim, 0, 3)
        return
    whole = p.dequantize(torch.float64)
    if prepacked and (layout := qk.formats.get(name).kernel_layout(p.params)):
        p.prepack_(layout)
    parts = [shard(p, dim, i, 3) for i in range(3)]
    assert torch.equal(torch.cat([part.dequantize(torch.float64) for part in parts], dim), whole)
    assert all(part.format == name for part in parts)
    # Only tensors that every part needs are stored more than once.
    more = 1.25 if params.get("double_quant") else 1.1  # its second level is undone
    if params.get("act_order") and dim == COLUMNS:
        more = 1.6  # several parts have columns of one group, and each has the group's scales
    assert sum(part.nbytes for part in parts) < p.nbytes * more + 3 * 2000
    x = torch.randn(3, parts[1].shape[1]).to(DEVICE)
    y = qk.matmul(x, parts[1].to(DEVICE), backend="reference")
    if qk.formats.get(name).kernel_layout(p.params) != "eight_bit":
        # The bound of a sum of K products in float32, in any order: K * 2^-24 of the sum of their
        # absolute values. A second product in float32 is no judge, because another memory layout of
        # the same weight moves it by three times assert_close's limits.
        weight = parts[1].to(DEVICE).dequantize(torch.float64).T
        bound = parts[1].shape[1] * 2.0**-24 * (x.double().abs() @ weight.abs())
        assert bool(((y.double() - x.double() @ weight).abs() <= bound).all())


@pytest.mark.parametrize(
    ("name", "params", "dim", "count", "message"),
    [
        (
            "gptq",
            {"group_size": 64},
            COLUMNS,
            8,
            r"expected 256 to be a multiple of 8 parts times 64.*: 1, 2, 4$",
        ),
        ("gptq", {"bits": 3, "group_size": 64}, ROWS, 4, "multiple of 4 parts times 32.*: 1, 3$"),
        (
            "awq",
            {"group_size": 64},
            ROWS,
            5,
            r"expected 96 .* 5 parts times 8.*: 1, 2, 3, 4, 6, 12$",
        ),
        ("nf4", {"block_size": 512}, COLUMNS, 2, "multiple of 2 parts times 256.*: 1$"),
        ("fp8", {"granularity": "block"}, ROWS, 2, "multiple of 2 parts times 128.*: 1$"),
        ("w8a8", {}, ROWS, 5, "expected 96 to be a multiple of 5 parts times 1"),
    ],
)
def test_cuts_that_would_break_something(
    name: str, params: dict[str, object], dim: int, count: int, message: str
) -> None:
    p = qk.quantize(torch.randn(96, 256), name, **params)
    with pytest.raises(ValueError, match=message):
        shard(p, dim, 0, count)


def test_narrow_takes_any_range_between_cuts() -> None:
    p = qk.quantize(torch.randn(20, 300), "fp8", granularity="block")
    with pytest.raises(
        ValueError, match="fp8: rows: expected to be cut at multiples of 128, got 0..9 of 20"
    ):
        narrow(p, ROWS, 0, 10)
    assert torch.equal(narrow(p, COLUMNS, 256, 300).dequantize(), p.dequantize()[:, 256:])
    with pytest.raises(ValueError, match="0 <= begin < end <= 300"):
        narrow(p, COLUMNS, 128, 301)
    nested = qk.quantize(torch.randn(64, 512), "nf4", double_quant=True)
    for begin, end in ((0, 32), (32, 64), (8, 24), (1, 64)):
        part = narrow(nested, ROWS, begin, end)
        assert part.params["double_quant"] == (begin % 32 == 0), (
            "undone only where a block of 256 is cut"
        )
        assert torch.equal(part.dequantize(), nested.dequantize()[begin:end])
    with pytest.raises(ValueError, match=r"index: expected 0 <= index < 2, got 2"):
        shard(p, ROWS, 2, 2)


@pytest.mark.parametrize("name", ["gptq", "pack_quantized"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_columns_in_act_order_keep_every_group_they_have(name: str, count: int) -> None:
    p = qk.quantize(torch.randn(64, 768), name, group_size=64, act_order=True, symmetric=False)
    parts = [shard(p, COLUMNS, i, count) for i in range(count)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts], 1), p.dequantize())
    for part in parts:
        assert part.shape[1] // part.params["group_size"] >= 12, (
            "all twelve groups have columns everywhere"
        )
        x = torch.randn(2, part.shape[1])
        want = x.double() @ part.dequantize(torch.float64).T
        torch.testing.assert_close(qk.matmul(x, part).double(), want, atol=1e-3, rtol=1e-4)
        tensors = part.tensors
        part.prepack_("weight_only")
        assert all(torch.equal(t, part.tensors[key]) for key, t in tensors.items())


def _alone(name: str, params: dict[str, object]) -> bool:
    """Whether two weights of random values have something that one weight has once."""
    if name in ("nf4", "fp4", "pack_quantized", "spqr", "quip", "quip_sharp"):
        return True  # state their shape, or have signs of their own
    return bool(params.get("act_order")) or params.get("granularity") == "tensor"


@all_cases
def test_rows_joined_are_the_parts(name: str, params: dict[str, object]) -> None:
    k = 768 if params.get("block_size") != 4096 else 12288
    parts = [qk.quantize(torch.randn(n, k), name, **params) for n in (256, 128)]
    joined = join_rows(parts)
    assert (joined is None) == _alone(name, params)
    if joined is not None:
        assert joined.shape == (384, k)
        want = torch.cat([p.dequantize(torch.float64) for p in parts])
        assert torch.equal(joined.dequantize(torch.float64), want)
        assert joined.nbytes <= sum(p.nbytes for p in parts)


def test_rows_that_cannot_be_joined() -> None:
    gptq = [qk.quantize(torch.randn(32, 64), "gptq", group_size=size) for size in (32, 64)]
    assert join_rows(gptq) is None, "other parameters"
    assert join_rows([gptq[0], qk.quantize(torch.randn(32, 64), "q8_0")]) is None, "other formats"
    assert join_rows([gptq[0], qk.quantize(torch.randn(32, 128), "gptq", group_size=32)]) is None, (
        "other K"
    )
    blocks = [qk.quantize(torch.randn(100, 128), "fp8", granularity="block") for _ in range(2)]
    assert join_rows(blocks) is None, "rows end within a block"
    assert join_rows([gptq[0]]).dequantize().equal(gptq[0].dequantize())
