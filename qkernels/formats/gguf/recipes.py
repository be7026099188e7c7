"""llama.cpp's mixtures of block types: the type of each linear layer.

q4_k_m and q5_k_m give Q6_K to the layers that are most sensitive to rounding: v_proj and down_proj
in the first and last eighth of the decoder blocks and in every third block between. Rows that are
no multiple of 256 fall back to a type with blocks of 32, and rows that are no multiple of 32 to
float16.

Source: the decisions of llama.cpp's `llama-quantize` (release b11434). Its rules for mixtures of
experts are not implemented.
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
    """Full name of each linear layer -> format.

    Raises ValueError if a name that needs it has no block number.
    """
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
    """Type of the layer `name` with k input features, in a model with `layers` blocks."""
    kind = RECIPES[recipe]
    number = re.search(r"layers\.(\d+)\.", name)
    if name.endswith(("v_proj", "down_proj")):
        if number is None:
            raise ValueError(f"{name}: {recipe}: expected its block's number in the name")
        if more_bits(int(number[1]), layers):
            kind = "q6_k"
        elif name.endswith("v_proj") and kind == "q4_k" and layers == _LLAMA_70B_LAYERS:
            kind = "q5_k"  # eight heads share these few weights
    if k % 256:
        kind = _FALLBACK[kind] if k % 32 == 0 else "fp16"
    return kind


def more_bits(layer: int, layers: int) -> bool:
    """Whether this block's sensitive layers get more bits."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
