"""Plans of torch.library operators, found by the tensors of the weight that an operator is given.

A plan is what the first call with operands of certain shapes works out for the calls after it: the
kernel, and what it launches. An eager call keeps its plans in the `PackedWeight`
(`PackedWeight.plans`). An operator is given the weight's tensors alone, so its plans are kept here,
by the addresses of those tensors. They keep no tensor alive: they are dropped with the first one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

#: plans of one weight; a server sees many values of M
MAX_PLANS = 1024

#: addresses of a weight's tensors -> its first tensor, and its plans by key
_PLANS: dict[tuple[int, ...], tuple[weakref.ref[Tensor], dict[Any, Any]]] = {}


def find(storage: Sequence[Tensor], key: Any) -> Any:
    """The plan that `remember` was given for this weight's tensors and key, or None."""
    weight = _PLANS.get(_addresses(storage))
    if weight is None or (plan := weight[1].get(key)) is None:
        return None
    first, _ = weight
    # A later tensor can have the same address. A strided tensor is copied at each call.
    if first() is not storage[0] or not all(t.is_contiguous() for t in storage):
        return None
    return plan


def remember(storage: Sequence[Tensor], key: Any, plan: Any) -> None:
    """Keep `plan` until the first tensor is gone."""
    addresses, first = _addresses(storage), storage[0]
    weight = _PLANS.get(addresses)
    if weight is None or weight[0]() is not first:
        # `pop` is bound here, because at exit there are no globals
        forget = partial(_PLANS.pop, addresses, None)
        weight = _PLANS[addresses] = weakref.ref(first, lambda _: forget()), {}
    add(weight[1], key, plan)


def add(plans: dict[Any, Any], key: Any, plan: Any) -> None:
    """Add a plan to those of one weight, which start anew when there are MAX_PLANS."""
    if len(plans) >= MAX_PLANS:
        plans.clear()
    plans[key] = plan


def holds(storage: Mapping[str, Tensor], given: Iterable[Tensor]) -> bool:
    """Whether a weight holds the very tensors that an operator was given, not copies of them.

    Copies are gone after the call, so no plan may have their addresses.
    """
    return all(tensor is one for tensor, one in zip(storage.values(), given, strict=False))


def _addresses(storage: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([t.data_ptr() for t in storage])
