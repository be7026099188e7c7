"""Puts the fused layers of nn/fused.py into a whole model: its norms with their readers, its gated
feed-forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from .. import formats, layouts
from ..nn.fused import FusedGate, FusedNorm, NormReader, check_layers, norm_eps
from ..nn.linear import QuantLinear


@dataclass
class Fusions:
    """What `fuse_norms` did. `str()` of it is meant to be read.

    fused: (module, with what). left: (module, why it was left as it was: the norm runs by itself).
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"fused {name} with {what}" for name, what in self.fused]
        return "\n".join(lines + [f"not fused {name}: {why}" for name, why in self.left])


def fuse_norms(model: nn.Module) -> Fusions:
    """Fuse RMSNorms, and SiLU * up, of a Llama-like model with its 8-bit layers, in place.

    The model computes what it computed, with fewer passes over its activations; names of modules
    and tensors stay, so it can be saved as before. What cannot be fused is left as it is, and the
    result says why. A fused norm's readers take its output and nothing else.

    Raises ValueError for a model of a type that qkernels/quantizers/architectures.py does not know.
    """
    from ..quantizers import architectures

    architecture, found = architectures.of(model), Fusions()
    for path, block in architectures.blocks_of(model):
        for rule in architecture.rules:
            norm = _submodule(block, rule.before)
            if norm is None or isinstance(norm, (nn.Linear, QuantLinear)):
                continue
            readers = [_submodule(block, name) for name in rule.layers]
            why = _not_a_norm(norm) or _not_eight_bit(rule.layers, readers)
            if why is not None:
                found.left.append((f"{path}.{rule.before}", why))
                continue
            fused = [NormReader(layer) for layer in readers]  # type: ignore[arg-type]
            for name, layer in zip(rule.layers, fused, strict=True):
                _replace(block, name, layer)
            _replace(block, rule.before, FusedNorm(norm, fused))
            found.fused.append((f"{path}.{rule.before}", ", ".join(rule.layers)))
        gated = architecture.gated
        if gated is None:
            continue
        parent, down = (
            _submodule(block, gated.module),
            _submodule(block, f"{gated.module}.{gated.down}"),
        )
        if parent is None or isinstance(parent, FusedGate):
            continue
        name = f"{path}.{gated.module}"
        why = _not_silu(getattr(parent, gated.activation, None)) or _not_eight_bit(
            (gated.down,), [down]
        )
        if why is not None:
            found.left.append((name, why))
            continue
        _replace(block, gated.module, FusedGate(parent, gated.gate, gated.up, gated.down))
        found.fused.append((name, f"{gated.down}: silu({gated.gate}) * {gated.up}"))
    return found


# ---------------------------------------------------------------------- what is there
def _submodule(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _replace(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)


def _not_a_norm(norm: nn.Module) -> str | None:
    kind = type(norm).__name__
    if isinstance(norm, FusedNorm):
        return "it is fused already"
    # Gemma's multiply by 1 + weight
    if not kind.endswith("RMSNorm") or "Gemma" in kind or getattr(norm, "bias", None) is not None:
        return f"expected an RMSNorm without bias, got {kind}"
    if not isinstance(getattr(norm, "weight", None), Tensor) or norm_eps(norm) is None:
        return f"{kind} has no weight or no epsilon under a name known here"
    return None


def _not_eight_bit(names: Sequence[str], layers: Sequence[nn.Module | None]) -> str | None:
    for name, layer in zip(names, layers, strict=True):
        if not isinstance(layer, QuantLinear):
            return f"{name} is no quantized layer but {type(layer).__name__}"
        p = layer.packed
        if obstacle := formats.get(p.format).obstacle(p.shape, p.params):
            return f"{name}: {obstacle}: plain norm, then matmul"
        if formats.get(p.format).kernel_layout(p.params) != layouts.EIGHT_BIT:
            return f"{name}: {p.format} is weight-only, so no activations are quantized: plain norm, then matmul"
    try:
        check_layers(layers)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return None


def _not_silu(activation: object) -> str | None:
    kind = type(activation).__name__
    return None if kind in ("SiLU", "SiLUActivation") else f"expected SiLU between, got {kind}"
