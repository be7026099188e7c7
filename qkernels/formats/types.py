"""Type aliases that formats and grids share."""

from __future__ import annotations

from typing import Any

#: (N, K) of a weight: output features, input features
Shape = tuple[int, int]
#: parameters of a format by name, as `qkernels.quantize` takes them
Params = dict[str, Any]
