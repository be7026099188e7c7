"""fast-hadamard-transform 1.1 against our transform kernel: x times a Hadamard matrix of order K.

This is the work of a QuIP# layer around its product. There is no weight, so N plays no part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qkernels.backends.plan import Plan, Plans, Y
from qkernels.benchmark.race import Contestant, Layer
from qkernels.formats import transforms

from . import Peer

GROUP = "hadamard"


def _layer(call: nn.Module, k: int) -> Layer:
    """The layer of either contestant. Its bytes are those of a row in and a row out, in 16 bits."""
    factors = [factor.double() for factor in transforms.hadamard_factors(k)]

    def want(x: Tensor) -> Tensor:
        return transforms.kronecker(
            x.double(), [factor.to(x.device) for factor in factors]
        ) / math.sqrt(k)

    return Layer(call, 4 * k, want, 0.02)


class _Theirs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        from fast_hadamard_transform import hadamard_transform

        return hadamard_transform(x, scale=1 / math.sqrt(x.shape[1]))


class _Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[torch.Size, Plans] = {}

    def forward(self, x: Tensor) -> Tensor:
        from qkernels.backends.triton.launch import Compiled
        from qkernels.backends.triton.transforms import _launch

        plans = self._plans.setdefault(x.shape, Plans())
        memory = plans.start(x)
        if memory is None:

            def declare(plan: Plan) -> None:
                _launch(plan, plan.operands[0], plan.y, {}, math.sqrt(x.shape[1]), False)

            memory = plans.add(Compiled, declare, (x,), tuple(x.shape))
        y: Tensor = memory[Y]
        return y


def _is_power_of_two(k: int) -> bool:
    return k & (k - 1) == 0


class FastHadamard(Peer):
    name, group, module = "fast-hadamard-transform", GROUP, "fast_hadamard_transform"

    def takes(self, n: int, k: int, m: int) -> bool:
        return _is_power_of_two(k) and 64 <= k <= 32768

    def prepare(self, weight: Tensor) -> Layer:
        import fast_hadamard_transform

        if not hasattr(fast_hadamard_transform, "hadamard_transform"):
            raise ImportError("fast_hadamard_transform has no hadamard_transform")
        return _layer(_Theirs(), weight.shape[1])


class Ours(Contestant):
    name, group = "qkernels triton hadamard", GROUP

    def takes(self, n: int, k: int, m: int) -> bool:
        return _is_power_of_two(k) and 64 <= k <= 32768

    def unavailable(self) -> str | None:
        from qkernels.backends import triton

        return triton.unavailable()

    def prepare(self, weight: Tensor) -> Layer:
        return _layer(_Ours(), weight.shape[1])


CONTESTANTS = [FastHadamard(), Ours()]
