"""Every code of every CUDA decoder, in every place of a word, exactly as the Python reference has it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from qkernels.layouts import weight_only as layout

from . import host

#: in the order of csrc/decoders/dispatch.h
CODES = [
    "linear2", "linear3", "linear4", "linear8", "lut16", "e4m3", "e5m2",
    *(f"centered{bits}" for bits in (3, 4, 5, 6, 8)), *(f"counted{bits}" for bits in (2, 3, 4, 5)),
    *(f"halfway{bits}" for bits in (2, 3, 4)),
]  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())


def decoded(
    kind: str, codes: torch.Tensor, dtype: torch.dtype, zero: float = 0, table: torch.Tensor | None = None
) -> torch.Tensor:
    """codes uint8 (N, K), K a whole number of tiles -> values (N, K), through layout and decoder."""
    bits = {"lut16": 4, "e4m3": 8, "e5m2": 8}.get(kind) or int(kind[-1])
    n, k = codes.shape
    packed = layout.pack_codes(codes, bits, table=kind == "lut16")
    words = packed["qdata"]
    tiles, pairs = words.shape[0], 16 // layout.plane_bits(bits)
    high = torch.zeros_like(words)
    if count := layout.high_words(bits):  # word (j, p, h): what the kernel makes of the plane's words of j
        plane, step = packed["qhigh"].view(tiles, n, 4, 1, -1), layout.high_step(bits)
        if count == 4:
            plane = torch.cat([plane, plane >> step], dim=4)
            step *= 2
        high = torch.cat([plane, plane >> step], dim=3).contiguous()
    lut = layout.lut(torch.zeros(16) if table is None else table)
    lut = lut[8:] if dtype == torch.bfloat16 else lut[:8]
    out = torch.empty(words.numel() * pairs, dtype=torch.int32)
    lib = host.library("decoders/all_codes.cpp")
    lib.qk_decode(
        CODES.index(kind), int(dtype == torch.bfloat16), pointer(words), pointer(high),
        pointer(lut.contiguous()), words.numel(), ctypes.c_float(zero), pointer(out),
    )  # fmt: skip
    values = out.view(dtype).view(tiles, n, 4, 2, 2, pairs, 2)  # t, n, j, p, h, s, b
    return values.permute(1, 0, 5, 3, 4, 2, 6).reshape(n, k)


@dtypes
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers(bits: int, dtype: torch.dtype) -> None:
    count = 1 << bits
    codes = torch.randint(count, (4, 512), dtype=torch.uint8)
    codes[:, :count] = torch.arange(count)
    codes = torch.cat([codes, codes.roll(1, 1), codes.roll(17, 1)])  # every code in many places
    for zero in range(count + 1):  # GPTQ stores the zero point minus one, so it may be one too many
        found = decoded(f"linear{bits}", codes, dtype, zero)
        assert torch.equal(found.float(), codes.float() - zero)


def middle(kind: str, bits: int) -> float:
    """What the decoders that take no zero point take off a code."""
    return {"centered": 1 << (bits - 1), "counted": 0, "halfway": ((1 << bits) - 1) / 2}[kind]


@dtypes
@pytest.mark.parametrize("code", CODES[7:])
def test_integers_about_a_fixed_middle(code: str, dtype: torch.dtype) -> None:
    """Every code in every place of a tile, whatever zero point is given."""
    kind, bits = code[:-1], int(code[-1])
    count = 1 << bits
    tile = layout.tile_features(bits)
    codes = (torch.arange(count)[:, None] + torch.arange(tile)).remainder(count).to(torch.uint8)
    for zero in (0, 3):
        found = decoded(code, codes, dtype, zero)
        assert torch.equal(found.float(), codes.float() - middle(kind, bits))


@dtypes
def test_table_in_every_place(dtype: torch.dtype) -> None:
    table = torch.randn(16)
    places = torch.arange(128)
    for code in range(16):
        codes = torch.randint(16, (128, 128), dtype=torch.uint8)
        codes[places, places] = code
        assert torch.equal(decoded("lut16", codes, dtype, table=table), table.to(dtype)[codes.long()])


@dtypes
@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8(kind: str, dtype: torch.dtype) -> None:
    eight = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    values = torch.arange(256, dtype=torch.uint8)
    values = values[torch.isfinite(values.view(eight).float())]
    codes = values[torch.randint(values.numel(), (8, 512))]
    codes[0, : values.numel()] = values
    codes[1, 1 : values.numel() + 1] = values
    found = decoded(kind, codes, dtype)
    assert torch.equal(found.view(torch.int16), codes.view(eight).to(dtype).view(torch.int16))


@dtypes
def test_conversions(dtype: torch.dtype) -> None:
    """Round to nearest even: every 16-bit value, and what lies exactly, almost and hardly between two."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[torch.isfinite(every)].sort().values
    middle = (every[1:].double() + every[:-1].double()) / 2
    near = middle.float().view(torch.int32)
    values = torch.cat(
        [every, middle.float(), (near + 1).view(torch.float32), (near - 1).view(torch.float32)]
    )
    found = values.clone()
    host.library("decoders/all_codes.cpp").qk_round(
        int(dtype == torch.bfloat16), pointer(found), found.numel()
    )
    want = values.to(dtype).float()
    assert torch.equal(found.nan_to_num(7, 8, 9), want.nan_to_num(7, 8, 9))
