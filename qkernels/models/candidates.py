"""Chooses the linear layers of a model to quantize; warns of those that must stay unquantized."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from ..nn import experts
from ..nn.embedding import output_embeddings
from ..nn.linear import QuantLinear, computes_otherwise, is_linear, linear_of
from .weight_readers import layers_read_by

#: names of the output projection in models without `get_output_embeddings`
_OUTPUT_NAMES = ("lm_head", "output")


def linears(model: nn.Module, skip: Iterable[str] | None) -> list[tuple[list[str], nn.Linear]]:
    """(all names, module) of the linear layers to quantize. Raises ValueError if there are none.

    Warns of layers that cannot be quantized, because the model would not call a packed layer in
    their place, or would compute something else with it.
    """
    if is_linear(model):
        raise ValueError(
            "model: expected a module with linear layers in it, which are replaced there, got a "
            f"bare {type(model).__name__}; qkernels.QuantLinear.from_linear makes a packed layer "
            "of one"
        )
    patterns = [skip] if isinstance(skip, str) else list(skip or ())
    unmatched = set(patterns)
    layers: dict[int, tuple[list[str], nn.Module]] = {}
    skipped = _heads(model)
    routers = {id(module) for _, module in experts.routers(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        if not is_linear(module) or id(module) in routers:
            continue
        matches = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        unmatched -= matches
        layers.setdefault(id(module), ([], module))[0].append(name)
        if matches:
            skipped.add(id(module))
    if unmatched:
        names = [names[0] for names, _ in layers.values()]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(
            f"skip: expected patterns that match a linear layer ({shown or 'there is none'}), "
            f"got {sorted(unmatched)[0]!r}"
        )
    skipped |= _unfit(
        model, {key: names[0] for key, (names, _) in layers.items() if key not in skipped}
    )
    chosen = [(names, linear_of(m)) for key, (names, m) in layers.items() if key not in skipped]
    if not chosen:
        raise ValueError(
            "model: expected at least one nn.Linear to quantize, got none "
            f"({len(skipped)} skipped, {_count_quantized(model)} quantized already)"
        )
    return chosen


def _heads(model: nn.Module) -> set[int]:
    """ids of the linear layers that compute a model's output.

    That is the output projection, or all layers outside the base model, as in a classifier.
    """
    output = output_embeddings(model)
    if output is not None:
        return {id(output)}
    heads = {id(m) for n, m in model.named_modules(remove_duplicate=False) if n in _OUTPUT_NAMES}
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return heads
    inside = {id(m) for m in base.modules() if is_linear(m) or isinstance(m, QuantLinear)}
    outside = [m for m in model.modules() if is_linear(m) and id(m) not in inside]
    # Where the base model is the smaller part, the rest is no head.
    return heads | {id(m) for m in outside} if len(outside) < len(inside) else heads


def _unfit(model: nn.Module, names: dict[int, str]) -> set[int]:
    """ids of the layers in `names` (id -> name) that cannot be packed; warns of them."""
    reasons: dict[str, list[int]] = {}
    # transformers' own quantizers also skip these layers.
    for entry in getattr(model, "_keep_in_fp32_modules", None) or ():
        pattern = re.compile(rf"(^|\.){entry}($|\.)")
        keys = [key for key, name in names.items() if pattern.search(name)]
        if keys:
            reasons[f"{type(model).__name__} keeps {entry} in float32"] = keys
    for module in model.modules():
        if id(module) in names and isinstance(module, nn.Linear) and computes_otherwise(module):
            reasons.setdefault(f"{type(module).__name__} computes something else", []).append(
                id(module)
            )
        if id(module) in names and "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            reasons.setdefault("its forward is replaced by another function", []).append(id(module))
        for path in layers_read_by(module):
            try:
                layer = module.get_submodule(path)
            except AttributeError:
                continue
            if id(layer) in names:
                reason = f"{type(module).__name__} computes with {path}.weight itself"
                reasons.setdefault(reason, []).append(id(layer))
    for reason, keys in reasons.items():
        count = f" and {len(keys) - 1} more like it" if len(keys) > 1 else ""
        warnings.warn(f"qkernels: {names[keys[0]]}{count} stays as it is: {reason}", stacklevel=4)
    return {key for keys in reasons.values() for key in keys}


def _count_quantized(model: nn.Module) -> int:
    return sum(isinstance(m, QuantLinear) for m in model.modules())
