"""spqr-quant 0.2: SpQR's own kernel, on our own tensors in its layout.

The kernel multiplies one row of float16 at a time, so only M = 1 is raced. The package compiles it
with nvcc when it is imported.
"""

from __future__ import annotations

from torch import Tensor, nn

import qkernels as qk
from qkernels.benchmark.race import Layer

from . import Peer, same_weight


class _Rows(nn.Module):
    """The layer for an x of shape (M, K) instead of (1, M, K)."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.half()[None]).view(x.shape[0], -1)


class SpQR(Peer):
    name, group, module = "spqr-quant", "spqr", "spqr_quant"

    def takes(self, n: int, k: int, m: int) -> bool:
        return m == 1 and n % 16 == 0 and k % 16 == 0

    def prepare(self, weight: Tensor) -> Layer:
        from spqr_quant.inference import QuantizedLinear

        p = qk.quantize(weight, "spqr", checkpoint_format="spqr_quant")
        n, k = p.shape
        t = p.tensors
        linear = QuantizedLinear(
            n,
            k,
            p.params["bits"],
            16,
            16,
            t["dense_weights"],
            t["row_offsets"],
            t["col_vals"],
            t.get("in_perm"),
        )
        return same_weight(_Rows(linear.to(weight.device)), p)


CONTESTANTS = [SpQR()]
