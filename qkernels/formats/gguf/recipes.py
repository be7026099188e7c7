"""llama.cpp's mixtures of block types: which linear layer gets which.

q4_k_m and q5_k_m give Q6_K to the layers that feel rounding most, the values and the feed-forward's
way back in the first and last eighth of the blocks and in every third between. Rows that are no
multiple of 256 fall back to a type with blocks of 32, and those that are no multiple of 32 stay
float16.

Source: what llama.cpp's `llama-quantize` decides (release b11434). Its mixtures of experts are not
covered.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

#: recipe -> type of most layers
RECIPES = {"q4_k_m": "q4_k", "q5_k_m": "q5_k"}
_FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_LLAMA_70B_LAYERS = 80


def assign(recipe: str, model: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, str]:
    """Name of each linear (full names) -> format. ValueError if a name does not tell its block."""
    config: Any = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(
            f"{recipe}: expected a model whose config has num_hidden_layers, got {config!r}"
        )
    return {
        name: _type_of(recipe, name, linear.in_features, layers) for name, linear in linears.items()
    }


def _type_of(recipe: str, name: str, k: int, layers: int) -> str:
    kind = RECIPES[recipe]
    found = re.search(r"layers\.(\d+)\.", name)
    if name.endswith(("v_proj", "down_proj")):
        if found is None:
            raise ValueError(f"{name}: {recipe}: expected its block's number in the name")
        if more_bits(int(found[1]), layers):
            kind = "q6_k"
        elif name.endswith("v_proj") and kind == "q4_k" and layers == _LLAMA_70B_LAYERS:
            kind = "q5_k"  # eight heads share these values, and they are few
    if k % 256:
        kind = _FALLBACK[kind] if k % 32 == 0 else "fp16"
    return kind


def more_bits(layer: int, layers: int) -> bool:
    """Whether this block's sensitive layers get more bits."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
