"""Modules of experts from files that hold the tensors of each expert by themselves.

Gate, up and down may each be packed in a format of its own, all experts of a layer in the same.
Packed weights are stacked as they are; experts that are all plain stay transformers' own module.
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
from .layers import Owned, scheme_of, stored_module
from .names import ExpertNames
from .quantization import Plan, Scheme

#: safetensors' names of dtypes that a plain weight may have -> the format of one beside packed ones
_PLAIN = {"F16": "fp16", "BF16": "bf16", "F32": None, "F64": None}
_SIXTEEN = {torch.float16: "fp16", torch.bfloat16: "bf16"}
#: of one layer: (expert, role) -> its tensors
Weights = Mapping[tuple[int, str], Owned]


@dataclass(frozen=True)
class Source:
    """A model directory, and how it is loaded.

    dtype: of plain tensors, None for the files'. around: safetensors' name of the dtype that plain
    linears must have to be plain, None for any.
    """

    directory: Path
    files: TensorFiles
    plan: Plan
    device: torch.device | str
    dtype: torch.dtype | None
    around: str | None


def load_experts(
    model: nn.Module, prefix: str, names: ExpertNames, weights: Weights, source: Source
) -> None:
    """Put the experts of module `prefix` in place: QuantExperts if they are packed, else its
    parameters.

    Raises ValueError naming the file and the tensor or module: for a missing expert or one too
    many, experts in different formats, a bias that is not zero, or tensors that are no valid
    weight.
    """
    module = model.get_submodule(prefix)
    packed = packed_experts(module, names, weights, source)
    if packed is None:
        _load_plain(module, names, weights, source)
    else:
        model.set_submodule(prefix, packed)


def packed_experts(
    module: nn.Module, names: ExpertNames, weights: Weights, source: Source
) -> QuantExperts | None:
    """What takes the place of `module`; None if its experts are plain. ValueError as
    `load_experts`.
    """
    _check_present(module, names, weights, source)
    schemes = {role: _scheme(role, names, weights, source) for role in ROLES}
    if all(scheme is None for scheme in schemes.values()) and not _is_mixed(weights, source):
        return None
    try:
        activation = expert_weights(module)[2]
    except ValueError as error:
        raise ValueError(f"{source.directory}: {names.stored}: {error}") from None
    shapes, count = expert_shapes(module), len(weights) // len(ROLES)
    stacks = {
        role: [_packed(weights[e, role], shapes[role], schemes[role], source) for e in range(count)]
        for role in ROLES
    }
    try:
        stacked = QuantExperts.from_experts(stacks[GATE], stacks[UP], stacks[DOWN], activation)
    except ValueError as error:
        raise ValueError(f"{source.directory}: {names.stored}: {error}") from None
    return stacked.to(source.device)


def expert_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(N, K) of an expert's gate, up and down in a module with gate_up_proj (E, 2 * I, K) and
    down_proj (E, N, I).

    Empty if it has no such parameters.
    """
    own = dict(module.named_parameters(recurse=False))
    first, second = (own.get(name, torch.empty(0)).shape for name in ("gate_up_proj", "down_proj"))
    if (len(first), len(second)) != (3, 3) or (first[0], first[1]) != (second[0], 2 * second[2]):
        return {}
    (_, rows, k), (_, n, inner) = first, second
    return {GATE: (rows // 2, k), UP: (rows // 2, k), DOWN: (n, inner)}


def _check_present(module: nn.Module, names: ExpertNames, weights: Weights, source: Source) -> None:
    """ValueError unless the files hold something of each expert and of no other."""
    count = max(p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3)
    for (expert, _), tensors in weights.items():
        if expert >= count:
            raise ValueError(
                f"{_file(tensors, source)}: {stored_module(tensors)}: expected experts 0..{count - 1}, got {expert}"
            )
    for expert in range(count):  # ends at the first that is missing
        for role in ROLES:
            if (expert, role) not in weights:
                raise ValueError(
                    f"{source.directory}: {names.of(expert, role)}: expected the weight of one of {count} experts, "
                    "found none"
                )


def _file(tensors: Owned, source: Source) -> Path:
    return source.files.infos[next(iter(tensors.values()))].file


def _of_role(role: str, weights: Weights) -> Iterator[Owned]:
    """One weight of each expert, in their order."""
    count = len(weights) // len(ROLES)
    return (weights[expert, role] for expert in range(count))


def _scheme(role: str, names: ExpertNames, weights: Weights, source: Source) -> Scheme | None:
    """How all experts' weights of a role are quantized. ValueError if they differ."""
    first = scheme_of(weights[0, role], source.files, source.plan)
    for tensors in _of_role(role, weights):
        scheme = scheme_of(tensors, source.files, source.plan)
        if scheme != first:
            raise ValueError(
                f"{_file(tensors, source)}: {stored_module(tensors)}: expected {_described(first)} like "
                f"{names.of(0, role)}, because experts are stacked, got {_described(scheme)}"
            )
    return first


def _described(scheme: Scheme | None) -> str:
    return "a plain weight" if scheme is None else f"{scheme.format} with {scheme.params}"


# ---------------------------------------------------------------------- packed
def _packed(
    tensors: Owned, shape: tuple[int, int], scheme: Scheme | None, source: Source
) -> PackedWeight:
    """The weight of one expert, mapped."""
    found = {own: source.files.read(full) for own, full in tensors.items()}
    bias = found.pop("bias", None)
    where = f"{_file(tensors, source)}: {stored_module(tensors)}"
    # GPTQ files often hold zeros for layers that have none
    if bias is not None and bool(bias.any()):
        raise ValueError(f"{where}.bias: expected none or zeros, got one that is not zero")
    if scheme is None:
        scheme = Scheme(_sixteen(tensors, source), {})
        if source.dtype in _SIXTEEN:
            found["weight"] = found["weight"].to(source.dtype)
    try:
        return pack(scheme.format, found, shape, **scheme.params)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _sixteen(tensors: Owned, source: Source) -> str:
    """The 16-bit format of a plain weight beside packed ones."""
    info = source.files.infos.get(tensors.get("weight", ""))
    stored = None if info is None else _PLAIN.get(info.dtype)
    wanted = _SIXTEEN.get(source.dtype, stored) if source.dtype is not None else stored
    if wanted is None or info is None:
        raise ValueError(
            f"{_file(tensors, source)}: {stored_module(tensors)}: expected a weight in F16 or BF16 beside packed ones "
            f"of the same experts, got {sorted(tensors) if info is None else info.dtype}"
        )
    return wanted


# ---------------------------------------------------------------------- plain
def _is_mixed(weights: Weights, source: Source) -> bool:
    """Whether plain experts are in 16 bits of another kind than what comes in, which only packed
    ones take.
    """
    info = source.files.infos.get(weights[0, GATE].get("weight", ""))
    return source.around is not None and info is not None and info.dtype in ("F16", "BF16") and (
        info.dtype != source.around
    )  # fmt: skip


def _load_plain(module: nn.Module, names: ExpertNames, weights: Weights, source: Source) -> None:
    """Fill the module's parameters, gate_up_proj (E, 2 * I, K) and down_proj (E, N, I), on their
    device.
    """
    own = dict(module.named_parameters(recurse=False))
    if not expert_shapes(module):
        raise ValueError(
            f"{source.directory}: {names.stored}: expected parameters gate_up_proj (E, 2 * I, K) and down_proj "
            f"(E, N, I) in {type(module).__name__}, got { {name: tuple(p.shape) for name, p in own.items()} }"
        )
    gate_up, down = own["gate_up_proj"].shape, own["down_proj"].shape
    shapes, rows = expert_shapes(module), gate_up[1] // 2
    stored = source.files.infos.get(weights[0, GATE].get("weight", ""))
    for (_, role), tensors in weights.items():
        _check_plain(tensors, shapes[role], None if stored is None else stored.dtype, source)
    # Only now is it known that the files hold as much.
    dtype = source.dtype or source.files.read(weights[0, GATE]["weight"]).dtype
    for name, shape, parts in (
        ("gate_up_proj", gate_up, ((GATE, slice(0, rows)), (UP, slice(rows, 2 * rows)))),
        ("down_proj", down, ((DOWN, slice(0, down[1])),)),
    ):
        stacked = torch.empty(shape, dtype=dtype, device=source.device)
        for role, place in parts:
            for expert, tensors in enumerate(_of_role(role, weights)):
                stacked[expert, place].copy_(source.files.read(tensors["weight"]))
        setattr(module, name, nn.Parameter(stacked, own[name].requires_grad))


def _check_plain(tensors: Owned, shape: tuple[int, int], dtype: str | None, source: Source) -> None:
    """ValueError unless it is a floating weight of this shape, and of `dtype`, alone."""
    others = sorted(set(tensors) - {"weight"})
    if others:
        raise ValueError(
            f"{_file(tensors, source)}: tensor {tensors[others[0]]!r}: expected a plain weight alone, got this, too"
        )
    info = source.files.infos[tensors["weight"]]
    where = f"{info.file}: tensor {tensors['weight']!r}"
    if info.shape != shape:
        raise ValueError(f"{where}: expected shape {shape}, got {info.shape}")
    if info.dtype not in _PLAIN or info.dtype != dtype:
        raise ValueError(
            f"{where}: expected dtype {dtype if dtype in _PLAIN else 'F16, BF16 or F32'}, got {info.dtype}"
        )
