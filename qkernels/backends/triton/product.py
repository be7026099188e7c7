"""A product for one weight and problem: tuned and planned at its first call, then only started."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from ..plan import Plan, Plans, Product, Y, addresses_of
from . import autotune
from .configs import GemmConfig
from .launch import Compiled

if TYPE_CHECKING:
    from ...weights.packed import PackedWeight
    from ..problem import Problem

#: (plan, weight, configuration, problem): declares x @ W^T + bias of the plan's operands (x, bias)
Declare: TypeAlias = "Callable[[Plan, PackedWeight, GemmConfig, Problem], None]"


def product(family: str, tabled: GemmConfig, declare: Declare) -> Product:
    """The product of one weight and problem. family, tabled: as in `autotune.best`."""

    def first(
        kept: Plans, operands: tuple[Tensor, Tensor | None], p: PackedWeight, problem: Problem
    ) -> Tensor:
        x, plans = operands[0], dict[GemmConfig, Compiled]()

        def launch(config: GemmConfig) -> Tensor:
            if config not in plans:
                plan = Plan(operands, (x.shape[0], p.shape[0]))
                declare(plan, p, config, problem)
                plans[config] = Compiled(plan)
            y: Tensor = plans[config].run(operands, addresses_of(operands))[Y]
            return y

        config = autotune.best(family, problem, tabled, launch, x.device)
        result: Tensor = autotune.timed_first(problem, config, lambda: launch(config))
        kept.keep(operands, plans[config])
        return result

    return Product(first)
