"""Expert modules built from files that store each expert's tensors separately.

Gate, up and down may each have a different format; all experts of a layer share it, because packed
weights are stacked unchanged. A module whose experts are all unquantized stays transformers' own
module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...nn.experts import DOWN, GATE, ROLES, UP, QuantExperts, expert_weights
from ...weights.packed import PackedWeight, pack
from ..tensor_files import TensorFiles
from .layers import TensorNames, scheme_of, stored_module
from .names import ExpertNames
from .quantization import Plan, Scheme

#: safetensors dtype of an unquantized weight -> format that holds it among packed ones, None if
#: none does
_STORED_FORMATS = {"F16": "fp16", "BF16": "bf16", "F32": None, "F64": None}
_DENSE_FORMATS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
#: the weights of one layer: (expert, role) -> names of its tensors
Weights = Mapping[tuple[int, str], TensorNames]


@dataclass(frozen=True)
class LoadContext:
    """A model directory and how to load it.

    dtype: dtype of unquantized tensors, None to keep the files'.
    activation_dtype: safetensors dtype of the embeddings and so of the activations. Unquantized
    linear layers must be stored in it. None allows any.
    """

    directory: Path
    files: TensorFiles
    plan: Plan
    device: torch.device | str
    dtype: torch.dtype | None
    activation_dtype: str | None


def load_experts(
    model: nn.Module, prefix: str, names: ExpertNames, weights: Weights, context: LoadContext
) -> None:
    """Load the experts of module `prefix`: QuantExperts if packed, else the module's parameters.

    Raises ValueError naming the file and the tensor or module: for a missing or surplus expert,
    experts in different formats, a bias that is not zero, or tensors that are no valid weight.
    """
    module = model.get_submodule(prefix)
    quantized = packed_experts(module, names, weights, context)
    if quantized is None:
        _load_plain(module, names, weights, context)
    else:
        model.set_submodule(prefix, quantized)


def packed_experts(
    module: nn.Module, names: ExpertNames, weights: Weights, context: LoadContext
) -> QuantExperts | None:
    """The QuantExperts that replace `module`, or None if its experts are unquantized.

    Raises ValueError as `load_experts`.
    """
    _check_present(module, names, weights, context)
    schemes = {role: _scheme(role, names, weights, context) for role in ROLES}
    if all(scheme is None for scheme in schemes.values()) and not _is_mixed(weights, context):
        return None
    try:
        activation = expert_weights(module)[2]
    except ValueError as error:
        raise ValueError(f"{context.directory}: {names.stored}: {error}") from None
    shapes, count = expert_shapes(module), len(weights) // len(ROLES)
    stacks = {
        role: [
            _packed(weights[e, role], shapes[role], schemes[role], context) for e in range(count)
        ]
        for role in ROLES
    }
    try:
        experts = QuantExperts.from_experts(stacks[GATE], stacks[UP], stacks[DOWN], activation)
    except ValueError as error:
        raise ValueError(f"{context.directory}: {names.stored}: {error}") from None
    return experts.to(context.device)


def expert_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(N, K) of an expert's gate, up and down weight; empty if `module` has no such parameters.

    The parameters are gate_up_proj (E, 2 * I, K) and down_proj (E, N, I).
    """
    parameters = dict(module.named_parameters(recurse=False))
    first, second = (
        parameters.get(name, torch.empty(0)).shape for name in ("gate_up_proj", "down_proj")
    )
    if (len(first), len(second)) != (3, 3) or (first[0], first[1]) != (second[0], 2 * second[2]):
        return {}
    (_, rows, k), (_, n, inner) = first, second
    return {GATE: (rows // 2, k), UP: (rows // 2, k), DOWN: (n, inner)}


def _check_present(
    module: nn.Module, names: ExpertNames, weights: Weights, context: LoadContext
) -> None:
    """ValueError unless the files hold a tensor of each expert and of no other expert."""
    count = max(p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3)
    for (expert, _), tensors in weights.items():
        if expert >= count:
            raise ValueError(
                f"{_file(tensors, context)}: {stored_module(tensors)}: expected experts "
                f"0..{count - 1}, got {expert}"
            )
    for expert in range(count):  # stops at the first missing expert
        for role in ROLES:
            if (expert, role) not in weights:
                raise ValueError(
                    f"{context.directory}: {names.of(expert, role)}: expected the weight of one of "
                    f"{count} experts, found none"
                )


def _file(tensors: TensorNames, context: LoadContext) -> Path:
    """The file that holds the first of these tensors."""
    return context.files.infos[next(iter(tensors.values()))].file


def _of_role(role: str, weights: Weights) -> Iterator[TensorNames]:
    """The tensor names of one role, expert by expert."""
    count = len(weights) // len(ROLES)
    return (weights[expert, role] for expert in range(count))


def _scheme(role: str, names: ExpertNames, weights: Weights, context: LoadContext) -> Scheme | None:
    """How the weights of a role are quantized, None if they are not. ValueError if they differ."""
    first = scheme_of(weights[0, role], context.files, context.plan)
    for tensors in _of_role(role, weights):
        scheme = scheme_of(tensors, context.files, context.plan)
        if scheme != first:
            raise ValueError(
                f"{_file(tensors, context)}: {stored_module(tensors)}: expected "
                f"{_described(first)} like {names.of(0, role)}, because experts are stacked, got "
                f"{_described(scheme)}"
            )
    return first


def _described(scheme: Scheme | None) -> str:
    """The scheme in words."""
    return "a plain weight" if scheme is None else f"{scheme.format} with {scheme.params}"


# ---------------------------------------------------------------------- packed
def _packed(
    names: TensorNames, shape: tuple[int, int], scheme: Scheme | None, context: LoadContext
) -> PackedWeight:
    """The weight of one expert, as views of the mapped file."""
    tensors = {leaf: context.files.read(stored) for leaf, stored in names.items()}
    bias = tensors.pop("bias", None)
    where = f"{_file(names, context)}: {stored_module(names)}"
    # GPTQ files often hold a bias of zeros for layers without a bias
    if bias is not None and bool(bias.any()):
        raise ValueError(f"{where}.bias: expected none or zeros, got one that is not zero")
    if scheme is None:
        scheme = Scheme(_dense_format(names, context), {})
        if context.dtype in _DENSE_FORMATS:
            tensors["weight"] = tensors["weight"].to(context.dtype)
    try:
        return pack(scheme.format, tensors, shape, **scheme.params)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _dense_format(tensors: TensorNames, context: LoadContext) -> str:
    """The 16-bit format for an unquantized weight among packed ones."""
    info = context.files.infos.get(tensors.get("weight", ""))
    stored = None if info is None else _STORED_FORMATS.get(info.dtype)
    format = _DENSE_FORMATS.get(context.dtype, stored) if context.dtype is not None else stored
    if format is None or info is None:
        raise ValueError(
            f"{_file(tensors, context)}: {stored_module(tensors)}: expected a weight in F16 or "
            "BF16 among packed ones of the same experts, got "
            f"{sorted(tensors) if info is None else info.dtype}"
        )
    return format


# ---------------------------------------------------------------------- plain
def _is_mixed(weights: Weights, context: LoadContext) -> bool:
    """Whether unquantized experts have a 16-bit dtype that differs from the activations' dtype.

    Only packed experts take activations of another dtype.
    """
    info = context.files.infos.get(weights[0, GATE].get("weight", ""))
    return (
        context.activation_dtype is not None
        and info is not None
        and info.dtype in ("F16", "BF16")
        and info.dtype != context.activation_dtype
    )


def _load_plain(
    module: nn.Module, names: ExpertNames, weights: Weights, context: LoadContext
) -> None:
    """Fill the parameters gate_up_proj (E, 2 * I, K) and down_proj (E, N, I) on their device."""
    parameters = dict(module.named_parameters(recurse=False))
    if not expert_shapes(module):
        raise ValueError(
            f"{context.directory}: {names.stored}: expected parameters gate_up_proj (E, 2 * I, K) "
            f"and down_proj (E, N, I) in {type(module).__name__}, got "
            f"{ {name: tuple(p.shape) for name, p in parameters.items()} }"
        )
    gate_up, down = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
    shapes, rows = expert_shapes(module), gate_up[1] // 2
    stored = context.files.infos.get(weights[0, GATE].get("weight", ""))
    for (_, role), tensors in weights.items():
        _check_plain(tensors, shapes[role], None if stored is None else stored.dtype, context)
    # Allocate only now: the checks above showed that the files hold all these weights.
    dtype = context.dtype or context.files.read(weights[0, GATE]["weight"]).dtype
    for name, shape, parts in (
        ("gate_up_proj", gate_up, ((GATE, slice(0, rows)), (UP, slice(rows, 2 * rows)))),
        ("down_proj", down, ((DOWN, slice(0, down[1])),)),
    ):
        stacked = torch.empty(shape, dtype=dtype, device=context.device)
        for role, place in parts:
            for expert, tensors in enumerate(_of_role(role, weights)):
                stacked[expert, place].copy_(context.files.read(tensors["weight"]))
        setattr(module, name, nn.Parameter(stacked, parameters[name].requires_grad))


def _check_plain(
    tensors: TensorNames, shape: tuple[int, int], dtype: str | None, context: LoadContext
) -> None:
    """ValueError unless `tensors` is one floating-point weight of this shape and `dtype`."""
    others = sorted(set(tensors) - {"weight"})
    if others:
        raise ValueError(
            f"{_file(tensors, context)}: tensor {tensors[others[0]]!r}: expected a plain weight "
            "and no other tensor, got this one"
        )
    info = context.files.infos[tensors["weight"]]
    where = f"{info.file}: tensor {tensors['weight']!r}"
    if info.shape != shape:
        raise ValueError(f"{where}: expected shape {shape}, got {info.shape}")
    if info.dtype not in _STORED_FORMATS or info.dtype != dtype:
        raise ValueError(
            f"{where}: expected dtype {dtype if dtype in _STORED_FORMATS else 'F16, BF16 or F32'}, "
            f"got {info.dtype}"
        )
