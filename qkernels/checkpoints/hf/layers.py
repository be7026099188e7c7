"""Linear layers and embeddings of a model, built from the tensors in its files."""

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

#: scales of a quantized key-value cache, which we do not use: our cache holds 16 bits
CACHE_SCALE = re.compile(r"\.([qkv]_scale|[qkv]_zero_point|kv_scale)$")
#: the tensors of one layer: name within the module -> name in the files
TensorNames = dict[str, str]


class Inventory:
    """Which module of the model each tensor in the files belongs to.

    layers: module name -> its tensors, for linear layers, embeddings, and other modules with a
    packed matrix.
    experts: name of an experts module -> (expert, role) -> the tensors of that weight.
    place: name in the files -> name of such a module.
    parts: name in the files -> (names of all tensors that transformers concatenates with it, in
    order; which part it is).
    """

    def __init__(self, model: nn.Module, files: TensorFiles) -> None:
        """ValueError if two tensors have the same place, or one packed tensor holds all experts."""
        self.names = Names(model)
        self.layers: dict[str, TensorNames] = {}
        self.experts: dict[str, dict[tuple[int, str], TensorNames]] = {}
        self.place: dict[str, str] = {}
        self.parts: dict[str, tuple[list[str], Part]] = {}
        wholes: dict[str, dict[int, str]] = {}
        weights: dict[str, str] = {}
        stored_by_name: dict[str, str] = {}
        for stored, info in files.infos.items():
            if CACHE_SCALE.search(stored):
                continue
            part = self.names.part(stored)
            name = self.names.from_stored(stored) if part is None else f"{part.whole}[{part.index}]"
            if name in stored_by_name:
                raise ValueError(
                    f"{info.file}: tensor {stored!r}: expected once, got it again as "
                    f"{stored_by_name[name]!r}"
                )
            stored_by_name[name] = stored
            if part is not None:
                indexed = wholes.setdefault(part.whole, {})
                indexed[part.index] = stored
                if len(indexed) == part.count:  # if one is missing, all are unexpected
                    ordered = [indexed[i] for i in range(part.count)]
                    self.parts |= dict.fromkeys(ordered, (ordered, part))
                continue
            module = self.names.layer_of(name)
            if (matrix := self.names.matrix_of(name)) is not None:
                weights[matrix] = stored
            if module is not None:
                self.layers.setdefault(module, {})[name[len(module) + 1 :]] = stored
            elif (module := self.names.experts_of(name)) is not None:
                self._expert(module, name[len(module) + 1 :], stored, info.file)
            if module is not None:
                self.place[stored] = module
        for module, stored in weights.items():
            if module in self.layers:  # the files also hold scales or the like: it is packed
                self.layers[module]["weight"] = stored
                self.place[stored] = module

    def takes(self, stored: str) -> bool:
        """Whether the model has a place for the tensor called `stored` in the files."""
        return (
            stored in self.place
            or stored in self.parts
            or self.names.has(self.names.from_stored(stored))
        )

    def _expert(self, prefix: str, name: str, stored: str, file: Path) -> None:
        """Record the tensor `stored`, called `name` within the experts module `prefix`."""
        leaves = self.names.experts[prefix].leaves
        try:
            expert, leaf, tensor_name = expert_tensor(name, list(leaves.values()))
        except ValueError as error:
            raise ValueError(f"{file}: {stored}: {error}") from None
        role = next(role for role, stored_leaf in leaves.items() if stored_leaf == leaf)
        self.experts.setdefault(prefix, {}).setdefault((expert, role), {})[tensor_name] = stored


def stored_module(names: TensorNames) -> str:
    """The name in the files of the module that has these tensors."""
    leaf, stored = next(iter(names.items()))
    return stored.removesuffix(f".{leaf}")


def scheme_of(
    names: TensorNames, files: TensorFiles, plan: Plan, kinds: Kinds = LINEAR
) -> Scheme | None:
    """How a weight is quantized; None if the files hold an unquantized one.

    kinds: of the module, from `quantization.kinds_of`.

    The files decide, whatever the config says. The config uses the files' module names. Raises
    ValueError if the files hold packed tensors for a module that the config skips.
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
    """safetensors dtype of the stored input embeddings; None if they are packed."""
    embedding = input_embeddings(model)
    prefix = next((name for name, module in model.named_modules() if module is embedding), None)
    stored = inventory.layers.get(prefix or "", {}).get("weight")
    if stored is None:  # a scaled embedding is not among the layers that can be packed
        names = (name for name in files.infos if name.endswith("weight"))
        stored = next(
            (name for name in names if inventory.names.from_stored(name) == f"{prefix}.weight"), ""
        )
    info = files.infos.get(stored)
    return info.dtype if info is not None and info.dtype in ("F16", "BF16", "F32", "F64") else None


def mixed_dtype_scheme(
    names: TensorNames, files: TensorFiles, activation_dtype: str | None
) -> Scheme | None:
    """The 16-bit format of a linear layer whose dtype is not `activation_dtype`, else None.

    nn.Linear refuses inputs of a dtype other than its weight's; QuantLinear takes them.
    """
    weight = files.infos.get(names.get("weight", ""))
    if activation_dtype is None or weight is None or activation_dtype == weight.dtype:
        return None
    format = {"F16": "fp16", "BF16": "bf16"}.get(weight.dtype)
    return None if format is None else Scheme(format, {})


def quantized_layer(
    directory: Path,
    model: nn.Module,
    prefix: str,
    names: TensorNames,
    files: TensorFiles,
    scheme: Scheme,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> QuantLinear | QuantEmbedding:
    """The linear layer or embedding `prefix` with its packed weight from the files, checked.

    dtype: of an embedding's rows, and the dtype that the model computes in; None for the config's.
    Raises ValueError naming the file and the module.
    """
    module = model.get_submodule(prefix)
    dtype = dtype or model.dtype  # type: ignore[assignment]
    assert dtype is not None
    if isinstance(module, nn.Embedding):
        return _packed_embedding(module, prefix, names, files, scheme, device, dtype)
    linear = linear_of(module)
    # GPTQ files often hold a bias of zeros for layers without a bias in the model; we keep it.
    if linear.bias is not None and "bias" not in names:
        raise ValueError(
            f"{directory}: {prefix}.bias: expected shape ({linear.out_features},), got none"
        )
    tensors = {leaf: files.read(stored) for leaf, stored in names.items()}
    bias = tensors.pop("bias", None)
    # Files hold an unquantized weight transposed if the model's layer is a Conv1D.
    if formats.get(scheme.format).dense and linear is not module:
        tensors["weight"] = tensors["weight"].T.contiguous()
    with errors_naming_module(prefix, names, files):
        packed = pack(
            scheme.format, tensors, (linear.out_features, linear.in_features), **scheme.params
        )
        layer = QuantLinear(
            packed.to(device), None if bias is None else bias.to(device), dtype=dtype
        )
    return layer.requires_grad_(False)


@contextmanager
def errors_naming_module(prefix: str, names: TensorNames, files: TensorFiles) -> Iterator[None]:
    """Put the file and the module `prefix` before the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{files.infos[next(iter(names.values()))].file}: {prefix}: {error}"
        ) from None


def _packed_embedding(
    embedding: nn.Embedding,
    prefix: str,
    names: TensorNames,
    files: TensorFiles,
    scheme: Scheme,
    device: torch.device | str,
    dtype: torch.dtype,
) -> QuantEmbedding:
    """The embedding `prefix` with its packed weight from the files."""
    tensors = {leaf: files.read(stored) for leaf, stored in names.items()}
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    with errors_naming_module(prefix, names, files):
        return QuantEmbedding(
            pack(scheme.format, tensors, shape, **scheme.params).to(device), dtype
        )
