"""Base class of the formats on an integer grid: their group size, and rounding to nearest."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from .base import Format
from .grid import check_group_size, default_group_size, round_to_nearest
from .types import Params, Shape


class Grouped(Format):
    """A format with the parameter `group_size` on a grid of grid.py (gptq, awq, pack_quantized)."""

    #: whether the format can store a short last group, so that group_size need not divide K
    short_groups: ClassVar[bool] = True

    def check_group_size(self, shape: Shape, params: Params) -> None:
        """Raise ValueError unless group_size is -1 or a size that the format can store."""
        check_group_size(self.name, shape[1], params["group_size"], self.short_groups)

    def complete(self, shapes: Mapping[str, Shape], params: Mapping[str, Any]) -> Params:
        """`params` with one group size for all shapes, if none is given.

        That is the default, or where the default does not divide every K, a size that suits the
        shapes better, with a warning.
        """
        default = self.defaults["group_size"]
        name = next((name for name, (_, k) in shapes.items() if k % default), None)
        if "group_size" in params or name is None:
            return dict(params)
        size = default_group_size([k for _, k in shapes.values()], default, self.short_groups)
        instead = (
            f"{default} with a short last group"
            if size == default
            else f"{size} instead of {default}"
        )
        warnings.warn(
            f"qkernels: group_size {instead}, because {default} does not divide the "
            f"{shapes[name][1]} input features of {name}",
            stacklevel=3,
        )
        return {**params, "group_size": size}

    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        return self.from_grid(round_to_nearest(weight, params), params)
