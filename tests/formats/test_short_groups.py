"""If group_size does not divide K, the last group is short, as AutoGPTQ stores it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import qkernels as qk
from qkernels.formats.grid import default_group_size
from qkernels.models.convert import convert_weight
from qkernels.weights.sharding import COLUMNS, ROWS, narrow, shard

from .test_pack_quantized import _theirs

#: N, K and group_size: behind whole groups, a single one, one of a single feature, K that ends
#: inside a word
SHAPES = [(64, 576, 128), (32, 192, 128), (32, 96, 128), (32, 80, 24), (32, 65, 64), (32, 75, 32)]


# ---------------------------------------------------------------------- GPTQ, against numpy
def stream(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Pack codes (R, C) into int32 words (words, C), down each column, the lowest bits first."""
    planes = (codes[:, None] >> np.arange(bits)[:, None] & 1).reshape(-1, codes.shape[1])
    planes = np.pad(planes, ((0, -len(planes) % 32), (0, 0))).reshape(-1, 32, codes.shape[1])
    words = (planes.astype(np.uint64) << np.arange(32, dtype=np.uint64)[:, None]).sum(1)
    return words.astype(np.uint32).view(np.int32)


def checkpoint(
    n: int, k: int, size: int, bits: int, shift: int, shuffled: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """AutoGPTQ's tensors of a random weight, and the weight in float64.

    shift: subtracted from the stored zeros.
    """
    rng = np.random.default_rng(torch.initial_seed())
    count = -(-k // size)
    codes = rng.integers(0, 2**bits, (k, n))
    zeros = rng.integers(1, 2**bits, (count, n))
    scales = (rng.random((count, n)) * 0.02 + 0.01).astype(np.float16)
    g_idx = np.arange(k) // size
    if shuffled:
        rng.shuffle(g_idx)
    weight = (scales[g_idx].astype(np.float64) * (codes - zeros[g_idx])).T
    tensors = {
        "qweight": stream(codes, bits),
        "qzeros": stream((zeros - shift).T, bits).T,
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}, torch.from_numpy(
        weight.copy()
    )


@pytest.mark.parametrize(("n", "k", "size"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_reads_what_autogptq_writes(
    n: int, k: int, size: int, bits: int, act_order: bool
) -> None:
    for shift, written in ((1, "gptq"), (0, "gptq_v2")):
        tensors, want = checkpoint(n, k, size, bits, shift, act_order)
        params = {"bits": bits, "group_size": size, "act_order": act_order, "symmetric": False}
        p = qk.pack("gptq", tensors, (n, k), checkpoint_format=written, **params)
        assert torch.equal(p.dequantize(torch.float64), want)
        x = torch.randn(3, k, dtype=torch.float64)
        torch.testing.assert_close(qk.matmul(x, p, backend="reference"), x @ want.T)
        before = {name: t.clone() for name, t in tensors.items()}
        after = p.prepack_("weight_only").tensors
        assert all(torch.equal(before[name], after[name]) for name in before)
        if not act_order:
            del tensors["g_idx"]
            assert torch.equal(
                qk.pack("gptq", tensors, (n, k), checkpoint_format=written, **params).dequantize(),
                p.dequantize(),
            )


def test_gptq_says_how_many_scales_there_are_to_be() -> None:
    tensors, _ = checkpoint(32, 192, 128, 4, 1, False)
    less = {**tensors, "scales": tensors["scales"][:1], "qzeros": tensors["qzeros"][:1]}
    with pytest.raises(ValueError, match=r"qzeros: expected shape \(2, 4\), got \(1, 4\)"):
        qk.pack("gptq", less, (32, 192), group_size=128)
    with pytest.raises(ValueError, match=r"g_idx: expected values in \[0, 2\), got 0..2"):
        qk.pack(
            "gptq",
            {**tensors, "g_idx": tensors["g_idx"] * 2},
            (32, 192),
            group_size=128,
            act_order=True,
        )


# ---------------------------------------------------------------------- against compressed-tensors
@pytest.mark.parametrize(("k", "size"), [(shape[1], shape[2]) for shape in SHAPES])
@pytest.mark.parametrize(
    ("bits", "symmetric"), [(4, True), (4, False), (3, False), (5, False), (8, True)]
)
def test_pack_quantized_reads_what_compressed_tensors_packs(
    k: int, size: int, bits: int, symmetric: bool
) -> None:
    """Their compressor refuses such K, though the format stores ceil(K / group_size) scales.

    So the test gives it zeros behind the last feature, and packs its codes without those by its own
    function.
    """
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    from compressed_tensors.quantization.lifecycle.initialize import (
        initialize_module_for_quantization,
    )

    weight = torch.randn(40, k)
    padded = torch.nn.functional.pad(weight, (0, -k % size))
    compressor, scheme, theirs = _theirs(padded, bits, size, symmetric)
    want = compressor.decompress(dict(theirs), scheme)["weight"][:, :k]
    codes = packing.unpack_from_int32(theirs["weight_packed"], bits, torch.Size(padded.shape))
    theirs["weight_packed"] = packing.pack_to_int32(codes[:, :k].contiguous(), bits)
    theirs["weight_shape"] = torch.tensor([40, k])
    linear = torch.nn.Linear(k, 40, bias=False)
    initialize_module_for_quantization(linear, scheme)
    assert theirs["weight_scale"].shape == linear.weight_scale.shape
    params = {"bits": bits, "group_size": size, "symmetric": symmetric}
    p = qk.pack("pack_quantized", theirs, (40, k), **params)
    assert torch.equal(p.dequantize(), want)
    ours = qk.quantize(weight, "pack_quantized", **params)
    assert {name: t.shape for name, t in ours.tensors.items()} == {
        name: t.shape for name, t in theirs.items()
    }


# ---------------------------------------------------------------------- rounding
@pytest.mark.parametrize("name", ["gptq", "pack_quantized"])
@pytest.mark.parametrize(("n", "k", "size"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_group_is_rounded_by_itself(
    name: str, n: int, k: int, size: int, symmetric: bool
) -> None:
    """Each group has the codes of its columns alone, one group a row; the short one, too."""
    weight = torch.randn(n, k) * torch.linspace(1, 8, k) + 0.3
    p = qk.quantize(weight, name, group_size=size, symmetric=symmetric)
    alone = [
        qk.quantize(part, name, group_size=-1, symmetric=symmetric).dequantize()
        for part in weight.split(size, 1)
    ]
    assert torch.equal(p.dequantize(), torch.cat(alone, 1))


@pytest.mark.parametrize("name", ["gptq", "pack_quantized"])
@pytest.mark.parametrize(("n", "k", "size"), SHAPES)
def test_groups_in_act_order(name: str, n: int, k: int, size: int) -> None:
    """Columns by falling norm: `size` columns to a group, and the rest to the last."""
    weight = torch.randn(n, k)[:, torch.randperm(k)] * torch.rand(k)
    p = qk.quantize(weight, name, group_size=size, act_order=True, symmetric=False)
    g_idx = p.tensors["g_idx" if name == "gptq" else "weight_g_idx"]
    order = weight.square().sum(0).argsort(descending=True, stable=True)
    assert torch.equal(g_idx[order].long(), torch.arange(k) // size)
    plain = qk.quantize(weight[:, order], name, group_size=size, symmetric=False)
    assert torch.equal(p.dequantize()[:, order], plain.dequantize())


def test_awq_has_no_short_groups() -> None:
    message = (
        "awq: group_size: expected -1 or a divisor of K=576, "
        "because awq stores no short last group, got 128"
    )
    with pytest.raises(ValueError, match=message):
        qk.quantize(torch.randn(8, 576), "awq", group_size=128)
    for name in ("gptq", "pack_quantized"):
        for size in (0, -2):
            with pytest.raises(
                ValueError, match=f"group_size: expected -1 or at least 1, got {size}"
            ):
                qk.quantize(torch.randn(8, 64), name, group_size=size)


# ---------------------------------------------------------------------- use of such weights
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["gptq", "pack_quantized"])
def test_cut(name: str, act_order: bool) -> None:
    p = qk.quantize(
        torch.randn(64, 576), name, group_size=128, act_order=act_order, symmetric=False
    )
    with pytest.raises(
        ValueError, match="expected 576 to be a multiple of 2 parts times 128.*that work: 1$"
    ):
        shard(p, COLUMNS, 0, 2)
    assert torch.equal(shard(p, ROWS, 1, 2).dequantize(), p.dequantize()[32:])
    for begin, end in ((0, 512), (512, 576), (128, 576), (128, 384)):
        part = narrow(p, COLUMNS, begin, end)
        assert torch.equal(part.dequantize(), p.dequantize()[:, begin:end])
        x = torch.randn(2, end - begin, dtype=torch.float64)
        torch.testing.assert_close(
            qk.matmul(x, part, backend="reference"), x @ p.dequantize(torch.float64)[:, begin:end].T
        )


def test_cut_of_static_groups_keeps_the_short_one() -> None:
    """In act-order with adjacent groups, a part has its own groups and no others."""
    tensors, want = checkpoint(32, 576, 128, 4, 1, False)
    p = qk.pack("gptq", tensors, (32, 576), group_size=128, symmetric=False, act_order=True)
    part = narrow(p, COLUMNS, 256, 576)
    assert part.params["group_size"] == 128
    assert part.tensors["scales"].shape == (3, 32)
    assert torch.equal(part.dequantize(torch.float64), want[:, 256:])


@pytest.mark.parametrize("act_order", [False, True])
def test_convert(act_order: bool) -> None:
    params = {"group_size": 128, "act_order": act_order}
    p = qk.quantize(torch.randn(32, 576), "gptq", **params)
    other, how, _ = convert_weight(p, "pack_quantized")
    assert (how, other.params["group_size"]) == ("exact", 128)
    assert torch.equal(other.dequantize(), p.dequantize())
    with pytest.warns(UserWarning, match="group_size 64 instead of 128"):
        other, how, reason = convert_weight(p, "awq")
    assert (how, other.params["group_size"]) == ("requantized", 64)
    assert "stores no short last group" in reason


def test_another_size_with_as_many_groups_is_another_grid() -> None:
    """128 and 120 both make five groups of 576 features, but only one of them is right."""
    p = qk.quantize(torch.randn(32, 576), "gptq", group_size=128)
    for target in ("gptq", "pack_quantized"):
        other, how, _ = convert_weight(p, target, group_size=120)
        assert how == "requantized"
        assert not torch.equal(other.dequantize(), p.dequantize())


# ---------------------------------------------------------------------- the default
@pytest.mark.parametrize(("sizes", "short", "divisor"), [
    ([576], 64, 64), ([576, 1536], 64, 64), ([96], 32, 32), ([64, 128], 64, 64),
    ([192, 320], 64, 64),
    ([80], 128, 80), ([100], 128, 100), ([17 * 16], 128, 68), ([40, 128], 128, -1), ([9], 128, -1),
    ([127 * 4], 128, 127), ([131], 128, -1), ([256 * 3 + 16, 256], 128, 16),
])  # fmt: skip
def test_default_group_sizes(sizes: list[int], short: int, divisor: int) -> None:
    assert default_group_size(sizes, 128, True) == short
    assert default_group_size(sizes, 128, False) == divisor


@pytest.mark.parametrize("name", ["gptq", "awq", "pack_quantized"])
def test_a_group_size_that_is_not_given(name: str) -> None:
    words = (
        "^qkernels: group_size 64 instead of 128, because 128 does not divide the 576 input "
        "features of the weight$"
    )
    with pytest.warns(UserWarning, match=words) as said:
        p = qk.quantize(torch.randn(64, 576), name)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert p.params["group_size"] == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert qk.quantize(torch.randn(64, 256), name).params["group_size"] == 128
        assert qk.quantize(torch.randn(64, 576), name, group_size=-1).params["group_size"] == -1
    with pytest.warns(
        UserWarning, match="because 128 does not divide the 80 input features"
    ) as said:
        p = qk.quantize(torch.randn(64, 80), name)
    assert p.params["group_size"] == (80 if name == "awq" else 128)
    assert ("128 with a short last group" in str(said[0].message)) == (name != "awq")
    with pytest.warns(UserWarning, match="group_size 64 instead of 128.*of the experts$") as said:
        assert qk.quantize_experts(torch.randn(3, 64, 192), name).params["group_size"] == 64
    assert len(said) == 1


def test_pack_guesses_nothing() -> None:
    """A checkpoint without a group size has 128, and its tensors must fit that."""
    tensors = qk.quantize(torch.randn(64, 576), "gptq", group_size=64).tensors
    with pytest.raises(
        ValueError, match=r"scales: expected shape \(5, 64\), got \(9, 64\)|qzeros: expected"
    ):
        qk.pack("gptq", tensors, (64, 576))


@pytest.mark.parametrize("name", qk.formats.names())
def test_every_format_by_default_takes_576_features_or_says_why_not(name: str) -> None:
    """576 is SmolLM2's hidden size; only GGUF's blocks of 256 do not divide it."""
    weight = torch.randn(64, 576)
    if qk.formats.get(name).k_multiple == 256:
        with pytest.raises(ValueError, match="multiple of 256"):
            qk.quantize(weight, name)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert qk.quantize(weight, name).dequantize().shape == (64, 576)
