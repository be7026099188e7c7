"""Runs a part of a launcher by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qkernels.backends.plan import Compiled, Plan, Symbolic, addresses_of


def at_once(compiled: type[Compiled], declare: Callable[..., Any], *operands: Any) -> Any:
    """What `declare(plan, *operands)` returns, symbolic tensors, computed for these operands.

    compiled: the language's `Compiled`. operands: contiguous tensors and None.
    """
    assert all(t is None or t.is_contiguous() for t in operands)
    plan = Plan(operands)
    result = declare(plan, *plan.operands)
    memory = compiled(plan).run(operands, addresses_of(operands))

    def computed(value: Any) -> Any:
        if isinstance(value, tuple):  # a NamedTuple
            return type(value)(*map(computed, value))
        return value.within(memory) if isinstance(value, Symbolic) else value

    return computed(result)
