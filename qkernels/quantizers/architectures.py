"""Which operator feeds which layers in the models we know: the one place with names of modules.

AWQ and SmoothQuant multiply the columns of a linear layer's weight by scales, so the operator
before must divide its output by them. Each rule names that operator and the layers that read its
output, relative to a decoder block. A rule applies if all its modules exist.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Rule(NamedTuple):
    """An operator and the layers that read its output.

    Attributes:
        before: a norm, or a linear layer with only multiplications between it and its readers.
        layers: the readers.
    """

    before: str
    layers: tuple[str, ...]


class Gated(NamedTuple):
    """Names of a block's feed-forward, down(activation(gate(x)) * up(x)), and of its children."""

    module: str
    gate: str
    up: str
    down: str
    activation: str


class Architecture(NamedTuple):
    """The modules of one model type.

    Attributes:
        blocks: name of the nn.ModuleList of decoder blocks.
        rules: rules in order of execution.
        gated: the gated feed-forward module, if the model has one.
    """

    blocks: str
    rules: tuple[Rule, ...]
    gated: Gated | None = None


_LLAMA = Architecture(
    "model.layers",
    (
        Rule("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Rule("self_attn.v_proj", ("self_attn.o_proj",)),
        Rule("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Rule("mlp.up_proj", ("mlp.down_proj",)),
    ),
    Gated("mlp", "gate_proj", "up_proj", "down_proj", "act_fn"),
)
_OPT = Architecture(
    "model.decoder.layers",
    (
        Rule("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Rule("self_attn.v_proj", ("self_attn.out_proj",)),
        Rule("final_layer_norm", ("fc1",)),
        Rule("fc1", ("fc2",)),  # ReLU between: positive scales pass through it
    ),
)
_GPT2 = Architecture(
    "transformer.h",
    (Rule("ln_1", ("attn.c_attn",)), Rule("ln_2", ("mlp.c_fc",))),  # GELU follows c_fc
)
#: config.model_type -> architecture
BY_MODEL_TYPE = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": _OPT,
    "gpt2": _GPT2,
}


def of(model: nn.Module) -> Architecture:
    """The architecture of `model`. Raises ValueError, naming the known types, for another type."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in BY_MODEL_TYPE:
        raise ValueError(
            f"model: expected one of the types {', '.join(sorted(BY_MODEL_TYPE))}, got {kind!r}; "
            "qkernels/quantizers/architectures.py says which operator feeds which layers"
        )
    return BY_MODEL_TYPE[kind]


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of each decoder block.

    A model of an unknown type has them in its longest nn.ModuleList with linear layers.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in BY_MODEL_TYPE:
        path = BY_MODEL_TYPE[kind].blocks
        return [
            (f"{path}.{i}", block) for i, block in enumerate(model.get_submodule(path).children())
        ]
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(isinstance(child, nn.Linear) for child in module.modules())
    ]
    if not lists:
        raise ValueError("model: expected decoder blocks in an nn.ModuleList, found none")
    path, blocks = max(lists, key=lambda item: len(item[1]))
    return [(f"{path}.{i}", block) for i, block in enumerate(blocks)]


def fold(before: nn.Module, scale: object, layers: list[nn.Linear]) -> bool:
    """Divide the output of `before` by scale (K), and multiply the columns of the layers' weights.

    Returns False, and changes nothing, unless `before` has exactly K outputs: with grouped-query
    attention v_proj has fewer.
    """
    import torch

    assert isinstance(scale, torch.Tensor)
    weight = before.weight
    assert isinstance(weight, torch.Tensor)
    if weight.shape[0] != scale.numel():
        return False
    with torch.no_grad():
        if isinstance(before, nn.Linear):
            weight.div_(scale.to(weight.dtype)[:, None])
        elif _adds_one(before):
            weight.copy_((weight + 1) / scale.to(weight.dtype) - 1)
        else:
            weight.div_(scale.to(weight.dtype))
        bias = getattr(before, "bias", None)
        if bias is not None:
            bias.div_(scale.to(bias.dtype))
        for layer in layers:
            layer.weight.mul_(scale.to(layer.weight.dtype))
    return True


def _adds_one(norm: nn.Module) -> bool:
    """Whether the norm multiplies by 1 + weight, as Gemma's do."""
    return "Gemma" in type(norm).__name__
