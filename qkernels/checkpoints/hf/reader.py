"""Hugging Face model directories: config.json with `quantization_config`, safetensors, tokenizer.

Tensor names and config fields are the ecosystem's own; each Format knows its own fields
(`to_hf_config`, `from_hf_config`) and names (`specs`). Nothing is downloaded; no pickle and no code
from a directory is ever run. Needs `transformers` and `accelerate` (`pip install qkernels[hf]`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...nn.linear import is_linear
from ..files import MAX_JSON_BYTES, check_regular, read_json, told_by
from ..tensor_files import TensorFiles
from .config_checks import check_values
from .expert_layers import Source, load_experts
from .layers import CACHE_SCALE, Inventory, embedding_dtype, mixed_dense, quantized_layer, scheme_of
from .model_config import CONFIG, QUANTIZATION, read_values, skeleton
from .plain_weights import DTYPES, load_dequantized, repeats_constant, warn_dequantized
from .quantization import LINEAR, Plan, kinds_of
from .save_pretrained import mark
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

    Layers whose packed tensors are in the files become QuantLinear and keep their bytes; everything
    else is a plain module, in `dtype` if given and in the file's otherwise. Experts come from
    tensors of each by itself and become QuantExperts if they are packed. Tensors are mapped and
    moved one at a time, so peak memory is the model and one tensor, or the experts of one layer.

    Raises FileNotFoundError or ValueError that names the file, the field or tensor, expected and
    found.
    """
    directory = _model_directory(path)
    with TensorFiles(directory) as files:
        model, plan = skeleton(directory, files)
        inventory = Inventory(model, files)
        around = embedding_dtype(model, inventory, files) if dtype is None else None
        source = Source(directory, files, plan, device, dtype, around)
        used: set[str] = set()
        dequantized: list[str] = []
        for (
            name
        ) in files.infos:  # file by file: of a sharded checkpoint one shard is mapped at a time
            if name in used:
                continue
            if name in inventory.parts:
                together, part = inventory.parts[name]
                _assign(model, part.whole, together, files, device, dtype, part.dim)
                used |= set(together)
                continue
            prefix = inventory.place.get(name)
            if prefix in inventory.experts:
                weights = inventory.experts[prefix]
                load_experts(model, prefix, inventory.names.experts[prefix], weights, source)
                used |= {full for own in weights.values() for full in own.values()}
                continue
            owned = {} if prefix is None else inventory.layers[prefix]
            kinds = LINEAR if prefix is None else kinds_of(model.get_submodule(prefix))
            scheme = scheme_of(owned, files, plan, kinds)
            if scheme is None and prefix is not None and is_linear(model.get_submodule(prefix)):
                scheme = mixed_dense(owned, files, around)
            if (
                prefix is not None
                and scheme is not None
                and inventory.names.has_matrix_of_its_own(prefix)
            ):
                plain = dtype or DTYPES.get(around, model.dtype)
                load_dequantized(
                    model.get_submodule(prefix), prefix, owned, files, scheme, device, plain
                )
                dequantized.append(prefix)
                used |= set(owned.values())
            elif prefix is not None and scheme is not None:
                layer = quantized_layer(
                    directory, model, prefix, owned, files, scheme, device, dtype
                )
                model.set_submodule(prefix, layer)
                used |= set(owned.values())
            elif _assign(
                model, own := inventory.names.of_file(name), [name], files, device, dtype
            ) or repeats_constant(model, own, files.read(name)):
                used.add(name)
    warn_dequantized(dequantized)
    with told_by(directory / CONFIG, "weights that can be tied"):
        tie(model, directory)
    _check_complete(directory, model, [n for n in files.infos if n not in used], plan)
    _load_generation_config(model, directory / GENERATION_CONFIG)
    mark(model)
    return model.to(device).eval()  # type: ignore[arg-type]


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer saved in a model directory. ValueError if there is none."""
    directory = _model_directory(path)
    if not any(check_regular(directory / name) for name in _TOKENIZER_FILES):
        raise ValueError(
            f"{directory}: expected tokenizer files ({_TOKENIZER_FILES[0]}, ...), found none"
        )
    # transformers opens by itself what it likes of them, config.json included, and builds its
    # config.
    for file in (*directory.iterdir(), *(directory / _TEMPLATES).glob("*")):
        if file.suffix in _TEXTS:
            check_regular(file, MAX_JSON_BYTES)
    if (directory / CONFIG).exists():
        read_values(directory / CONFIG)
    from transformers import AutoTokenizer

    with told_by(directory, "tokenizer files"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        # which is looked at only when a text is cut
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ValueError(
                f"model_max_length: expected a number, got {tokenizer.model_max_length!r:.60}"
            )
        return tokenizer


def _load_generation_config(model: PreTrainedModel, path: Path) -> None:
    if not check_regular(path):
        return
    from transformers import GenerationConfig

    values = read_json(path)
    check_values(path, values)
    with told_by(path, "a generation config"):
        model.generation_config = GenerationConfig.from_dict(values)


def _model_directory(path: str | os.PathLike[str]) -> Path:
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
    own: str,
    names: list[str],
    files: TensorFiles,
    device: torch.device | str,
    dtype: torch.dtype | None,
    dim: int = 0,
) -> bool:
    """Put a plain tensor in its place, `own`; False if the model has none of that name.

    names: in the files, of more than one if it is made of theirs, one behind another along `dim`.
    """
    prefix, _, leaf = own.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return False
    slots = module._parameters if leaf in module._parameters else module._buffers
    slot = slots.get(leaf)
    if slot is None or leaf in module._non_persistent_buffers_set:
        return False
    infos = [files.infos[name] for name in names]
    for name, info in zip(names, infos, strict=True):
        where = f"{info.file}: tensor {name!r}"
        if len(names) == 1 and info.shape != tuple(slot.shape):
            raise ValueError(
                f"{where}: expected shape {tuple(slot.shape)} from {CONFIG}, got {info.shape}"
            )
        if slot.is_floating_point() and info.dtype not in ("F16", "BF16", "F32", "F64"):
            raise ValueError(f"{where}: expected dtype F16, BF16 or F32, got {info.dtype}")
    if len(names) > 1 and _together([info.shape for info in infos], dim) != tuple(slot.shape):
        raise ValueError(
            f"{infos[0].file}: {', '.join(names)}: expected shape {tuple(slot.shape)} together from {CONFIG}, "
            f"got {', '.join(str(info.shape) for info in infos)}"
        )
    tensors = [files.read_as(name, dtype) for name in names]
    tensor = (tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)).to(device)
    slots[leaf] = (
        nn.Parameter(tensor, slot.requires_grad) if isinstance(slot, nn.Parameter) else tensor
    )
    return True


def _together(shapes: list[tuple[int, ...]], dim: int) -> tuple[int, ...] | None:
    """The shape of tensors one behind another along `dim`, None if they do not fit."""
    rests = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if len(rests) > 1 or len(shapes[0]) <= dim:
        return None
    return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])


def _check_complete(directory: Path, model: Any, unexpected: list[str], plan: Plan) -> None:
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    # old checkpoints carry this constant
    ignored += [
        CACHE_SCALE,
        re.compile(r"\.rotary_emb\.inv_freq$"),
    ]
    unexpected = [n for n in unexpected if not any(p.search(n) for p in ignored)]
    if unexpected:
        shown = ", ".join(unexpected[:3]) + (", ..." if len(unexpected) > 3 else "")
        hint = "" if plan.config is not None else f"; {CONFIG} has no {QUANTIZATION}"
        raise ValueError(
            f"{directory}: expected the tensors of {type(model).__name__} as {CONFIG} describes it, "
            f"got {len(unexpected)} unexpected: {shown}{hint}"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{directory}: expected {len(missing)} more tensors, found none of: {shown}"
        )
