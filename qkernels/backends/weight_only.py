"""Shared by both languages' launchers of the weight-only family."""

from __future__ import annotations

from functools import lru_cache

from .. import formats
from ..layouts import weight_only as layout
from .problem import Problem


@lru_cache(maxsize=4096)
def traits_of(problem: Problem) -> layout.WeightOnlyTraits:
    """Codes, scales and transforms of the problem's weight."""
    return formats.get(problem.format).weight_only_traits(problem.shape, dict(problem.params))
