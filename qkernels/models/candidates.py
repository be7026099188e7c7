"""Which linear layers of a model are quantized, which stay plain, and why."""

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

#: what the output projection is called in models that do not say (`get_output_embeddings`)
_OUTPUT_NAMES = ("lm_head", "output")


def linears(model: nn.Module, skip: Iterable[str] | None) -> list[tuple[list[str], nn.Linear]]:
    """(every name, module) of the linears to quantize. ValueError if there are none.

    Warns of those that cannot be: a packed layer in their place would not be computed with, or not
    rightly.
    """
    if is_linear(model):
        raise ValueError(
            f"model: expected a module with linear layers in it, which are replaced there, got a bare "
            f"{type(model).__name__}; qkernels.QuantLinear.from_linear makes a packed layer of one"
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
    places = [(names, linear_of(m)) for key, (names, m) in layers.items() if key not in skipped]
    if not places:
        raise ValueError(
            "model: expected at least one nn.Linear to quantize, got none "
            f"({len(skipped)} skipped, {_count_quantized(model)} quantized already)"
        )
    return places


def _heads(model: nn.Module) -> set[int]:
    """id of the linears that make a model's output: its output projection, or what a classifier has
    behind its base.
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
    # Where what is called the base is the smaller part, the rest is no head.
    return heads | {id(m) for m in outside} if len(outside) < len(inside) else heads


def _unfit(model: nn.Module, names: dict[int, str]) -> set[int]:
    """id of the linears, of those in `names`, that only plain weights can serve; says which and
    why.
    """
    reasons: dict[str, list[int]] = {}
    # as transformers' own quantizers do
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
                why = f"{type(module).__name__} computes with {path}.weight itself"
                reasons.setdefault(why, []).append(id(layer))
    for why, keys in reasons.items():
        count = f" and {len(keys) - 1} more like it" if len(keys) > 1 else ""
        warnings.warn(f"qkernels: {names[keys[0]]}{count} stays as it is: {why}", stacklevel=4)
    return {key for keys in reasons.values() for key in keys}


def _count_quantized(model: nn.Module) -> int:
    return sum(isinstance(m, QuantLinear) for m in model.modules())
