"""Every code of every CUDA decoder, at every position of a word, equals the Python reference."""

from __future__ import annotations

import ctypes

import pytest
import torch

from qkernels.formats import e8p
from qkernels.layouts import weight_only as layout
from qkernels.layouts.codecs import CODES, CodeKind

from . import host

#: name of each kind of code -> its row, in the order of the decoders in the library
KINDS = {kind.name: kind for kind in CODES.values()}
#: the rows of integers
INTEGERS = [kind for kind in CODES.values() if kind.offset is not None]
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def library() -> ctypes.CDLL:
    decoders = " ".join(f"X({kind.cuda})" for kind in CODES.values())
    return host.library("decoders/all_codes.cpp", (f"QK_CODES(X)={decoders}",))


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())


def decoded(
    kind: str,
    codes: torch.Tensor,
    dtype: torch.dtype,
    zero: float = 0,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """codes uint8 (N, K), K whole tiles -> values (N, K), through the layout and the decoder."""
    packed = layout.pack_codes(codes, KINDS[kind])
    lut = layout.lut(torch.zeros(16) if table is None else table)
    lut = lut[8:] if dtype == torch.bfloat16 else lut[:8]
    return in_kernel_order(KINDS[kind], packed, dtype, lut, zero)


def in_kernel_order(
    kind: CodeKind,
    packed: dict[str, torch.Tensor],
    dtype: torch.dtype,
    table: torch.Tensor,
    zero: float = 0,
) -> torch.Tensor:
    """The result of `pack_codes` or `pack_codebook` -> values (N, KP)."""
    words = packed["qdata"]
    tiles, n = words.shape[:2]
    pairs = 16 // kind.width
    high = packed.get("qhigh", torch.zeros_like(words))
    if high.shape[2] < 16:  # word (j, p, h), as the kernel shifts it from the plane's words of j
        plane, step = high.view(tiles, n, 4, 1, -1), kind.high_step
        if high.shape[2] == 4:
            plane = torch.cat([plane, plane >> step], dim=4)
            step *= 2
        high = torch.cat([plane, plane >> step], dim=3).contiguous()
    out = torch.empty(words.numel() * pairs, dtype=torch.int32)
    lib = library()
    lib.qk_decode.restype = ctypes.c_char_p
    number = list(KINDS).index(kind.name)
    error = lib.qk_decode(
        number, int(dtype == torch.bfloat16), pointer(words), pointer(high),
        pointer(table.contiguous()), words.numel(), ctypes.c_float(zero), pointer(out),
    )  # fmt: skip
    assert error == b""
    values = out.view(dtype).view(tiles, n, 4, 2, 2, pairs, 2)  # t, n, j, p, h, s, b
    return values.permute(1, 0, 5, 3, 4, 2, 6).reshape(n, -1)


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


@dtypes
@pytest.mark.parametrize("kind", [k for k in INTEGERS if k.decoder != "linear"])
def test_integers_with_a_fixed_zero(kind: CodeKind, dtype: torch.dtype) -> None:
    """Every code at every position of a tile; the zero point is ignored."""
    count = 1 << kind.bits
    codes = torch.arange(count)[:, None] + torch.arange(kind.tile)
    codes = codes.remainder(count).to(torch.uint8)
    for zero in (0, 3):
        values = decoded(kind.name, codes, dtype, zero)
        assert torch.equal(values.float(), codes.float() - kind.offset)


@dtypes
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_of_eight_weights(bits: int, dtype: torch.dtype) -> None:
    """All 65536 codes, and all residual codes, in both halves of words; rounded once at most."""
    every = torch.arange(1 << 16, dtype=torch.int32)
    codes = torch.cat([every, every.roll(1)])
    if bits > 2:
        second = torch.arange(codes.numel(), dtype=torch.int32) % (256 if bits == 3 else 1 << 16)
        codes = codes | second[torch.randperm(codes.numel())] << 16
    codes = codes.view(64, -1)
    kind = CODES["e8p", bits]
    packed = layout.pack_codebook(codes, kind)
    found = in_kernel_order(kind, packed, dtype, e8p.table(codes.device)).float()
    want = 2 * e8p.decode(codes, bits).view(64, -1)
    found = found[:, layout.codebook_order(want.shape[1])]
    if bits == 2:
        assert torch.equal(found, want)
    else:
        # and 2^-20: of float32 where both cancel
        u = 2.0**-11 if dtype == torch.float16 else 2.0**-8
        assert bool(((found - want).abs() <= u * (1 + 2.0**-10) * want.abs() + 2.0**-20).all())


@dtypes
def test_table_in_every_place(dtype: torch.dtype) -> None:
    table = torch.randn(16)
    places = torch.arange(128)
    for code in range(16):
        codes = torch.randint(16, (128, 128), dtype=torch.uint8)
        codes[places, places] = code
        assert torch.equal(
            decoded("lut16", codes, dtype, table=table), table.to(dtype)[codes.long()]
        )


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
    """Round to nearest even: every 16-bit value, and values at and next to each midpoint of two."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[torch.isfinite(every)].sort().values
    middle = (every[1:].double() + every[:-1].double()) / 2
    near = middle.float().view(torch.int32)
    values = torch.cat(
        [every, middle.float(), (near + 1).view(torch.float32), (near - 1).view(torch.float32)]
    )
    found = values.clone()
    library().qk_round(int(dtype == torch.bfloat16), pointer(found), found.numel())
    want = values.to(dtype).float()
    assert torch.equal(found.nan_to_num(7, 8, 9), want.nan_to_num(7, 8, 9))
