"""A new storage format in one class: 4-bit floats (E2M1) with a float32 scale for 32 features.

    python examples/new_format.py
    TRITON_INTERPRET=1 python examples/new_format.py --backend triton  # the fused kernel, on a CPU

The format needs no new kernel: its codes index a table of 16 values (decoder "lut16"), and each
group of 32 features has one scale (scaler "scale"). docs/add-a-format.md explains each method.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import qkernels as qk
from qkernels.formats.base import TensorSpec
from qkernels.layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits

BLOCK = 32
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
TABLE = torch.cat([E2M1, -E2M1])


class E2m1(qk.formats.Format):
    """`codes` (N, K / 2): feature 2i in the low four bits. `scales` (N, K / 32)."""

    name = "e2m1_example"
    summary = "4-bit floats, a scale for 32 features"
    k_multiple = BLOCK

    def specs(self, shape: tuple[int, int], params: dict[str, Any]) -> dict[str, TensorSpec]:
        n, k = shape
        return {
            "codes": TensorSpec((torch.uint8,), (n, k // 2)),
            "scales": TensorSpec((torch.float32,), (n, k // BLOCK)),
        }

    def quantize(self, weight: Tensor, params: dict[str, Any]) -> dict[str, Tensor]:
        blocks = weight.view(weight.shape[0], -1, BLOCK)
        scales = (blocks.abs().amax(-1) / TABLE.max()).clamp(min=1e-12)
        codes = (blocks / scales[..., None])[..., None].sub(TABLE).abs().argmin(-1)
        return {"codes": _pack(codes.to(torch.uint8).view_as(weight)), "scales": scales}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], params: dict[str, Any]
    ) -> Tensor:
        values = TABLE[_unpack(tensors["codes"]).long()]
        return values * tensors["scales"].repeat_interleave(BLOCK, 1)

    # ------------------------------------------------------------------ fused kernels
    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return WEIGHT_ONLY

    def weight_only_traits(
        self, shape: tuple[int, int], params: dict[str, Any]
    ) -> WeightOnlyTraits:
        return WeightOnlyTraits(bits=4, decoder="lut16", scaler="scale", group_size=BLOCK)

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], params: dict[str, Any]
    ) -> WeightOnlyParts:
        return WeightOnlyParts(
            codes=_unpack(tensors["codes"]),
            scaler_tensors={"absmax": tensors["scales"].T},
            table=TABLE,
        )

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: tuple[int, int], params: dict[str, Any]
    ) -> dict[str, Tensor]:
        scales = parts.scaler_tensors["absmax"].T.contiguous()
        return {"codes": _pack(parts.codes), "scales": scales}


def _pack(codes: Tensor) -> Tensor:
    return codes[:, ::2] | codes[:, 1::2] << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--backend", default="auto", choices=["auto", "reference", "triton", "cuda"]
    )
    backend = parser.parse_args().backend
    qk.formats.register(E2m1())

    weight, x = torch.randn(128, 256), torch.randn(4, 256, dtype=torch.float16)
    p = qk.quantize(weight, "e2m1_example")
    y = qk.matmul(x, p, backend=backend)
    exact = x.double() @ p.dequantize(torch.float64).T
    print(p)
    print(qk.explain(p, m=4, backend=backend))
    print(f"largest error of the product: {(y - exact).abs().max():.4f} of {exact.abs().max():.1f}")
    p.prepack_(WEIGHT_ONLY)
    again = qk.pack("e2m1_example", p.tensors, shape=p.shape)
    assert torch.equal(again.dequantize(), p.dequantize()), "prepack must be undone bit for bit"


if __name__ == "__main__":
    main()
