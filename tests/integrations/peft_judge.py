"""A quantized model with adapters, and PEFT's own on nn.Linear with the dequantized weights."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import nn

import qkernels as qk
from qkernels.integrations.peft import with_quant_linear

from ..tiny import tiny_model

NF4: tuple[str, dict[str, Any]] = ("nf4", {"block_size": 32})


def bases(
    base: tuple[str, dict[str, Any]] = NF4,
    dtype: torch.dtype = torch.float32,
    skip: list[str] | None = None,
    **changes: Any,
) -> tuple[Any, Any]:
    """(a quantized model, the same with plain layers).

    changes: arguments of `tiny_model`.
    """
    model = tiny_model(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    model.to(dtype)
    plain = copy.deepcopy(model)
    qk.quantize_model(model, base[0], skip=skip, progress=False, **base[1])
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, qk.QuantLinear):
                plain.get_submodule(name).weight.copy_(layer.packed.dequantize())
    return model, plain


def pair(
    adapters: tuple[str, ...] = ("default",), options: Any = None, **kwargs: Any
) -> tuple[Any, Any]:
    """(ours, PEFT's): the models of `bases` in eval mode, with equal random adapters."""
    model, plain = bases(**kwargs)
    options = {"r": 4, "target_modules": "all-linear", **(options or {})}
    both = []
    for base, ours in ((model, True), (plain, False)):
        tuned: Any = None
        for name in adapters:
            config = peft.LoraConfig(**copy.deepcopy(options))
            config = with_quant_linear(config, base) if ours else config
            if tuned is None:
                tuned = peft.get_peft_model(base, config, adapter_name=name)
            else:
                tuned.add_adapter(name, config)
        tuned.base_model.set_adapter(list(adapters))
        both.append(tuned.eval())
    same_adapters(*both)
    return both[0], both[1]


def same_adapters(ours: Any, theirs: Any, seed: int = 1) -> None:
    """Give both models the same random adapter weights; they must have the same adapters."""
    generator = torch.Generator().manual_seed(seed)
    mine = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    judge = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    assert mine.keys() == judge.keys()
    with torch.no_grad():
        for name, parameter in judge.items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            mine[name].copy_(parameter)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())


def plain_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
