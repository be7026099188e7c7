"""Conventions that GPTQ's tensors show if configs are silent or wrong, judged by numpy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels.weights import sharding

N, K, SIZE = 64, 128, 32
WIDTHS = (2, 3, 4, 8)


def _stream(codes: np.ndarray, bits: int) -> Tensor:
    """Pack codes (count, n) into int32 (count * bits / 32, n), lowest bit first, in Python."""
    count, n = codes.shape
    words = np.zeros((-(-count * bits // 32), n), np.uint32)
    for column in range(n):
        value = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, column]))
        for word in range(words.shape[0]):
            words[word, column] = (value >> (32 * word)) & 0xFFFFFFFF
    return torch.from_numpy(words.view(np.int32).copy())


def _tensors(
    bits: int, zeros: np.ndarray, shift: int, index: np.ndarray | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, weight) with zero points `zeros` (G, N), which are stored less `shift`."""
    rng = np.random.default_rng()
    codes = rng.integers(0, 2**bits, (K, N))
    scales = (rng.random(zeros.shape) * 0.4 + 0.1).astype(np.float16)
    group_of = np.arange(K) // SIZE if index is None else index
    weight = scales.astype(np.float64)[group_of] * (codes - zeros[group_of])
    stored = (zeros - shift) % 2**bits
    tensors = {
        "qweight": _stream(codes, bits),
        "qzeros": _stream(stored.T, bits).T.contiguous(),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    return tensors, torch.from_numpy(weight.T.copy())


def _symmetric(bits: int) -> np.ndarray:
    return np.full((K // SIZE, N), 2 ** (bits - 1))


def _varied(bits: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 2**bits, (K // SIZE, N))


# ---------------------------------------------------------------------- zero points
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("named", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize(("stored_as", "shift"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("said", [{"symmetric": True}, {}], ids=["sym said", "sym unsaid"])
def test_the_one_zero_of_a_symmetric_grid(
    bits: int, named: str | None, stored_as: str, shift: int, said: dict[str, Any]
) -> None:
    tensors, weight = _tensors(bits, _symmetric(bits), shift)
    params = {
        "bits": bits,
        "group_size": SIZE,
        **said,
        **({"checkpoint_format": named} if named else {}),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        p = qk.pack("gptq", tensors, (N, K), **params)
    assert torch.equal(p.dequantize().double(), weight)
    assert (p.params["symmetric"], p.params["checkpoint_format"]) == (True, stored_as)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == int(stored_as != (named or "gptq"))
    if texts:
        zero = 2 ** (bits - 1)
        assert (
            f"qzeros hold {zero - shift} everywhere, the zero point {zero} of a symmetric grid"
            in texts[0]
        )
        assert (
            f"{stored_as!r} stores it: read so, although {named or 'gptq'!r} is named" in texts[0]
        )
    layer = qk.QuantLinear(p)
    layer._hold(layer.packed.prepack_("weight_only"))
    assert torch.equal(layer.state_dict()["qzeros"], tensors["qzeros"])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("named", "shift"), [("gptq", 1), ("gptq_v2", 0)])
def test_zeros_that_vary(bits: int, named: str, shift: int) -> None:
    """They are read as the config says; symmetric=True refuses them."""
    tensors, weight = _tensors(bits, _varied(bits), shift)
    params = {"bits": bits, "group_size": SIZE, "checkpoint_format": named}
    for said in ({"symmetric": False}, {}):
        p = qk.pack("gptq", tensors, (N, K), **params, **said)
        assert torch.equal(p.dequantize().double(), weight)
        assert p.params["symmetric"] is False
    zero = 2 ** (bits - 1)
    message = rf"gptq: qzeros: expected {zero - 1} .* or {zero} .* everywhere, .* got \d+\.\.\d+;"
    with pytest.raises(ValueError, match=message):
        qk.pack("gptq", tensors, (N, K), **params, symmetric=True)


def test_an_asymmetric_grid_is_believed() -> None:
    """With symmetric=False, zero points that are all 9 do not mean a symmetric grid."""
    tensors, weight = _tensors(4, np.full((K // SIZE, N), 9), 1)
    p = qk.pack("gptq", tensors, (N, K), group_size=SIZE, symmetric=False)
    assert torch.equal(p.dequantize().double(), weight)


# ---------------------------------------------------------------------- the order of groups
@pytest.mark.parametrize("said", [{}, {"act_order": True}], ids=str)
def test_permuted_groups_are_in_the_tensors(said: dict[str, Any]) -> None:
    index = np.random.default_rng().permutation(np.arange(K) // SIZE)
    tensors, weight = _tensors(4, _symmetric(4), 1, index)
    p = qk.pack("gptq", tensors, (N, K), group_size=SIZE, **said)
    assert p.params["act_order"] is True
    assert torch.equal(p.dequantize().double(), weight)
    with pytest.raises(
        ValueError, match="g_idx: expected k // group_size because act_order is False"
    ):
        qk.pack("gptq", tensors, (N, K), group_size=SIZE, act_order=False)


@pytest.mark.parametrize("said", [{}, {"act_order": False}, {"act_order": True}], ids=str)
def test_an_index_of_zeros_says_nothing(said: dict[str, Any]) -> None:
    tensors, weight = _tensors(4, _symmetric(4), 1)
    tensors["g_idx"] = torch.zeros(K, dtype=torch.int32)
    p = qk.pack("gptq", tensors, (N, K), group_size=SIZE, **said)
    assert p.params["act_order"] is False
    assert torch.equal(p.dequantize().double(), weight)
    for part, columns in enumerate((slice(0, 64), slice(64, 128))):
        half = sharding.shard(p, sharding.COLUMNS, part, 2)
        assert torch.equal(half.dequantize().double(), weight[:, columns])
    p.prepack_("weight_only")
    assert torch.equal(p.dequantize().double(), weight)
    assert torch.equal(p.tensors["g_idx"], tensors["g_idx"]), "the file's own"


def test_one_group_of_zeros_is_an_order() -> None:
    tensors, _ = _tensors(4, _symmetric(4), 1)
    one = {**tensors, "scales": tensors["scales"][:1], "qzeros": tensors["qzeros"][:1]}
    one["g_idx"] = torch.zeros(K, dtype=torch.int32)
    assert qk.pack("gptq", one, (N, K), group_size=-1, act_order=True).params["act_order"] is True


@pytest.mark.parametrize(("change", "message"), [
    ({"qzeros": torch.zeros(4, 8)}, "qzeros: expected dtype int32, got float32"),
    ({"qzeros": torch.zeros(4, 8, dtype=torch.complex64)},
     "qzeros: expected dtype int32, got complex64"),
    ({"qzeros": torch.zeros(4, 7, dtype=torch.int32)},
     r"qzeros: expected shape \(4, 8\), got \(4, 7\)"),
    ({"qzeros": torch.zeros(4, 0, dtype=torch.int32)},
     r"qzeros: expected shape \(4, 8\), got \(4, 0\)"),
    ({"qzeros": None}, "qzeros: expected a torch.Tensor, got NoneType"),
    ({"scales": None}, "scales: expected a torch.Tensor, got NoneType"),
    ({"scales": torch.ones(64).half()}, r"scales: expected shape \(4, 64\), got \(64,\)"),
    ({"g_idx": torch.zeros(K)}, "g_idx: expected dtype int32, got float32"),
    ({"g_idx": torch.zeros(K, dtype=torch.int64)}, "g_idx: expected dtype int32, got int64"),
])  # fmt: skip
def test_tensors_that_say_nothing_are_named(change: dict[str, Any], message: str) -> None:
    """The look at the convention must not crash on tensors that are not checked yet."""
    tensors, _ = _tensors(4, _symmetric(4), 1)
    with pytest.raises(ValueError, match=f"gptq: {message}"):
        qk.pack("gptq", {**tensors, **change}, (N, K), group_size=SIZE)
