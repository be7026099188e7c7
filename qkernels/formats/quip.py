"""QuIP: integers of one uniform grid, between random orthogonal transforms.

    W = P_out^T (out0 (x) out1 ..)  G  (in0 (x) in1 ..)^T P_in diag(in_scale)
    G = scale * (code - (2^bits - 1) / 2)

    qweight      int32 (K*bits/32, N)   codes, a bit stream along K (see bits.py)
    scale        float32 ()             one step of the grid
    in_scale     float16 (K)            factors of the inputs before they are mixed
    in0, in1 ..  float16 (p, p), (q, q) ..   random orthogonal; p * q .. = K, transforms.balanced
    out0, out1   float16                the same for N
    perm_seeds   int64 (2)              P_in and P_out are transforms.random_permutation of these

There is no public storage format to be compatible with: the authors' code stores dequantized
weights.

Source: Chee et al. 2023, arXiv 2307.13304.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.weight_only import WeightOnlyParts, WeightOnlyTraits
from . import bits
from .base import TensorSpec
from .incoherent import IncoherentFormat, Side
from .transforms import balanced, random_orthogonal, random_permutation
from .types import Params, Shape

#: bits -> step of the uniform grid of 2^bits values that fits Gaussian weights best (Max 1960,
#: table II)
GAUSSIAN_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352}


class Quip(IncoherentFormat):
    name = "quip"
    summary = "2/3/4-bit integers between random orthogonal transforms (QuIP)"
    defaults = {"bits": 2}
    #: rescale: scale the inputs by the magnitudes of inputs and weights, as the paper does. It
    #: gives calibration more weight, and here too much: SmolLM2 at 4 bits loses accuracy with it
    #: (bench/results/low-bit.md).
    quantize_only = {**IncoherentFormat.quantize_only, "rescale": False}

    def check_params(self, shape: Shape, params: Params) -> None:
        self.expect("bits", params["bits"], (2, 3, 4))

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        (n, k), half = shape, (torch.float16,)
        factors = {
            name: TensorSpec(half, (order, order)) for name, order in _factors(shape).items()
        }
        return {
            "qweight": TensorSpec((torch.int32,), (bits.words(k, params["bits"]), n)),
            "scale": TensorSpec((torch.float32,), ()),
            "in_scale": TensorSpec(half, (k,)),
            **factors,
            "perm_seeds": TensorSpec((torch.int64,), (2,)),
        }

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        for name in ("scale", "in_scale", *_factors(shape)):
            self.check_finite(name, tensors[name])
        seeds = tensors["perm_seeds"]
        if int(seeds.min()) < 0 or int(seeds.max()) >= 1 << 31:
            raise ValueError(
                f"{self.name}: perm_seeds: expected values in [0, 2^31), got {seeds.tolist()}"
            )
        k, b = shape[1], params["bits"]
        if k * b % 32 and not bits.padding_is_zero(tensors["qweight"], b, k):
            raise ValueError(
                f"{self.name}: qweight: expected zero bits behind the last code, got others"
            )

    # ------------------------------------------------------------------ arithmetic
    def sides(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> tuple[Side, Side]:
        device = tensors["in_scale"].device
        ones = torch.ones(shape[0], dtype=torch.float16, device=device)
        seeds = tensors["perm_seeds"].tolist()
        perms = [random_permutation(shape[1 - i], seeds[i], device) for i in range(2)]
        names = list(_factors(shape))
        before, after = (
            [tensors[n] for n in names if n.startswith(side)] for side in ("in", "out")
        )
        return Side(before, 1.0, tensors["in_scale"], perms[0]), Side(after, 1.0, ones, perms[1])

    def factor_orders(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return balanced(shape[1]), balanced(shape[0])

    def grid_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        codes = bits.unpack_rows(tensors["qweight"], params["bits"], shape[1]).T.float()
        return (codes - ((1 << params["bits"]) - 1) / 2) * tensors["scale"]

    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        from . import ldlq

        n, k = weight.shape
        device, top = weight.device, (1 << params["bits"]) - 1
        generator = torch.Generator().manual_seed(params["seed"])
        factors = _factors((n, k)).items()
        transform = {
            name: random_orthogonal(order, generator).to(device) for name, order in factors
        }
        scale_by = params["hessian"] if params["rescale"] else None
        transform["in_scale"] = ldlq.input_scale(weight, scale_by).half()
        transform["perm_seeds"] = torch.randint(0, 1 << 31, (2,), generator=generator).to(device)
        before, after = self.sides(transform, (n, k), params)
        inner, hessian = ldlq.inner_weight(weight, params["hessian"], before, after)
        scale = inner.square().mean().sqrt().clamp(min=1e-12) * GAUSSIAN_STEP[params["bits"]]

        def round_to_codes(target: Tensor) -> tuple[Tensor, Tensor]:
            codes = torch.round(target + top / 2).clamp_(0, top)
            return codes.to(torch.uint8), codes - top / 2

        codes = ldlq.ldlq(inner / scale, hessian, round_to_codes, block=1, passes=params["passes"])
        qweight = bits.pack_rows(codes.T, params["bits"])
        return {"qweight": qweight, "scale": scale.float(), **transform}

    # ------------------------------------------------------------------ kernel family
    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        return WeightOnlyTraits(
            params["bits"],
            "half_integer",
            "row_scale",
            shape[1],
            shape[0],
            transform_scales=(1.0, 1.0),
        )

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        return WeightOnlyParts(
            codes=bits.unpack_rows(tensors["qweight"], params["bits"], shape[1]).T,
            scaler_tensors={"absmax": tensors["scale"].view(1, 1)},
            sides=self.kernel_sides(tensors, shape, params),
            extra={"perm_seeds": tensors["perm_seeds"]},
        )

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        factors = {}
        for name in _factors(shape):
            side = "input" if name.startswith("in") else "output"
            factors[name] = parts.sides[f"{side}.factor{name[-1]}"]
        return {
            "qweight": bits.pack_rows(parts.codes.T, params["bits"]),
            "scale": parts.scaler_tensors["absmax"].view(()),
            "in_scale": parts.sides["input.diagonal"],
            **factors,
            **parts.extra,
        }

    # ------------------------------------------------------------------ checkpoints
    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        if config.get("quant_method") != "quip":
            return None
        return {"bits": config.get("bits", 2)}


def _factors(shape: Shape) -> dict[str, int]:
    """Name -> order of each orthogonal factor."""
    n, k = shape
    inputs = {f"in{i}": order for i, order in enumerate(balanced(k))}
    return inputs | {f"out{i}": order for i, order in enumerate(balanced(n))}
