"""Kernels in torch itself: int8 and fp8 matmuls of cuBLASLt with their scales, tinygemm's int4."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkernels.benchmark.race import Layer

from . import EIGHT_BIT, FOUR_BIT, Peer, layer


class _IntMM(nn.Module):
    """W8A8 composed from torch operations: quantize rows, torch._int_mm, scale."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = nn.Buffer(weight.abs().amax(1) / 127)
        self.codes = nn.Buffer((weight / self.scale[:, None]).round().to(torch.int8).T)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True).float() / 127
        codes = (x / scale).round().to(torch.int8)
        return (torch._int_mm(codes, self.codes) * scale * self.scale).to(x.dtype)


class IntMM(Peer):
    compiles = False
    name, group = "torch._int_mm", "w8a8"

    def takes(self, n: int, k: int, m: int) -> bool:
        return m > 16 and n % 8 == 0 and k % 8 == 0

    def prepare(self, weight: Tensor) -> Layer:
        return layer(_IntMM(weight), weight.numel(), weight, EIGHT_BIT, "int8")


class _ScaledMM(nn.Module):
    """FP8 with row x column scales: quantize rows, torch._scaled_mm."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.abs().amax(1) / 448
        self.scale = nn.Buffer(scale[None, :].contiguous())
        self.codes = nn.Buffer((weight / scale[:, None]).to(torch.float8_e4m3fn).T)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True).float() / 448
        codes = (x / scale).to(torch.float8_e4m3fn)
        return torch._scaled_mm(
            codes,
            self.codes,
            scale_a=scale,
            scale_b=self.scale,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )


class ScaledMM(Peer):
    compiles = False
    name, group = "torch._scaled_mm", "fp8:activation=dynamic"

    def takes(self, n: int, k: int, m: int) -> bool:
        return n % 16 == 0 and k % 16 == 0

    def prepare(self, weight: Tensor) -> Layer:
        return layer(_ScaledMM(weight), weight.numel(), weight, EIGHT_BIT, "fp8")


class _TinyGemm(nn.Module):
    """tinygemm: 4-bit weights with a scale and a zero for each group of 128."""

    GROUP = 128

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        n, k = weight.shape
        grouped = weight.view(n, -1, self.GROUP)
        low, high = grouped.amin(2), grouped.amax(2)
        scale = ((high - low) / 15).clamp(min=1e-6)
        codes = ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32)
        codes = codes.view(n, k)
        packed = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        self.codes = nn.Buffer(torch.ops.aten._convert_weight_to_int4pack(packed, 8))
        # w = (code - 8) * scale + zero
        scales_and_zeros = torch.stack([scale, low + 8 * scale], dim=2).transpose(0, 1)
        self.scales = nn.Buffer(scales_and_zeros.contiguous().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, self.codes, self.GROUP, self.scales)


class TinyGemm(Peer):
    compiles = False
    name, group = "torch tinygemm", "int4 g128"

    def takes(self, n: int, k: int, m: int) -> bool:
        return n % 64 == 0 and k % 1024 == 0

    def prepare(self, weight: Tensor) -> Layer:
        nbytes = weight.numel() // 2 + weight.numel() // _TinyGemm.GROUP * 4
        return layer(_TinyGemm(weight), nbytes, weight, FOUR_BIT)


CONTESTANTS = [IntMM(), ScaledMM(), TinyGemm()]
