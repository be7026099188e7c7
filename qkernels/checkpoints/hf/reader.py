"""Reads Hugging Face model directories: config.json, safetensors, tokenizer.

Tensor names and config fields are the ecosystem's; each Format knows its fields (`to_hf_config`,
`from_hf_config`) and tensor names (`specs`). Nothing is downloaded. No pickle and no code from a
directory ever runs. Needs `transformers` and `accelerate` (`pip install qkernels[hf]`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...nn.linear import is_linear
from ..files import MAX_JSON_BYTES, check_regular, errors_naming_file, read_json
from ..tensor_files import TensorFiles
from .config_checks import check_values
from .expert_layers import LoadContext, load_experts
from .layers import (
    CACHE_SCALE,
    Inventory,
    embedding_dtype,
    mixed_dtype_scheme,
    quantized_layer,
    scheme_of,
)
from .model_config import CONFIG, QUANTIZATION, read_values, skeleton
from .plain_weights import DTYPES, load_dequantized, repeats_constant, warn_dequantized
from .quantization import LINEAR, Plan, kinds_of
from .save_pretrained import attach_saver
from .tying import tie
from .writer import save

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load", "load_tokenizer", "save"]

GENERATION_CONFIG = "generation_config.json"
_TEMPLATES = "additional_chat_templates"
_TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model in directory `path`, on `device`, in eval mode.

    Layers with packed tensors in the files become QuantLinear (or QuantEmbedding) and keep their
    bytes. Everything else is an unquantized module, in `dtype` if given and in the file's dtype
    otherwise. Packed experts, stored as one set of tensors each, become QuantExperts. Tensors are
    mapped and moved one at a time, so the peak memory is the model and one tensor, or the model and
    the experts of one layer.

    Raises FileNotFoundError or ValueError that names the file, the field or tensor, and what was
    expected and found.
    """
    directory = _model_directory(path)
    with TensorFiles(directory) as files:
        model, plan = skeleton(directory, files)
        inventory = Inventory(model, files)
        activation_dtype = embedding_dtype(model, inventory, files) if dtype is None else None
        context = LoadContext(directory, files, plan, device, dtype, activation_dtype)
        used: set[str] = set()
        dequantized: list[str] = []
        # in the order of the files, so that only one shard of a checkpoint is mapped at a time
        for name in files.infos:
            if name in used:
                continue
            if name in inventory.parts:
                part_names, part = inventory.parts[name]
                _assign(model, part.whole, part_names, files, device, dtype, part.dim)
                used |= set(part_names)
                continue
            prefix = inventory.place.get(name)
            if prefix in inventory.experts:
                weights = inventory.experts[prefix]
                load_experts(model, prefix, inventory.names.experts[prefix], weights, context)
                used |= {stored for expert in weights.values() for stored in expert.values()}
                continue
            tensor_names = {} if prefix is None else inventory.layers[prefix]
            kinds = LINEAR if prefix is None else kinds_of(model.get_submodule(prefix))
            scheme = scheme_of(tensor_names, files, plan, kinds)
            if scheme is None and prefix is not None and is_linear(model.get_submodule(prefix)):
                scheme = mixed_dtype_scheme(tensor_names, files, activation_dtype)
            if (
                prefix is not None
                and scheme is not None
                and inventory.names.needs_plain_weight(prefix)
            ):
                plain_dtype = dtype or DTYPES.get(activation_dtype, model.dtype)
                load_dequantized(
                    model.get_submodule(prefix),
                    prefix,
                    tensor_names,
                    files,
                    scheme,
                    device,
                    plain_dtype,
                )
                dequantized.append(prefix)
                used |= set(tensor_names.values())
            elif prefix is not None and scheme is not None:
                layer = quantized_layer(
                    directory, model, prefix, tensor_names, files, scheme, device, dtype
                )
                model.set_submodule(prefix, layer)
                used |= set(tensor_names.values())
            elif _assign(
                model,
                name_in_model := inventory.names.from_stored(name),
                [name],
                files,
                device,
                dtype,
            ) or repeats_constant(model, name_in_model, files.read(name)):
                used.add(name)
    warn_dequantized(dequantized)
    with errors_naming_file(directory / CONFIG, "weights that can be tied"):
        tie(model, directory)
    _check_complete(directory, model, [n for n in files.infos if n not in used], plan)
    _load_generation_config(model, directory / GENERATION_CONFIG)
    attach_saver(model)
    return model.to(device).eval()  # type: ignore[arg-type]


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer saved in a model directory. ValueError if there is none."""
    directory = _model_directory(path)
    if not any(check_regular(directory / name) for name in _TOKENIZER_FILES):
        raise ValueError(
            f"{directory}: expected tokenizer files ({_TOKENIZER_FILES[0]}, ...), found none"
        )
    # transformers may open any of these files, config.json included, and builds its config.
    for file in (*directory.iterdir(), *(directory / _TEMPLATES).glob("*")):
        if file.suffix in _TEXTS:
            check_regular(file, MAX_JSON_BYTES)
    if (directory / CONFIG).exists():
        read_values(directory / CONFIG)
    from transformers import AutoTokenizer

    with errors_naming_file(directory, "tokenizer files"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        # transformers reads it only when it truncates a text
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ValueError(
                f"model_max_length: expected a number, got {tokenizer.model_max_length!r:.60}"
            )
        return tokenizer


def _load_generation_config(model: PreTrainedModel, path: Path) -> None:
    """Give the model the generation config at `path`, if the file exists."""
    if not check_regular(path):
        return
    from transformers import GenerationConfig

    values = read_json(path)
    check_values(path, values)
    with errors_naming_file(path, "a generation config"):
        model.generation_config = GenerationConfig.from_dict(values)


def _model_directory(path: str | os.PathLike[str]) -> Path:
    """`path`, if it is a directory. Raises FileNotFoundError or ValueError otherwise."""
    directory = Path(path)
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: expected a model directory, found nothing")
    if not directory.is_dir():
        raise ValueError(
            f"{directory}: expected a model directory or a .gguf file, got another file"
        )
    return directory


def _assign(
    model: nn.Module,
    name_in_model: str,
    names: list[str],
    files: TensorFiles,
    device: torch.device | str,
    dtype: torch.dtype | None,
    dim: int = 0,
) -> bool:
    """Load an unquantized tensor of the model; False if the model has no such tensor.

    names: the stored tensor, or the stored parts that are concatenated along `dim`.
    """
    prefix, _, leaf = name_in_model.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return False
    slots = module._parameters if leaf in module._parameters else module._buffers
    current = slots.get(leaf)
    if current is None or leaf in module._non_persistent_buffers_set:
        return False
    infos = [files.infos[name] for name in names]
    for name, info in zip(names, infos, strict=True):
        where = f"{info.file}: tensor {name!r}"
        if len(names) == 1 and info.shape != tuple(current.shape):
            raise ValueError(
                f"{where}: expected shape {tuple(current.shape)} from {CONFIG}, got {info.shape}"
            )
        if current.is_floating_point() and info.dtype not in ("F16", "BF16", "F32", "F64"):
            raise ValueError(f"{where}: expected dtype F16, BF16 or F32, got {info.dtype}")
    if len(names) > 1 and _concatenated_shape([info.shape for info in infos], dim) != tuple(
        current.shape
    ):
        raise ValueError(
            f"{infos[0].file}: {', '.join(names)}: expected shape {tuple(current.shape)} together "
            f"from {CONFIG}, got {', '.join(str(info.shape) for info in infos)}"
        )
    tensors = [files.read_as(name, dtype) for name in names]
    tensor = (tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)).to(device)
    slots[leaf] = (
        nn.Parameter(tensor, current.requires_grad) if isinstance(current, nn.Parameter) else tensor
    )
    return True


def _concatenated_shape(shapes: list[tuple[int, ...]], dim: int) -> tuple[int, ...] | None:
    """The shape of these tensors concatenated along `dim`; None if they do not fit."""
    other_sizes = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if len(other_sizes) > 1 or len(shapes[0]) <= dim:
        return None
    return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])


def _check_complete(directory: Path, model: Any, unexpected: list[str], plan: Plan) -> None:
    """ValueError if the files hold unexpected tensors, or lack tensors of the model."""
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    # old checkpoints hold the constant inv_freq
    ignored += [CACHE_SCALE, re.compile(r"\.rotary_emb\.inv_freq$")]
    unexpected = [n for n in unexpected if not any(p.search(n) for p in ignored)]
    if unexpected:
        shown = ", ".join(unexpected[:3]) + (", ..." if len(unexpected) > 3 else "")
        hint = "" if plan.config is not None else f"; {CONFIG} has no {QUANTIZATION}"
        raise ValueError(
            f"{directory}: expected the tensors of {type(model).__name__} as {CONFIG} describes "
            f"it, got {len(unexpected)} unexpected: {shown}{hint}"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{directory}: expected {len(missing)} more tensors, found none of: {shown}"
        )
