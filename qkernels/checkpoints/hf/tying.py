"""Tied weights: weights that a config makes one, such as the output projection and the embeddings.

The file decides. If it holds both weights and they differ, both are kept, as transformers does. If
it holds only one of them, the other weight shares it, packed or not.
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
from .names import has_custom_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tie(model: PreTrainedModel, where: Path) -> None:
    """Tie the weights that the config ties, unless the file holds different values for them.

    A weight that is still on the meta device is missing from the file. If no tied weight remains,
    the config is changed to say so.

    where: the file or directory, for messages.
    """
    still_tied, untied, groups = False, [], _groups(model)
    for source, targets in groups.items():
        names = [source, *targets]
        present = [name for name in names if not _is_missing(model, name)]
        if not present:
            continue  # the caller reports what is missing
        for name in names:
            if name == present[0]:
                continue
            if name in present and not _are_equal(model, name, present[0]):
                untied.append((name, present[0]))
                model.all_tied_weights_keys.pop(name, None)
                continue
            still_tied |= _share(model, name, present[0])
    plain = [
        pair for pair in untied if not any(isinstance(_module(model, n), Holder) for n in pair)
    ]
    for name, other in plain:
        warnings.warn(
            f"{where / CONFIG if where.is_dir() else where}: {name} and {other} are tied, but the "
            "file has another weight for each: both are kept",
            stacklevel=2,
        )
    if groups and not still_tied and getattr(model.config, "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False


def is_tied(model: PreTrainedModel) -> bool:
    """Whether any weights that the config ties, or head and embeddings, are the same tensor.

    For a model without a head and without tied weights: whether its config says that they are tied.
    """
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
    """The source of tied weights -> the names of the weights tied to it."""
    groups: dict[str, list[str]] = {}
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        groups.setdefault(source, []).append(target)
    return groups


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of the parameter `name`; None if the model has no such module."""
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


def _parameter(model: nn.Module, name: str) -> torch.Tensor | None:
    """The unpacked parameter or buffer `name`; None if there is none."""
    module, leaf = _module(model, name), name.rpartition(".")[2]
    if module is None or isinstance(module, Holder):
        return None
    slot = module._parameters.get(leaf)
    return module._buffers.get(leaf) if slot is None else slot


def _is_missing(model: nn.Module, name: str) -> bool:
    """Whether the file held no values for the weight `name`."""
    if isinstance(_module(model, name), Holder):
        return False
    parameter = _parameter(model, name)
    return parameter is None or parameter.is_meta


def _are_equal(model: nn.Module, name: str, other: str) -> bool:
    """Whether two unpacked weights have equal values, shapes and dtypes."""
    first, second = _parameter(model, name), _parameter(model, other)
    if first is None or second is None:
        return False
    return (
        first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)
    )


def _share(model: nn.Module, name: str, other: str) -> bool:
    """Make `name` the weight called `other`; True if an unpacked parameter is shared now."""
    module, source = _module(model, name), _module(model, other)
    assert module is not None
    if not isinstance(source, Holder):
        setattr(module, name.rpartition(".")[2], _parameter(model, other))
        return True
    put_in_place(model, name.rpartition(".")[0], source)
    return False


def put_in_place(model: nn.Module, prefix: str, source: Holder) -> None:
    """Give the layer `prefix` the packed weight of `source`.

    The layer gets dequantized values if it needs a plain weight.
    """
    module, packed = model.get_submodule(prefix), source.packed
    if has_custom_forward(module):
        module.weight = nn.Parameter(packed.dequantize(source.dtype), requires_grad=False)
    elif isinstance(module, nn.Embedding):
        model.set_submodule(prefix, QuantEmbedding(packed, source.dtype))
    else:
        layer = QuantLinear(packed, getattr(module, "bias", None), dtype=source.dtype)  # type: ignore[arg-type]
        model.set_submodule(prefix, layer.requires_grad_(False))
