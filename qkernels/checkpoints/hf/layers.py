"""Linears and embeddings of a model from the tensors that its files hold for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ... import formats
from ...nn.embedding import QuantEmbedding, input_embeddings
from ...nn.linear import QuantLinear, linear_of
from ...weights.packed import pack
from ..tensor_files import TensorFiles
from .model_config import QUANTIZATION
from .names import Names, Part, expert_tensor
from .quantization import LINEAR, Kinds, Plan, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: scales of a quantized key-value cache; ours holds 16 bits
CACHE_SCALE = re.compile(r"\.([qkv]_scale|[qkv]_zero_point|kv_scale)$")
#: of one weight: its tensor's name within the module -> in the files
Owned = dict[str, str]


class Inventory:
    """Whose the files' tensors are, by transformers' names of modules.

    layers: linears, embeddings, and what has a packed matrix besides. experts: modules of experts
    -> (expert, "gate", "up" or "down") -> one weight's. place: name in the files -> such a module.
    parts: name in the files -> the names of all that make one tensor of transformers', in order,
    and which.
    """

    def __init__(self, model: nn.Module, files: TensorFiles) -> None:
        """ValueError for two tensors in one place, or packed ones that hold all experts at once."""
        self.names = Names(model)
        self.layers: dict[str, Owned] = {}
        self.experts: dict[str, dict[tuple[int, str], Owned]] = {}
        self.place: dict[str, str] = {}
        self.parts: dict[str, tuple[list[str], Part]] = {}
        wholes: dict[str, dict[int, str]] = {}
        weights: dict[str, str] = {}
        taken: dict[str, str] = {}
        for full, info in files.infos.items():
            if CACHE_SCALE.search(full):
                continue
            part = self.names.part(full)
            name = self.names.of_file(full) if part is None else f"{part.whole}[{part.index}]"
            if name in taken:
                raise ValueError(
                    f"{info.file}: tensor {full!r}: expected once, got {taken[name]!r}, too"
                )
            taken[name] = full
            if part is not None:
                whole = wholes.setdefault(part.whole, {})
                whole[part.index] = full
                if len(whole) == part.count:  # where one is missing, all are unexpected
                    ordered = [whole[i] for i in range(part.count)]
                    self.parts |= dict.fromkeys(ordered, (ordered, part))
                continue
            prefix = self.names.layer_of(name)
            if (matrix := self.names.matrix_of(name)) is not None:
                weights[matrix] = full
            if prefix is not None:
                self.layers.setdefault(prefix, {})[name[len(prefix) + 1 :]] = full
            elif (prefix := self.names.experts_of(name)) is not None:
                self._expert(prefix, name[len(prefix) + 1 :], full, info.file)
            if prefix is not None:
                self.place[full] = prefix
        for prefix, full in weights.items():
            if prefix in self.layers:  # scales and the like beside it: it is packed
                self.layers[prefix]["weight"] = full
                self.place[full] = prefix

    def takes(self, full: str) -> bool:
        """Whether the model has a place for the tensor that the files call `full`."""
        return full in self.place or full in self.parts or self.names.has(self.names.of_file(full))

    def _expert(self, prefix: str, name: str, full: str, file: Path) -> None:
        leaves = self.names.experts[prefix].leaves
        try:
            expert, leaf, own = expert_tensor(name, list(leaves.values()))
        except ValueError as error:
            raise ValueError(f"{file}: {full}: {error}") from None
        role = next(role for role, known in leaves.items() if known == leaf)
        self.experts.setdefault(prefix, {}).setdefault((expert, role), {})[own] = full


def stored_module(names: Owned) -> str:
    """What the files call the module whose tensors these are."""
    own, full = next(iter(names.items()))
    return full.removesuffix(f".{own}")


def owned_tensors(model: nn.Module, files: TensorFiles) -> dict[str, Owned]:
    """Module's name -> {tensor name within it: name in the file}, for the linears and embeddings in
    the files.
    """
    return Inventory(model, files).layers


def scheme_of(names: Owned, files: TensorFiles, plan: Plan, kinds: Kinds = LINEAR) -> Scheme | None:
    """How a weight is quantized; None if the files hold a plain one, whatever the config says.

    kinds: of the module. The config speaks of modules as the files call them. Raises ValueError if
    they hold packed tensors that the config says nothing of.
    """
    packed = sorted(set(names) - {"weight", "bias"})
    if not packed or plan.config is None:
        return None
    module = stored_module(names)
    scheme = plan.scheme(module, kinds)
    if scheme is None:
        raise ValueError(
            f"{files.infos[names[packed[0]]].file}: {module}: expected a plain weight, because "
            f"{QUANTIZATION} leaves this module unquantized, got {packed[0]}"
        )
    return scheme._replace(format=formats.get(scheme.format).format_from_names(names))


def embedding_dtype(model: PreTrainedModel, inventory: Inventory, files: TensorFiles) -> str | None:
    """safetensors' name of the dtype the input embeddings are stored in; None if they are packed."""
    embedding = input_embeddings(model)
    prefix = next((name for name, module in model.named_modules() if module is embedding), None)
    full = inventory.layers.get(prefix or "", {}).get("weight")
    if full is None:  # one that scales its rows is no layer that could be packed
        names = (name for name in files.infos if name.endswith("weight"))
        full = next(
            (name for name in names if inventory.names.of_file(name) == f"{prefix}.weight"), ""
        )
    info = files.infos.get(full)
    return info.dtype if info is not None and info.dtype in ("F16", "BF16", "F32", "F64") else None


def mixed_dense(names: Owned, files: TensorFiles, around: str | None) -> Scheme | None:
    """The 16-bit format of a linear stored in another dtype than the embeddings, else None.

    nn.Linear refuses inputs of another dtype than its weight's; QuantLinear takes them.
    """
    weight = files.infos.get(names.get("weight", ""))
    if around is None or weight is None or around == weight.dtype:
        return None
    format = {"F16": "fp16", "BF16": "bf16"}.get(weight.dtype)
    return None if format is None else Scheme(format, {})


def quantized_layer(
    directory: Path,
    model: nn.Module,
    prefix: str,
    names: Owned,
    files: TensorFiles,
    scheme: Scheme,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> QuantLinear | QuantEmbedding:
    """The packed weight of the linear or embedding `prefix` from the files, checked.

    dtype: of an embedding's rows, and what the model computes in; None for the config's. ValueError
    names file and module.
    """
    module = model.get_submodule(prefix)
    dtype = dtype or model.dtype  # type: ignore[assignment]
    assert dtype is not None
    if isinstance(module, nn.Embedding):
        return _packed_embedding(module, prefix, names, files, scheme, device, dtype)
    linear = linear_of(module)
    # GPTQ files often hold a bias of zeros for layers that have none in the model; it is kept.
    if linear.bias is not None and "bias" not in names:
        raise ValueError(
            f"{directory}: {prefix}.bias: expected shape ({linear.out_features},), got none"
        )
    tensors = {own: files.read(full) for own, full in names.items()}
    bias = tensors.pop("bias", None)
    # a plain weight lies as Conv1D has it
    if formats.get(scheme.format).dense and linear is not module:
        tensors["weight"] = tensors["weight"].T.contiguous()
    with located(prefix, names, files):
        packed = pack(
            scheme.format, tensors, (linear.out_features, linear.in_features), **scheme.params
        )
        layer = QuantLinear(
            packed.to(device), None if bias is None else bias.to(device), dtype=dtype
        )
    return layer.requires_grad_(False)


@contextmanager
def located(prefix: str, names: Owned, files: TensorFiles) -> Iterator[None]:
    """A ValueError inside gets the file and the module `prefix` before its message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{files.infos[next(iter(names.values()))].file}: {prefix}: {error}"
        ) from None


def _packed_embedding(
    embedding: nn.Embedding,
    prefix: str,
    names: Owned,
    files: TensorFiles,
    scheme: Scheme,
    device: torch.device | str,
    dtype: torch.dtype,
) -> QuantEmbedding:
    tensors = {own: files.read(full) for own, full in names.items()}
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    with located(prefix, names, files):
        return QuantEmbedding(
            pack(scheme.format, tensors, shape, **scheme.params).to(device), dtype
        )
