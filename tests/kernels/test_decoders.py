"""Every code of every decoder, through layout and kernel, and the PTX that triton's interpreter
cannot run.
"""

from __future__ import annotations

import pytest
import torch

import qkernels as qk
from qkernels.formats.bitsandbytes4 import FP4_TABLE, NF4_TABLE
from qkernels.layouts import weight_only as layout
from qkernels.layouts.codecs import CODES

from ..conftest import DEVICE
from ..reference import every_power
from . import ptx

pytest.importorskip("triton")

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def gptq_of(codes: torch.Tensor, bits: int, zero: int) -> qk.PackedWeight:
    """codes (N, K) with scale 1 and one zero point."""
    n, k = codes.shape
    fmt = qk.formats.get("gptq")
    params = fmt.resolve((n, k), {"bits": bits, "group_size": -1, "symmetric": False})
    parts = layout.WeightOnlyParts(
        codes.to(torch.uint8),
        {
            "scales": torch.ones(1, n, dtype=torch.float16),
            "zeros": torch.full((1, n), zero, dtype=torch.uint8),
        },
    )
    return qk.pack("gptq", fmt.from_weight_only(parts, (n, k), params), (n, k), **params).to(DEVICE)


def decoded(p: qk.PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight that the kernel decodes: its product with the identity."""
    return qk.matmul(torch.eye(p.shape[1], dtype=dtype, device=DEVICE), p, backend="triton").T


@dtypes
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_integer_code_and_zero(bits: int, dtype: torch.dtype) -> None:
    top = (1 << bits) - 1
    codes = torch.arange(16 * 64).view(16, 64) % (top + 1)
    for zero in {0, 1, top // 2, top}:
        found = decoded(gptq_of(codes, bits, zero), dtype)
        assert torch.equal(found.cpu().float(), (codes - zero).float())


@dtypes
@pytest.mark.parametrize("float_format", ["e4m3", "e5m2"])
def test_every_fp8_code(float_format: str, dtype: torch.dtype) -> None:
    kind = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[float_format]
    codes = torch.arange(256, dtype=torch.uint8).view(kind)
    codes = torch.where(torch.isfinite(codes.float()), codes.float(), 0).to(kind).view(4, 64)
    tensors = {"weight": codes, "weight_scale": torch.ones(4, 1)}
    p = qk.pack("fp8", tensors, (4, 64), float_format=float_format).to(DEVICE)
    assert torch.equal(decoded(p, dtype).cpu().float(), codes.float())


@dtypes
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_table_entry(kind: str, dtype: torch.dtype) -> None:
    table = NF4_TABLE if kind == "nf4" else FP4_TABLE
    table = torch.as_tensor(table)
    weight = table[torch.arange(32 * 64) % 16].view(32, 64)
    p = qk.quantize(weight, kind, block_size=64).to(DEVICE)
    want = p.dequantize().to(dtype)
    assert torch.equal(decoded(p, dtype).cpu(), want.cpu())


def test_lookup_ptx_on_every_code_in_every_place() -> None:
    from qkernels.triton_kernels.decoders import LOOKUP16

    table = torch.randn(16)
    lut = layout.lut(table).tolist()
    for base, dtype in ((0, torch.float16), (8, torch.bfloat16)):
        entries = [v & 0xFFFF for v in table.to(dtype).view(torch.int16).tolist()]
        registers = {f"${5 + i}": lut[base + i] for i in range(8)}
        for place in range(8):
            for code in range(16):
                filler = (code * 7 + place) % 16 * 0x11111111
                word = filler & ~(15 << (4 * place)) | code << (4 * place)
                out = ptx.run(LOOKUP16.value, {"$4": word, **registers}, ["$0", "$1", "$2", "$3"])
                for s in range(4):
                    for b in range(2):
                        nibble = word >> CODES["lut16", 4].bit_of(s, b) & 15
                        assert out[s] >> (16 * b) & 0xFFFF == entries[nibble]


@pytest.mark.parametrize("name", ["mxfp4", "gguf_mxfp4"])
def test_every_power_of_two_as_a_scale(name: str) -> None:
    """Up to 2^125, beyond which 6 overflows: exact in bfloat16.

    From 2^-127 on a GPU. Triton's interpreter takes subnormal bfloat16 for other numbers.
    """
    p = every_power(name, 0 if DEVICE == "cuda" else 3).to(DEVICE)
    assert torch.equal(decoded(p, torch.bfloat16), p.dequantize(torch.bfloat16))
