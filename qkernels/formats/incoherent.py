"""Base class of QuIP and QuIP#: formats with their codes between two orthogonal transforms.

    W = diag(post) P_out^T T_out  G  T_in P_in diag(pre)          y = W x, from right to left

G (N, K) are the decoded codes. Each T is a Kronecker product of small matrices (transforms.py)
divided by its transform scale, each P a permutation. T_in is the transpose of the product, as in
QuIP#. Such transforms make the weight incoherent: they spread its large entries over all others.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts.weight_only import WEIGHT_ONLY
from .base import Format
from .transforms import LARGEST_FACTOR, kronecker
from .types import Params, Shape


class Side(NamedTuple):
    """The transform on the input side or on the output side.

    "Outer" features are those of the layer, "inner" features those of G.

    Attributes:
        factors: the small matrices of the Kronecker product.
        scale: the transform scale, which divides the product of the factors to make it orthogonal.
        diagonal: `pre` or `post`, (features).
        perm: the outer feature of each inner one; None where they are the same.
    """

    factors: list[Tensor]
    scale: float
    diagonal: Tensor
    perm: Tensor | None = None

    def inner(self, x: Tensor) -> Tensor:
        """T^T P diag(diagonal) x for each row of x (..., features)."""
        x = x * self.diagonal.to(x.dtype)
        if self.perm is not None:
            x = x[..., self.perm]
        return kronecker(x, self.factors, transposed=True) / self.scale

    def outer(self, y: Tensor) -> Tensor:
        """diag(diagonal) P^T T y for each row of y: the transpose of `inner`."""
        y = kronecker(y, self.factors) / self.scale
        if self.perm is not None:
            y = torch.empty_like(y).index_copy_(-1, self.perm, y)
        return y * self.diagonal.to(y.dtype)


class IncoherentFormat(Format):
    """A format with codes between two transforms. It cannot be cut, because features are mixed."""

    algorithms = ("ldlq",)
    #: hessian: H, the mean of x x^T. seed: of the random transforms. passes: rounds of coordinate
    #: descent after LDLQ.
    quantize_only = {"hessian": None, "seed": 0, "passes": 2}

    @abstractmethod
    def sides(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> tuple[Side, Side]:
        """The transforms on the input side and on the output side."""

    @abstractmethod
    def grid_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        """G, the decoded codes, float32 (N, K)."""

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        before, after = self.sides(tensors, shape, params)
        rows = before.outer(self.grid_values(tensors, shape, params))
        return after.outer(rows.T).T.contiguous()

    def cuts(self, shape: Shape, params: Params) -> Shape:
        return shape

    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return WEIGHT_ONLY

    def obstacle(self, shape: Shape, params: Params) -> str | None:
        for orders in self.factor_orders(shape):
            loaded = self.loaded_orders(orders)
            entries = math.prod(
                max(16, 1 << (order - 1).bit_length()) for order in loaded[:1] + loaded[1:][-1:]
            )
            if max(loaded, default=1) > LARGEST_FACTOR or entries > 8192:
                return f"its transform has factors of {orders}, too large for one program"
        return None

    def loaded_orders(self, orders: tuple[int, ...]) -> tuple[int, ...]:
        """Orders of the factors that kernels load; they compute the factors after those."""
        return orders

    @abstractmethod
    def factor_orders(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Orders of the factors of the input transform, and of the output transform."""

    def kernel_sides(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        """The tensors of both transforms that kernels load: `WeightOnlyParts.sides`."""
        result = {}
        for name, side in zip(("input", "output"), self.sides(tensors, shape, params), strict=True):
            result[f"{name}.diagonal"] = side.diagonal
            count = len(self.loaded_orders(tuple(f.shape[0] for f in side.factors)))
            result |= {
                f"{name}.factor{i}": f.contiguous() for i, f in enumerate(side.factors[:count])
            }
            if side.perm is not None:
                result[f"{name}.perm"] = side.perm.to(torch.int32)
        return result
