"""Weights that a model's config ties together, as an output projection to the embeddings, and those
of its file.

The file wins: where it holds both, and they differ, both are kept, as transformers does it. Where
it holds one of them, the other shares its weight, packed or plain.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...nn.base import Holder
from ...nn.embedding import QuantEmbedding, input_embeddings, output_embeddings
from ...nn.linear import QuantLinear
from .model_config import CONFIG
from .names import own_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tie(model: PreTrainedModel, where: Path) -> None:
    """Tie what the config ties and the file at `where` does not hold twice with different values.

    Weights that are still on the meta device are those that the file lacks. The config then says
    what is so.
    """
    remaining, kept, groups = False, [], _groups(model)
    for source, targets in groups.items():
        names = [source, *targets]
        present = [name for name in names if not _is_missing(model, name)]
        if not present:
            continue  # the caller reports what is missing
        for name in names:
            if name == present[0]:
                continue
            if name in present and not _same(model, name, present[0]):
                kept.append((name, present[0]))
                model.all_tied_weights_keys.pop(name, None)
                continue
            remaining |= _share(model, name, present[0])
    plain = [pair for pair in kept if not any(isinstance(_module(model, n), Holder) for n in pair)]
    for name, other in plain:
        warnings.warn(
            f"{where / CONFIG if where.is_dir() else where}: {name} and {other} are tied, but the file has another "
            "weight for each: both are kept",
            stacklevel=2,
        )
    if groups and not remaining and getattr(model.config, "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False


def is_tied(model: PreTrainedModel) -> bool:
    """Whether weights that its config ties, or its head and its embeddings, are one; of a model
    without a head what its config says."""
    head = getattr(output_embeddings(model), "weight", None)
    table = getattr(input_embeddings(model), "weight", None)
    if isinstance(head, torch.Tensor) and head is table:
        return True
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    if head is None and not pairs:
        return bool(getattr(model.config, "tie_word_embeddings", False))
    return any(
        not isinstance(_module(model, target), Holder)
        and _parameter(model, target) is _parameter(model, source)
        for target, source in pairs.items()
        if _parameter(model, target) is not None
    )


def _groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """The source of tied weights -> what is tied to it."""
    groups: dict[str, list[str]] = {}
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        groups.setdefault(source, []).append(target)
    return groups


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


def _parameter(model: nn.Module, name: str) -> torch.Tensor | None:
    module, leaf = _module(model, name), name.rpartition(".")[2]
    if module is None or isinstance(module, Holder):
        return None
    slot = module._parameters.get(leaf)
    return module._buffers.get(leaf) if slot is None else slot


def _is_missing(model: nn.Module, name: str) -> bool:
    if isinstance(_module(model, name), Holder):
        return False
    parameter = _parameter(model, name)
    return parameter is None or parameter.is_meta


def _same(model: nn.Module, name: str, other: str) -> bool:
    first, second = _parameter(model, name), _parameter(model, other)
    if first is None or second is None:
        return False
    return (
        first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)
    )


def _share(model: nn.Module, name: str, other: str) -> bool:
    """Make `name` the weight called `other`. Whether a plain parameter is shared now."""
    module, source = _module(model, name), _module(model, other)
    assert module is not None
    if not isinstance(source, Holder):
        setattr(module, name.rpartition(".")[2], _parameter(model, other))
        return True
    put_in_place(model, name.rpartition(".")[0], source)
    return False


def put_in_place(model: nn.Module, prefix: str, source: Holder) -> None:
    """Give the layer called `prefix` the packed weight of `source`, or its values where only those
    will do.
    """
    module, packed = model.get_submodule(prefix), source.packed
    if own_forward(module):
        module.weight = nn.Parameter(packed.dequantize(source.dtype), requires_grad=False)
    elif isinstance(module, nn.Embedding):
        model.set_submodule(prefix, QuantEmbedding(packed, source.dtype))
    else:
        layer = QuantLinear(packed, getattr(module, "bias", None), dtype=source.dtype)  # type: ignore[arg-type]
        model.set_submodule(prefix, layer.requires_grad_(False))
