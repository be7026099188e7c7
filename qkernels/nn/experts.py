"""QuantExperts: the `experts` module of a mixture of experts in transformers, packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import formats
from ..formats.base import accumulate_dtype, check_weight
from ..ops.moe import ACTIVATIONS, fused_moe, grouped_matmul, weighted_sum
from ..weights.experts import PackedExperts
from ..weights.packed import PackedWeight, quantize
from ..weights.sharding import ROWS, join_rows, narrow
from .base import refuse_save_pretrained

#: the three weights of an expert
GATE, UP, DOWN = ROLES = ("gate", "up", "down")
#: their default names in a checkpoint
LEAVES = {role: f"{role}_proj" for role in ROLES}


class ExpertParts:
    """E experts with gate (I, K), up (I, K) and down (N, I), stacked once.

    Gate and up are one weight with the gate's rows first, if one weight can hold both bit for bit
    (`join_rows`). It cannot with scales of whole tensors, act-order or bitsandbytes' quant states;
    then gate and up are two weights, and two products.

    Attributes:
        first: the stacks of the first product: [gate above up], or [gate, up].
        down: the stack of the second product.
    """

    def __init__(
        self, gate: Sequence[PackedWeight], up: Sequence[PackedWeight], down: Sequence[PackedWeight]
    ) -> None:
        """From each expert's weights.

        ValueError, naming the expert, if experts differ in format, parameters or shape.
        """
        joined = []
        for pair in zip(gate, up, strict=True):
            whole = join_rows(pair)
            if whole is None:
                break
            joined.append(whole)
        stacks = [joined] if len(joined) == len(gate) else [list(gate), list(up)]
        self.first = [PackedExperts(stack) for stack in stacks]
        self.down = PackedExperts(down)

    @classmethod
    def of(cls, first: Sequence[PackedExperts], down: PackedExperts) -> ExpertParts:
        """From stacks, without stacking again."""
        self = cls.__new__(cls)
        self.first, self.down = list(first), down
        return self

    @property
    def stacks(self) -> list[PackedExperts]:
        return [*self.first, self.down]

    @property
    def count(self) -> int:
        return self.down.count

    @property
    def device(self) -> torch.device:
        return self.down.device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.stacks)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors in their current layout."""
        return sum(t.nbytes for part in self.stacks for t in part.storage.values())

    def expert(self, e: int) -> dict[str, PackedWeight]:
        """Gate, up and down of expert e, 0..E-1, in the checkpoint layout.

        No two of them share memory. ValueError if gate and up are one weight that cannot be cut, as
        with nested quantization.
        """
        first = [stack.expert(e) for stack in self.first]
        if len(first) == 1:
            rows = first[0].shape[0]
            # `tensors` rebuilds the checkpoint's tensors from a kernel layout: once for both halves
            whole = PackedWeight(first[0].format, first[0].shape, first[0].tensors, first[0].params)
            gate, up = narrow(whole, ROWS, 0, rows // 2), narrow(whole, ROWS, rows // 2, rows)
            shared = {tensor.data_ptr() for tensor in gate.storage.values()}
            tensors = {k: t.clone() if t.data_ptr() in shared else t for k, t in up.storage.items()}
            first = [gate, PackedWeight(up.format, up.shape, tensors, up.params, up.layout)]
        return dict(zip(ROLES, (*first, self.down.expert(e)), strict=True))

    def to(self, device: torch.device | str) -> ExpertParts:
        return self.of([part.to(device) for part in self.first], self.down.to(device))

    def run(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        activation: str = "silu",
        batch_invariant: bool | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """x (T, K), weights and ids (T, top_k) -> (T, N), as `qkernels.fused_moe`."""
        options: dict[str, Any] = {"batch_invariant": batch_invariant, "backend": backend}
        if len(self.first) == 1:
            return fused_moe(x, self.first[0], self.down, weights, ids, activation, **options)
        gate, up = (grouped_matmul(x, stack, ids, **options) for stack in self.first)
        dtype = accumulate_dtype(x.dtype)
        h = (ACTIVATIONS[activation](gate.to(dtype)) * up.to(dtype)).to(x.dtype)
        y = grouped_matmul(h, self.down, ids, **options)
        return weighted_sum(y, weights, dtype).to(x.dtype)

    def prepack(self, dtype: torch.dtype, activation: str, batch_invariant: bool | None) -> None:
        """Move the bytes to the kernels' layout, once.

        A call with one token does it, whose only expert id means "not here".
        """
        device, k = self.down.device, self.first[0].shape[1]
        nowhere = torch.full((1, 1), -1, dtype=torch.int32, device=device)
        weights = torch.zeros(1, 1, device=device)
        self.run(
            torch.zeros(1, k, dtype=dtype, device=device),
            weights,
            nowhere,
            activation,
            batch_invariant,
        )


class QuantExperts(nn.Module):
    """y = sum over a token's experts of weight * down(act(gate(x)) * up(x)), weights packed.

    Replaces transformers' modules with parameters `gate_up_proj` (E, 2 * I, K) and `down_proj`
    (E, N, I), and is called as they are. `state_dict()` has the checkpoint's own tensors of each
    expert, named "3.gate_proj.qweight" and so on (`leaves` has the names). `load_state_dict` does
    not take them; `qkernels.load_model` does.
    """

    leaves: Mapping[str, str] = LEAVES

    def __init__(
        self,
        gate_up: PackedExperts | Sequence[PackedExperts],
        down: PackedExperts,
        activation: str = "silu",
        backend: str = "auto",
        batch_invariant: bool | None = None,
    ) -> None:
        """The arguments of `qkernels.fused_moe`. gate_up: one stack, or a stack of gates and a
        stack of ups.
        """
        super().__init__()
        first = [gate_up] if isinstance(gate_up, PackedExperts) else list(gate_up)
        self.parts = ExpertParts.of(first, down)
        self.activation, self.backend, self.batch_invariant = activation, backend, batch_invariant

    @classmethod
    def from_experts(
        cls,
        gate: Sequence[PackedWeight],
        up: Sequence[PackedWeight],
        down: Sequence[PackedWeight],
        activation: str = "silu",
    ) -> QuantExperts:
        """From each expert's weights. ValueError, naming the expert, if they do not agree."""
        parts = ExpertParts(gate, up, down)
        return cls(parts.first, parts.down, activation)

    @classmethod
    def from_module(cls, module: nn.Module, format: str, **params: Any) -> QuantExperts:
        """Quantize a module of experts by round-to-nearest; the module is not changed.

        Raises ValueError as `qkernels.quantize` does, and for a module that computes anything else
        (transposed weights, biases, another activation).
        """
        gate_up, down, activation = expert_weights(module)
        params = formats.get(format).complete(shapes(module), params)
        halves = [_halves(weight.detach(), format, params) for weight in gate_up]
        gate, up = zip(*halves, strict=True)
        downs = [quantize(weight.detach(), format, **params) for weight in down]
        return cls.from_experts(gate, up, downs, activation).train(module.training)

    @property
    def gate_up(self) -> PackedExperts | tuple[PackedExperts, PackedExperts]:
        """One stack with gate above up if one weight can hold both, else a stack of each."""
        first = self.parts.first
        return first[0] if len(first) == 1 else (first[0], first[1])

    @property
    def down(self) -> PackedExperts:
        return self.parts.down

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, K), top_k_index and top_k_weights (T, top_k) -> (T, N)."""
        return self.parts.run(
            hidden_states,
            top_k_weights,
            top_k_index,
            self.activation,
            self.batch_invariant,
            self.backend,
        )

    @property
    def nbytes(self) -> int:
        return self.parts.nbytes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantExperts:
        super()._apply(fn, recurse)
        old = self.parts.device
        device = fn(torch.empty(0, device=old)).device  # dtypes of packed tensors never change
        if device != old:
            self.parts = self.parts.to(device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        refuse_save_pretrained()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for e in range(self.parts.count):
            for role, packed in self.parts.expert(e).items():
                for name, tensor in packed.tensors.items():
                    destination[f"{prefix}{e}.{self.leaves[role]}.{name}"] = tensor

    def extra_repr(self) -> str:
        return f"gate_up={self.gate_up!r}, down={self.down!r}, activation={self.activation!r}"


def _halves(
    weight: Tensor, format: str, params: dict[str, Any]
) -> tuple[PackedWeight, PackedWeight]:
    """Gate and up of gate_up (2 * I, K), quantized.

    Quantized together and cut in two, if the halves can be joined again; else one by one.
    """
    rows = weight.shape[0]
    try:
        whole = quantize(weight, format, **params)
        halves = narrow(whole, ROWS, 0, rows // 2), narrow(whole, ROWS, rows // 2, rows)
        if join_rows(halves) is not None:
            return halves
    except ValueError:  # a block or a group has rows of both halves
        pass
    return quantize(weight[: rows // 2], format, **params), quantize(
        weight[rows // 2 :], format, **params
    )


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the modules that have experts' weights (E, ., .) as direct parameters."""
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        stacks = [parameters.get(key) for key in ("gate_up_proj", "down_proj")]
        if any(stack is not None and stack.dim() == 3 for stack in stacks):
            yield name, module


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the routers of a model, packed or not.

    A router is a sibling of a module of experts; it has a `weight` of two dimensions, and its class
    has another forward than nn.Linear.
    """
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantExperts)]
    for name in (*(name for name, _ in expert_modules(model)), *packed):
        parent = name.rpartition(".")[0]
        for child, module in model.get_submodule(parent).named_children():
            weight = module._parameters.get("weight")
            if (
                weight is not None
                and weight.dim() == 2
                and type(module).forward is not nn.Linear.forward
            ):
                yield f"{parent}.{child}" if parent else child, module


def check(module: nn.Module, format: str, params: dict[str, Any]) -> None:
    """ValueError unless `QuantExperts.from_module` can quantize the module like this."""
    gate_up, down, _ = expert_weights(module)
    for stack, rows in ((gate_up, gate_up.shape[1] // 2), (down, down.shape[1])):
        formats.get(format).resolve((rows, stack.shape[2]), params)
        check_weight(f"{format}: experts", stack.detach().flatten(0, 1))


def shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (N, K) of the weights that `QuantExperts.from_module` quantizes.

    ValueError as `expert_weights`.
    """
    gate_up, down, _ = expert_weights(module)
    rows, k = gate_up.shape[1:]
    return {"gate_up_proj": (rows // 2, k), "down_proj": (down.shape[1], down.shape[2])}


def expert_weights(module: nn.Module) -> tuple[Tensor, Tensor, str]:
    """gate_up (E, 2 * I, K), down (E, N, I) and the activation of a module of experts.

    ValueError if the module computes anything else than `QuantExperts` does.
    """
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"gate_up_proj", "down_proj"}:
        raise ValueError(
            "experts: expected parameters gate_up_proj and down_proj alone, "
            f"got {sorted(parameters)}"
        )
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    transposed = getattr(module, "is_transposed", False)
    if transposed or gate_up.shape[1] != 2 * down.shape[2]:
        raise ValueError(
            "experts: expected gate_up_proj (E, 2 * I, K) and down_proj (E, N, I), "
            f"got {tuple(gate_up.shape)} and {tuple(down.shape)}"
            + (", transposed" if transposed else "")
        )
    others = sorted({name for name, _ in module.named_children()} - {"act_fn"})
    if others:  # for example a norm after each expert, or experts that return their input
        raise ValueError(f"experts: expected no module but act_fn, got {others[0]}")
    return gate_up, down, _activation(module)


def _activation(module: nn.Module) -> str:
    """The name in ACTIVATIONS of the activation that multiplies gate and up.

    ValueError if it is another one, or if the module computes more than the product. The module's
    functions are tried out on numbers.
    """
    act, gated = getattr(module, "act_fn", None), getattr(module, "_apply_gate", None)
    # Large values, too, because some activations clamp. On the CPU, even if torch's default device
    # is meta, as it is while a model without weights is built.
    values = [i / 8 for i in range(-48, 49)] + [-1e6, -1e3, -40, 40, 1e3, 1e6]
    gate = torch.tensor(values, dtype=torch.float64, device="cpu")
    up = gate.flip(0).roll(3)
    for name, function in ACTIVATIONS.items():
        try:
            if not torch.allclose(act(gate), function(gate)):  # type: ignore[misc]
                continue
            joined = torch.cat([gate, up], -1)[None]
            product = act(gate) * up if gated is None else gated(joined)[0]  # type: ignore[misc]
        except Exception:  # a module's own code can break in any way
            break
        if not torch.allclose(product.double(), function(gate) * up, rtol=1e-4, atol=1e-4):
            raise ValueError(
                f"experts: expected {name}(gate) * up, "
                f"got something more from {type(module).__name__}"
            )
        return name
    raise ValueError(f"experts: act_fn: expected SiLU or GELU, got {act}")
