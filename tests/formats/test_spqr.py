"""SpQR's storage: by hand, against a spelled-out reading of spqr-quant's words, and bad input."""

from __future__ import annotations

import struct

import pytest
import torch

import qkernels as qk


def half(value: float) -> int:
    return struct.unpack("<H", struct.pack("<e", value))[0]


def signed(word: int, width: int) -> int:
    return word - (1 << width) if word >> (width - 1) else word


def col_val(value: float, column: int) -> int:
    return signed(half(value) << 16 | column, 32)


def test_compact_words_by_hand() -> None:
    # One group of 16 columns, 4 rows of which each two share a second level; codes k % 8.
    words = [0, 0]
    for k in range(16):
        words[k * 3 // 32] |= (k % 8) << (k * 3 % 32) & 0xFFFFFFFF
        if k * 3 % 32 > 29:
            words[1] |= (k % 8) >> (32 - k * 3 % 32)
    stat = 5 | 3 << 3  # scale code 5, zero code 3
    stats = stat | stat << 6 | stat << 12 | stat << 18
    tensors = {
        "qweight": torch.tensor([[signed(w, 32)] * 4 for w in words], dtype=torch.int32),
        "qstats": torch.tensor([[stats]], dtype=torch.int32),
        "second_level": torch.tensor([[[0.5, 2.0, 1.0, 1.0], [0.25, 1.0, -1.0, 0.0]]]).half(),
        "row_offsets": torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32),
        "col_vals": torch.tensor(
            [col_val(10.0, 2), col_val(-1.5, 15), col_val(100.0, 0)], dtype=torch.int32
        ),
    }
    p = qk.pack("spqr", tensors, shape=(4, 16), row_group=2)
    codes = torch.arange(16) % 8
    first = 0.5 * (5 - 1) * (codes - 2 * (3 - 1.0))  # s_s (5 - s_z) (q - z_s (3 - z_z))
    second = 0.25 * (5 + 1) * (codes - 1.0 * 3)
    want = torch.stack([first, first, second, second])
    want[1, 2] += 10
    want[1, 15] -= 1.5
    want[3, 0] += 100
    assert torch.equal(p.dequantize(), want)


def read_public(
    words: list[int], row_offsets: list[int], col_vals: list[int], perm: list[int], n: int, k: int
):
    """Read spqr-quant's storage as its kernel does, element by element with Python numbers."""
    weight = [[0.0] * k for _ in range(n)]
    for r in range(n):
        for g in range(k // 16):
            tile = [w & (1 << 64) - 1 for w in words[(r // 16 * (k // 16) + g) * 16 :][:16]]
            packed = bytes(tile[2 * i] >> 54 & 255 for i in range(8))
            s_s, z_s, s_z, z_z = struct.unpack("<4e", packed)
            word = tile[r % 16]
            s = s_s * ((word & 7) - s_z)
            z = z_s * ((word >> 3 & 7) - z_z)
            for i in range(16):
                weight[r][g * 16 + i] = s * ((word >> 6 + 3 * i & 7) - z)
        for j in range(row_offsets[r], row_offsets[r + 1]):
            (value,) = struct.unpack("<e", struct.pack("<H", col_vals[j] >> 16 & 0xFFFF))
            weight[r][col_vals[j] & 0xFFFF] += value
    in_order = [[0.0] * k for _ in range(n)]
    for r in range(n):
        for j in range(k):
            in_order[r][perm[j >> 1] >> 16 * (j & 1) & 0xFFFF] = weight[r][j]
    return torch.tensor(in_order, dtype=torch.float64)


@pytest.mark.parametrize("n", [32, 23])
def test_public_storage_is_read_as_its_kernel_does(n: int) -> None:
    k = 64
    weight = torch.randn(n, k) * torch.rand(k) * 3
    p = qk.quantize(weight, "spqr", checkpoint_format="spqr_quant", act_order=True, threshold=0.05)
    t = {key: tensor.tolist() for key, tensor in p.tensors.items()}
    assert t["col_vals"], "no outlier, so none was compared"
    want = read_public(t["dense_weights"], t["row_offsets"], t["col_vals"], t["in_perm"], n, k)
    torch.testing.assert_close(p.dequantize().double(), want, rtol=1e-6, atol=1e-6)


def test_both_storages_hold_the_same_weight() -> None:
    weight = torch.randn(40, 96)
    compact = qk.quantize(weight, "spqr")
    public = qk.quantize(weight, "spqr", checkpoint_format="spqr_quant")
    assert torch.equal(compact.dequantize(), public.dequantize())
    # 3 + 6/16 + 64/256, rows rounded up to 48 and words to 32 bits, 32 a row offset and an outlier
    bits = (
        3 * 40 * 96 + 8 * 32 * 6 + 64 * 3 * 6 + 32 * 41 + 32 * compact.tensors["col_vals"].numel()
    )
    assert compact.nbytes * 8 == bits


def test_transformers_reads_our_config() -> None:
    from transformers import SpQRConfig

    fmt = qk.formats.get("spqr")
    params = fmt.resolve((16, 16), {"checkpoint_format": "spqr_quant", "act_order": True})
    config = fmt.to_hf_config(params, ["lm_head"])
    theirs = SpQRConfig.from_dict(config)
    assert (theirs.bits, theirs.beta1, theirs.beta2) == (3, 16, 16)
    assert type(fmt).from_hf_config(config) == params
    # as its converter writes it
    public = {
        "quant_method": "spqr",
        "bits": 3,
        "beta1": 16,
        "beta2": 16,
    }
    assert type(fmt).from_hf_config(public) == params


BAD = [
    (
        {"row_offsets": torch.arange(17, dtype=torch.int32) * 2},
        "row_offsets: expected values rising from 0 to",
    ),
    (
        {"row_offsets": torch.zeros(16, dtype=torch.int32)},
        r"row_offsets: expected shape \(17,\), got \(16,\)",
    ),
    ({"col_vals": torch.zeros(2, 2, dtype=torch.int32)}, "col_vals: expected one dimension"),
    (
        {"second_level": torch.full((4, 1, 4), float("nan")).half()},
        "second_level: expected finite values",
    ),
    (
        {"in_perm": torch.zeros(32, dtype=torch.int32)},
        "in_perm: expected none because act_order is False",
    ),
    ({"qstats": torch.full((3, 4), -1, dtype=torch.int32)}, None),
]


def small() -> dict[str, torch.Tensor]:
    return dict(qk.quantize(torch.randn(16, 64), "spqr", threshold=-1.0).tensors)


@pytest.mark.parametrize(("change", "message"), BAD, ids=str)
def test_bad_tensors(change: dict[str, torch.Tensor], message: str | None) -> None:
    tensors = {**small(), **change}
    if message is None:
        qk.pack("spqr", tensors, (16, 64))  # every bit means something
        return
    with pytest.raises(ValueError, match=message):
        qk.pack("spqr", tensors, (16, 64))


@pytest.mark.parametrize(
    ("offsets", "entries", "message"),
    [
        (
            [0] + [2] * 16,
            [col_val(1.0, 5), col_val(1.0, 64)],
            "col_vals: expected columns below 64, got 64",
        ),
        (
            [0] + [2] * 16,
            [col_val(1.0, 5), col_val(1.0, 5)],
            "col_vals: expected columns rising within each row",
        ),
        (
            [0] + [2] * 16,
            [col_val(1.0, 5), signed(0x7C000006, 32)],
            "col_vals: expected finite values, got inf",
        ),
        (
            [0, 2] + [1] * 14 + [2],
            [col_val(1.0, 5), col_val(1.0, 6)],
            "row_offsets: expected values rising",
        ),
    ],
)
def test_bad_outliers(offsets: list[int], entries: list[int], message: str) -> None:
    change = {"row_offsets": torch.tensor(offsets).int(), "col_vals": torch.tensor(entries).int()}
    with pytest.raises(ValueError, match=message):
        qk.pack("spqr", {**small(), **change}, (16, 64))


def test_bad_permutation_and_padding() -> None:
    tensors = dict(
        qk.quantize(
            torch.randn(10, 32), "spqr", checkpoint_format="spqr_quant", act_order=True
        ).tensors
    )
    params = {"checkpoint_format": "spqr_quant", "act_order": True}
    with pytest.raises(ValueError, match="in_perm: expected a permutation of 32 features"):
        qk.pack(
            "spqr", {**tensors, "in_perm": torch.zeros(16, dtype=torch.int32)}, (10, 32), **params
        )
    words = tensors["dense_weights"].clone()
    words[11] |= 8  # a row past the last
    with pytest.raises(ValueError, match="dense_weights: expected zero bits behind the last code"):
        qk.pack("spqr", {**tensors, "dense_weights": words}, (10, 32), **params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bits": 5}, r"bits: expected one of \(2, 3, 4\), got 5"),
        ({"group_size": 24}, "group_size: expected a divisor of K=64, got 24"),
        ({"row_group": 0}, "row_group: expected at least 1, got 0"),
        (
            {"bits": 4, "checkpoint_format": "spqr_quant"},
            "checkpoint_format: expected 'compact' for bits",
        ),
    ],
)
def test_bad_parameters(params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk.quantize(torch.randn(16, 64), "spqr", **params)
