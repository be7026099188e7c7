"""What QuIP and QuIP# share: a weight that lies on its grid only between two orthogonal transforms.

    W = diag(post) P_out^T T_out  G  T_in P_in diag(pre)          y = W x, from right to left

G (N, K) is what the codes stand for. T are Kronecker products of small matrices (transforms.py)
divided by their norm, P permutations. On the input side T_in is the transpose of the product, as
QuIP# has it.
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
    """One of the transforms. norm: what the factors' product is divided by to be orthogonal.

    diagonal: `pre` or `post`, (features). perm: which outer feature each inner one is; None for its
    own.
    """

    factors: list[Tensor]
    norm: float
    diagonal: Tensor
    perm: Tensor | None = None

    def inner(self, x: Tensor) -> Tensor:
        """diag(norm) T^T P diag(diagonal) x for each row of x (..., features)."""
        x = x * self.diagonal.to(x.dtype)
        if self.perm is not None:
            x = x[..., self.perm]
        return kronecker(x, self.factors, transposed=True) / self.norm

    def outer(self, y: Tensor) -> Tensor:
        """diag(diagonal) P^T T y for each row of y: the transpose of `inner`."""
        y = kronecker(y, self.factors) / self.norm
        if self.perm is not None:
            y = torch.empty_like(y).index_copy_(-1, self.perm, y)
        return y * self.diagonal.to(y.dtype)


class IncoherentFormat(Format):
    """A format whose codes are read between two transforms. Not to be cut: its features are mixed."""

    algorithms = ("ldlq",)
    #: H = mean of x x^T; what the transforms are drawn from; rounds of coordinate descent after
    #: LDLQ
    quantize_only = {"hessian": None, "seed": 0, "passes": 2}

    @abstractmethod
    def sides(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> tuple[Side, Side]:
        """(input's, output's)."""

    @abstractmethod
    def grid_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        """G, float32 (N, K)."""

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        before, after = self.sides(tensors, shape, params)
        rows = before.outer(self.grid_values(tensors, shape, params))
        return after.outer(rows.T).T.contiguous()

    def cuts(self, shape: Shape, params: Params) -> Shape:
        return shape

    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return WEIGHT_ONLY

    def obstacle(self, shape: Shape, params: Params) -> str | None:
        for orders in self.orders(shape):
            kept = self.kept(orders)
            held = math.prod(
                max(16, 1 << (order - 1).bit_length()) for order in kept[:1] + kept[1:][-1:]
            )
            if max(kept, default=1) > LARGEST_FACTOR or held > 8192:
                return f"its transform has factors of {orders}, too large for one program"
        return None

    def kept(self, orders: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a side's orders whose factors kernels read; they make the others themselves."""
        return orders

    @abstractmethod
    def orders(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Orders of the factors of the input's and of the output's transform."""

    def kernel_sides(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        """`WeightOnlyParts.sides`."""
        found = {}
        for name, side in zip(("input", "output"), self.sides(tensors, shape, params), strict=True):
            found[f"{name}.diagonal"] = side.diagonal
            kept = side.factors[: len(self.kept(tuple(f.shape[0] for f in side.factors)))]
            found |= {f"{name}.factor{i}": f.contiguous() for i, f in enumerate(kept)}
            if side.perm is not None:
                found[f"{name}.perm"] = side.perm.to(torch.int32)
        return found
