"""Puts the fused layers of nn/fused.py into a model, for its norms and gated feed-forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from .. import formats, layouts
from ..nn.fused import FusedGate, FusedNorm, NormReader, check_layers, norm_eps
from ..nn.linear import QuantLinear


@dataclass
class Fusions:
    """The report of `fuse_norms`; `str()` makes it readable.

    Attributes:
        fused: (module, the layers or the expression it is fused with).
        left: (module, the reason why it was not fused), so that it still runs as a kernel by
            itself.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"fused {name} with {what}" for name, what in self.fused]
        return "\n".join(lines + [f"not fused {name}: {why}" for name, why in self.left])


def fuse_norms(model: nn.Module) -> Fusions:
    """Fuse RMSNorms, and SiLU * up, of a Llama-like model with its 8-bit layers, in place.

    The model computes the same with fewer passes over its activations. Names of modules and tensors
    stay, so it can be saved as before. Modules that cannot be fused stay unchanged, and the result
    gives the reason. The layers behind a fused norm take only its output.

    Raises ValueError for a model of a type that qkernels/quantizers/architectures.py does not know.
    """
    from ..quantizers import architectures

    architecture, fusions = architectures.of(model), Fusions()
    for path, block in architectures.blocks_of(model):
        for rule in architecture.rules:
            norm = _submodule(block, rule.before)
            if norm is None or isinstance(norm, (nn.Linear, QuantLinear)):
                continue
            readers = [_submodule(block, name) for name in rule.layers]
            reason = _why_not_norm(norm) or _why_not_eight_bit(rule.layers, readers)
            if reason is not None:
                fusions.left.append((f"{path}.{rule.before}", reason))
                continue
            fused = [NormReader(layer) for layer in readers]  # type: ignore[arg-type]
            for name, layer in zip(rule.layers, fused, strict=True):
                _replace(block, name, layer)
            _replace(block, rule.before, FusedNorm(norm, fused))
            fusions.fused.append((f"{path}.{rule.before}", ", ".join(rule.layers)))
        gated = architecture.gated
        if gated is None:
            continue
        parent = _submodule(block, gated.module)
        down = _submodule(block, f"{gated.module}.{gated.down}")
        if parent is None or isinstance(parent, FusedGate):
            continue
        name = f"{path}.{gated.module}"
        activation = getattr(parent, gated.activation, None)
        reason = _why_not_silu(activation) or _why_not_eight_bit((gated.down,), [down])
        if reason is not None:
            fusions.left.append((name, reason))
            continue
        _replace(block, gated.module, FusedGate(parent, gated.gate, gated.up, gated.down))
        fusions.fused.append((name, f"{gated.down}: silu({gated.gate}) * {gated.up}"))
    return fusions


# ---------------------------------------------------------------------- modules and their checks
def _submodule(block: nn.Module, name: str) -> nn.Module | None:
    """The module `name` of `block`, or None."""
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _replace(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)


def _why_not_norm(norm: nn.Module) -> str | None:
    """The reason why `norm` cannot be fused, or None."""
    kind = type(norm).__name__
    if isinstance(norm, FusedNorm):
        return "it is fused already"
    # Gemma's norms multiply by 1 + weight.
    if not kind.endswith("RMSNorm") or "Gemma" in kind or getattr(norm, "bias", None) is not None:
        return f"expected an RMSNorm without bias, got {kind}"
    if not isinstance(getattr(norm, "weight", None), Tensor) or norm_eps(norm) is None:
        return f"{kind} has no weight or no epsilon under a name known here"
    return None


def _why_not_eight_bit(names: Sequence[str], layers: Sequence[nn.Module | None]) -> str | None:
    """The reason why a norm or gate cannot be fused with these layers, or None."""
    for name, layer in zip(names, layers, strict=True):
        if not isinstance(layer, QuantLinear):
            return f"{name} is no quantized layer but {type(layer).__name__}"
        p = layer.packed
        if obstacle := formats.get(p.format).obstacle(p.shape, p.params):
            return f"{name}: {obstacle}: plain norm, then matmul"
        if formats.get(p.format).kernel_layout(p.params) != layouts.EIGHT_BIT:
            return (
                f"{name}: {p.format} is weight-only, so no activations are quantized: "
                "plain norm, then matmul"
            )
    try:
        check_layers(layers)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return None


def _why_not_silu(activation: object) -> str | None:
    """The reason why an activation cannot be fused, or None."""
    kind = type(activation).__name__
    return None if kind in ("SiLU", "SiLUActivation") else f"expected SiLU between, got {kind}"
