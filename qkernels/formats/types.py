"""The types that formats and grids share."""

from __future__ import annotations

from typing import Any

Shape = tuple[int, int]


Params = dict[str, Any]
