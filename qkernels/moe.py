"""QuantExperts: what transformers calls `experts` in a mixture of experts, with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import formats
from .experts import PackedExperts, quantize_experts
from .formats.base import check_weight
from .grouped import fused_moe


class QuantExperts(nn.Module):
    """y = sum over a token's experts of weight * down(act(gate(x)) * up(x)), weights packed.

    Takes the place of transformers' modules that hold `gate_up_proj` (E, 2 * I, K) and `down_proj` (E, N, I) as
    parameters, and is called as they are. `state_dict()` holds the checkpoint's own tensors of each expert; loading
    one, and `qkernels.save_model`, are not supported yet.
    """

    def __init__(
        self,
        gate_up: PackedExperts,
        down: PackedExperts,
        activation: str = "silu",
        backend: str = "auto",
        batch_invariant: bool | None = None,
    ) -> None:
        """Everything as in `qkernels.fused_moe`."""
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self.backend, self.batch_invariant = backend, batch_invariant

    @classmethod
    def from_module(cls, module: nn.Module, format: str, **params: Any) -> QuantExperts:
        """Quantize such a module by round-to-nearest; it is left as it was.

        Raises ValueError if it is none (weights transposed, biases, another activation), or as `quantize_experts`.
        """
        gate_up, down, activation = _parts(module)
        return cls(
            quantize_experts(gate_up.detach(), format, **params),
            quantize_experts(down.detach(), format, **params),
            activation,
        ).train(module.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, K), top_k_index and top_k_weights (T, top_k) -> (T, N)."""
        return fused_moe(
            hidden_states, self.gate_up, self.down, top_k_weights, top_k_index, self.activation, self.backend,
            self.batch_invariant,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantExperts:
        super()._apply(fn, recurse)
        device = fn(
            torch.empty(0, device=self.gate_up.device)
        ).device  # dtypes of packed tensors never change
        if device != self.gate_up.device:
            self.gate_up, self.down = self.gate_up.to(device), self.down.to(device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("gate_up", "down"):
            for key, tensor in getattr(self, name).state.items():
                destination[f"{prefix}{name}.{key}"] = tensor

    def extra_repr(self) -> str:
        return f"gate_up={self.gate_up!r}, down={self.down!r}, activation={self.activation!r}"


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of modules whose own parameters are weights of experts, (E, ., .)."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(key in own and own[key].dim() == 3 for key in ("gate_up_proj", "down_proj")):
            yield name, module


def check(module: nn.Module, format: str, params: dict[str, Any]) -> None:
    """ValueError unless `QuantExperts.from_module` can quantize the module with these parameters."""
    for stack in _parts(module)[:2]:
        formats.get(format).resolve((stack.shape[1], stack.shape[2]), params)
        check_weight(f"{format}: experts", stack.detach().flatten(0, 1))


def _parts(module: nn.Module) -> tuple[Tensor, Tensor, str]:
    """gate_up (E, 2 * I, K), down (E, N, I) and the activation of a module of experts."""
    own = dict(module.named_parameters(recurse=False))
    if set(own) != {"gate_up_proj", "down_proj"}:
        raise ValueError(f"experts: expected parameters gate_up_proj and down_proj alone, got {sorted(own)}")
    gate_up, down = own["gate_up_proj"], own["down_proj"]
    if getattr(module, "is_transposed", False) or gate_up.shape[1] != 2 * down.shape[2]:
        raise ValueError(
            f"experts: expected gate_up_proj (E, 2 * I, K) and down_proj (E, N, I), got {tuple(gate_up.shape)} and "
            f"{tuple(down.shape)}" + (", transposed" if getattr(module, "is_transposed", False) else "")
        )
    act = getattr(module, "act_fn", None)
    probe = torch.linspace(-6, 6, 64, dtype=torch.float64)
    for name, known in (("silu", nn.functional.silu), ("gelu", nn.functional.gelu)):
        if callable(act) and torch.allclose(act(probe), known(probe)):
            return gate_up, down, name
    raise ValueError(f"experts: act_fn: expected SiLU or GELU, got {act}")
