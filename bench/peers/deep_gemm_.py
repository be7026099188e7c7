"""DeepGEMM 2: FP8 in blocks of 128, on our own tensors.

`fp8_gemm_nt` takes quantized activations. The time includes quantizing them with torch operations,
because DeepGEMM has no kernel for it. The package deep-gemm 1.0.0 on PyPI has another API and lacks
the CUTLASS headers that it compiles with. So this adapter needs the project's own build, and raises
ImportError if it finds the package from PyPI.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.benchmark.race import Layer

from . import Peer, same_weight

BLOCK = 128


class _Product(nn.Module):
    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight, self.scale = nn.Buffer(weight), nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        import deep_gemm

        (m, k), n = x.shape, self.weight.shape[0]
        grouped = x.view(m, k // BLOCK, BLOCK).float()
        scale = grouped.abs().amax(2).clamp(min=1e-4) / 448
        codes = (grouped / scale[..., None]).to(torch.float8_e4m3fn).view(m, k)
        y = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
        deep_gemm.fp8_gemm_nt((codes, scale), (self.weight, self.scale), y)
        return y


class DeepGEMM(Peer):
    name, group, module = "DeepGEMM", "fp8:activation=dynamic,granularity=block", "deep_gemm"

    def takes(self, n: int, k: int, m: int) -> bool:
        return n % 64 == 0 and k % BLOCK == 0

    def prepare(self, weight: Tensor) -> Layer:
        import deep_gemm

        if not hasattr(deep_gemm, "fp8_gemm_nt"):
            version = getattr(deep_gemm, "__version__", "unknown")
            raise ImportError(
                f"deep_gemm {version} has no fp8_gemm_nt: DeepGEMM 2 or newer is needed"
            )
        p = qk.quantize(weight, "fp8", granularity="block", activation="dynamic")
        t = p.tensors
        scale = t["weight_scale_inv"] if "weight_scale_inv" in t else t["weight_scale"]
        return same_weight(_Product(t["weight"], scale.float()), p, kind="fp8")


CONTESTANTS = [DeepGEMM()]
