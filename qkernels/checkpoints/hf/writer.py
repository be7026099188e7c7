"""Writes a model as a Hugging Face directory; reader.py reads it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import formats
from ...nn.embedding import QuantEmbedding, input_embeddings, output_embeddings
from ...nn.experts import DOWN, GATE, UP, QuantExperts, routers
from ...nn.linear import QuantLinear, is_linear
from ...weights.packed import PackedWeight
from .. import directories, tensor_files
from ..tensor_files import read_json
from . import quantization
from .expert_layers import expert_shapes
from .model_config import CONFIG, NOTE, QUANTIZATION, WEIGHTS, transposed_layers
from .names import Names
from .tying import is_tied

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model` (and `tokenizer`, if given) as the directory `path`.

    All files go to a directory beside `path` first, which takes the name `path` at the end. So
    `path` always holds a whole model, the old one or the new one, even if the process is killed. An
    earlier save at `path` is replaced. Weights above `max_shard_bytes` are split into shards.

    Raises ValueError if the quantized layers differ in a way that no `quantization_config` can say,
    or if `path` is a file or holds something other than a saved model; OSError if the disk is full.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model: expected a transformers PreTrainedModel, got {type(model).__name__}"
        )
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")
    check_savable(model)
    names = Names(model)
    quantization_entry, embeddings_packed = quantization_config(model, names)
    config = _plain_config(model, embeddings_packed)
    with directories.replacing(Path(path)) as directory:
        tensors = stored_tensors(
            model, names, embeddings_packed, _stored_head(model, embeddings_packed)
        )
        tensor_files.write(tensors, directory, max_shard_bytes)
        config.save_pretrained(directory)
        if quantization_entry is not None:
            directories.write_json(
                directory / CONFIG,
                {**read_json(directory / CONFIG), **_config_entries(quantization_entry)},
            )
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            model.generation_config.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)


def _config_entries(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of config.json about quantization.

    For formats that only we read they include a NOTE that keeps transformers from loading the
    model.
    """
    note = {WEIGHTS: NOTE} if config["quant_method"] == quantization.OWN_METHOD else {}
    return {QUANTIZATION: config, **note}


def check_savable(model: nn.Module) -> None:
    """ValueError for a module whose tensors `stored_tensors` cannot know and would lose."""
    default = nn.Module._save_to_state_dict
    for name, module in model.named_modules():
        custom = type(module)._save_to_state_dict is not default
        if custom and not isinstance(module, (QuantLinear, QuantEmbedding, QuantExperts)):
            raise ValueError(
                f"{name}: expected no module with its own way to save tensors, got "
                f"{type(module).__name__}"
            )


def _plain_config(model: PreTrainedModel, embeddings_packed: bool) -> Any:
    """A copy of the model's config as of an unquantized model."""
    config = copy.deepcopy(model.config)
    for field in (QUANTIZATION, "_pre_quantization_dtype"):
        if hasattr(config, field):
            delattr(config, field)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    tied = is_tied(model) or _stored_head(model, embeddings_packed) is not None
    if tied != getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = tied  # the file stores the tensor once
    return config


def quantization_config(model: PreTrainedModel, names: Names) -> tuple[dict[str, Any] | None, bool]:
    """(`quantization_config` or None, whether it covers the embeddings), with stored module names.

    Embeddings stay packed if the config covers them: compressed-tensors' config and our own can.
    Otherwise a packed embedding is written dequantized, in the dtype that it computes in, so that
    the model stays the same function.
    """
    to_stored = names.module_to_stored
    transposed = {to_stored(name) for name in transposed_layers(model)}
    layers, plain = matrices(model, names)
    embeddings = {
        to_stored(n): m.packed for n, m in model.named_modules() if isinstance(m, QuantEmbedding)
    }
    if any(not formats.get(packed.format).dense for packed in embeddings.values()):
        head = _tied_head(model)
        tied = None if head is None else to_stored(head)
        other_layers = {name: packed for name, packed in layers.items() if name != tied}
        try:
            return quantization.describe(
                {**embeddings, **other_layers}, plain, list(embeddings), transposed
            ), True
        except ValueError:
            pass
    return quantization.describe(layers, plain, (), transposed), False


def matrices(model: nn.Module, names: Names) -> tuple[dict[str, PackedWeight], list[str]]:
    """(packed weights, names of unquantized layers), both without embeddings, for `describe`."""
    layers = {
        names.module_to_stored(n): m.packed
        for n, m in model.named_modules()
        if isinstance(m, QuantLinear)
    }
    plain = [names.module_to_stored(n) for n, m in model.named_modules() if is_linear(m)]
    return layers | _packed_experts(model, names), plain + _plain_in_mixtures(model, names)


def _packed_experts(model: nn.Module, names: Names) -> dict[str, PackedWeight]:
    """Stored name of each expert's weight -> a weight of the same format and parameters."""
    weights: dict[str, PackedWeight] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, QuantExperts):
            try:
                first_expert = module.parts.expert(0)
            except ValueError as error:
                raise ValueError(f"{prefix}: {error}") from None
            for role, packed in first_expert.items():
                weights |= {
                    names.experts[prefix].of(e, role): packed for e in range(module.parts.count)
                }
    return weights


def _plain_in_mixtures(model: nn.Module, names: Names) -> list[str]:
    """Stored names of matrices that are no linear layers: routers and unquantized experts."""
    stored_names = [
        names.module_to_stored(name)
        for name, module in routers(model)
        if not isinstance(module, nn.Linear)
    ]
    for prefix, expert_names in names.experts.items():
        module = model.get_submodule(prefix)
        if _stored_separately(prefix, module, names):
            stored_names += [
                expert_names.of(e, role)
                for e in range(_expert_count(module))
                for role in expert_names.leaves
            ]
    return stored_names


def _stored_separately(prefix: str, module: nn.Module, names: Names) -> bool:
    """Whether files store each of the module's unquantized experts separately."""
    return prefix in names.experts and names.experts[prefix].mapped and bool(expert_shapes(module))


def _expert_count(module: nn.Module) -> int:
    """The number of experts in an experts module."""
    return next(
        parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3
    )


def _tied_head(model: PreTrainedModel) -> str | None:
    """Name of a QuantLinear head with the same bytes as the QuantEmbedding; None if none."""
    head, embedding = output_embeddings(model), input_embeddings(model)
    if not isinstance(head, QuantLinear) or not isinstance(embedding, QuantEmbedding):
        return None
    head_weight, embedding_weight = head.packed, embedding.packed
    if head.bias is not None or (head_weight.format, head_weight.shape, head_weight.params) != (
        embedding_weight.format, embedding_weight.shape, embedding_weight.params
    ):  # fmt: skip
        return None
    pairs = [
        (tensor, embedding_weight.tensors[name]) for name, tensor in head_weight.tensors.items()
    ]
    if not all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in pairs):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _stored_head(model: PreTrainedModel, embeddings_packed: bool) -> str | None:
    """Name of a tied head whose tensors the file stores only as the embedding's; None if none.

    A dequantized embedding can stand for a packed head only if the head is a 16-bit format.
    """
    embedding = input_embeddings(model)
    if not isinstance(embedding, QuantEmbedding):
        return None
    fmt = formats.get(embedding.packed.format)
    lossless = fmt.dense and embedding.packed.tensors["weight"].dtype == embedding.dtype
    return _tied_head(model) if embeddings_packed or lossless else None


def stored_tensors(
    model: PreTrainedModel, names: Names, embeddings_packed: bool, tied: str | None
) -> Iterator[tuple[str, Tensor]]:
    """(stored name, tensor) of everything that belongs in the file.

    A tied tensor comes once, under its first name. Tensors come layer by layer, so that the
    checkpoint form of a prepacked weight exists for one layer at a time.

    embeddings_packed: whether packed embeddings stay packed.
    tied: name of a packed head to leave out.
    """
    seen: set[tuple[Any, ...]] = set()
    transposed = transposed_layers(model)
    for prefix, module in model.named_modules():
        if prefix == tied:
            continue
        tensors: dict[str, Tensor]
        if isinstance(module, QuantEmbedding):
            stays = embeddings_packed and not formats.get(module.packed.format).dense
            tensors = (
                dict(module.packed.tensors)
                if stays
                else {"weight": module.packed.dequantize(module.dtype)}
            )
        elif isinstance(module, QuantLinear):
            tensors = dict(module.packed.tensors)
            if prefix in transposed and formats.get(module.packed.format).dense:
                tensors["weight"] = tensors["weight"].T
            if module.bias is not None:
                tensors["bias"] = module.bias
        elif _inside_quantized(model, prefix):
            continue
        elif isinstance(module, QuantExperts) or _stored_separately(prefix, module, names):
            yield from _experts_tensors(prefix, module, names)
            continue
        else:
            tensors = {k: v for k, v in module._parameters.items() if v is not None}
            buffers = module._buffers.items()
            tensors |= {
                k: v
                for k, v in buffers
                if v is not None and k not in module._non_persistent_buffers_set
            }
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise ValueError(
                    f"{prefix}.{name}: expected data to save, got a tensor on the meta device; "
                    "if the model is offloaded, remove the hooks first "
                    "(accelerate.hooks.remove_hook_from_submodules)"
                )
            if tensor.numel():
                key = (
                    tensor.data_ptr(),
                    tensor.device,
                    tensor.dtype,
                    tuple(tensor.shape),
                    tensor.stride(),
                )
                if key in seen and not isinstance(module, (QuantLinear, QuantEmbedding)):
                    continue
                seen.add(key)
            yield from _plain_tensor(f"{prefix}.{name}" if prefix else name, tensor, names)


def _plain_tensor(name: str, tensor: Tensor, names: Names) -> Iterator[tuple[str, Tensor]]:
    """The tensor under its stored name, or split in the parts that files store."""
    parts = names.parts(name)
    if not parts or tensor.shape[parts[0][1].dim] % len(parts):
        yield names.to_stored(name), tensor
        return
    pieces = tensor.chunk(len(parts), parts[0][1].dim)
    yield from ((stored, piece) for (stored, _), piece in zip(parts, pieces, strict=True))


def _experts_tensors(prefix: str, module: nn.Module, names: Names) -> Iterator[tuple[str, Tensor]]:
    """(stored name, tensor) of an experts module, for each expert separately."""
    expert_names = names.experts[prefix]
    if isinstance(module, QuantExperts):
        for e in range(module.parts.count):
            for role, packed in module.parts.expert(e).items():
                yield from (
                    (f"{expert_names.of(e, role)}.{name}", tensor)
                    for name, tensor in packed.tensors.items()
                )
        return
    gate_up, down = module.gate_up_proj, module.down_proj
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    rows = gate_up.shape[1] // 2
    for e in range(gate_up.shape[0]):
        parts = {GATE: gate_up[e, :rows], UP: gate_up[e, rows:], DOWN: down[e]}
        yield from (
            (f"{expert_names.of(e, role)}.weight", tensor) for role, tensor in parts.items()
        )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name not in ("gate_up_proj", "down_proj"):
            yield names.to_stored(f"{prefix}.{name}"), tensor


def _inside_quantized(model: nn.Module, name: str) -> bool:
    """Whether the module is a child of a QuantLinear."""
    parent = name.rpartition(".")[0]
    return bool(parent) and isinstance(model.get_submodule(parent), QuantLinear)
