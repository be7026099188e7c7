"""Writing a model as a Hugging Face directory; reader.py reads it."""

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

    All is written to a directory beside `path` that takes its name at the end, so `path` always
    holds the whole model, the old one or the new one, even if the process is killed. An earlier
    save there is replaced. Weights above `max_shard_bytes` are sharded.

    Raises ValueError if the quantized layers differ in a way no `quantization_config` can say, or
    if `path` is a file or holds something that is no saved model, and OSError if the disk is full.
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
    quantized, packed = quantization_config(model, names)
    config = _plain_config(model, packed)
    with directories.replacing(Path(path)) as fresh:
        tensors = stored_tensors(model, names, packed, _stored_head(model, packed))
        tensor_files.write(tensors, fresh, max_shard_bytes)
        config.save_pretrained(fresh)
        if quantized is not None:
            directories.write_json(
                fresh / CONFIG, {**read_json(fresh / CONFIG), **_marks(quantized)}
            )
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            model.generation_config.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)


def _marks(quantized: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of quantization. Where only we read it, transformers is kept from
    trying: see NOTE.
    """
    note = {WEIGHTS: NOTE} if quantized["quant_method"] == quantization.OWN_METHOD else {}
    return {QUANTIZATION: quantized, **note}


def check_savable(model: nn.Module) -> None:
    """ValueError for a module whose tensors `stored_tensors` cannot know: they would be lost."""
    usual = nn.Module._save_to_state_dict
    for name, module in model.named_modules():
        own = type(module)._save_to_state_dict is not usual
        if own and not isinstance(module, (QuantLinear, QuantEmbedding, QuantExperts)):
            raise ValueError(
                f"{name}: expected no module that keeps its tensors in a way of its own, got {type(module).__name__}"
            )


def _plain_config(model: PreTrainedModel, packed: bool) -> Any:
    config = copy.deepcopy(model.config)
    for mark in (QUANTIZATION, "_pre_quantization_dtype"):
        if hasattr(config, mark):
            delattr(config, mark)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    tied = is_tied(model) or _stored_head(model, packed) is not None
    if tied != getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = tied  # whether the tensor is stored once
    return config


def quantization_config(model: PreTrainedModel, names: Names) -> tuple[dict[str, Any] | None, bool]:
    """(`quantization_config` or None, whether it speaks of embeddings, which then stay packed).

    It calls modules as the files do.

    compressed-tensors' config and our own can say that an embedding is packed. Beside linears of
    another method it is written dequantized, in the dtype it computes in, so that the model stays
    the same function.
    """
    stored = names.module
    transposed = {stored(name) for name in transposed_layers(model)}
    layers, plain = matrices(model, names)
    embeddings = {
        stored(n): m.packed for n, m in model.named_modules() if isinstance(m, QuantEmbedding)
    }
    if any(not formats.get(packed.format).dense for packed in embeddings.values()):
        head = _tied_head(model)
        tied = None if head is None else stored(head)
        others = {name: packed for name, packed in layers.items() if name != tied}
        try:
            return quantization.describe(
                {**embeddings, **others}, plain, list(embeddings), transposed
            ), True
        except ValueError:
            pass
    return quantization.describe(layers, plain, (), transposed), False


def matrices(model: nn.Module, names: Names) -> tuple[dict[str, PackedWeight], list[str]]:
    """(packed weights but embeddings, names of plain ones) as `quantization.describe` takes them."""
    layers = {
        names.module_to_stored(n): m.packed
        for n, m in model.named_modules()
        if isinstance(m, QuantLinear)
    }
    plain = [names.module_to_stored(n) for n, m in model.named_modules() if is_linear(m)]
    return layers | _packed_experts(model, names), plain + _plain_in_mixtures(model, names)


def _packed_experts(model: nn.Module, names: Names) -> dict[str, PackedWeight]:
    """The files' name of each expert's weight -> one that is in the same format with the same
    parameters.
    """
    found: dict[str, PackedWeight] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, QuantExperts):
            try:
                like = module.parts.expert(0)
            except ValueError as error:
                raise ValueError(f"{prefix}: {error}") from None
            for role, packed in like.items():
                found |= {
                    names.experts[prefix].of(e, role): packed for e in range(module.parts.count)
                }
    return found


def _plain_in_mixtures(model: nn.Module, names: Names) -> list[str]:
    """The files' names of what else is a matrix beside or among experts, but no linear layer:
    routers, plain experts.
    """
    found = [
        names.module_to_stored(name)
        for name, module in routers(model)
        if not isinstance(module, nn.Linear)
    ]
    for prefix, own in names.experts.items():
        module = model.get_submodule(prefix)
        if _by_themselves(prefix, module, names):
            found += [own.of(e, role) for e in range(_count(module)) for role in own.leaves]
    return found


def _by_themselves(prefix: str, module: nn.Module, names: Names) -> bool:
    """Whether files keep each of a module's plain experts by itself."""
    return prefix in names.experts and names.experts[prefix].mapped and bool(expert_shapes(module))


def _count(module: nn.Module) -> int:
    return next(
        parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3
    )


def _tied_head(model: PreTrainedModel) -> str | None:
    """Name of a QuantLinear output projection that holds the same bytes as the QuantEmbedding, or
    None.
    """
    head, embedding = output_embeddings(model), input_embeddings(model)
    if not isinstance(head, QuantLinear) or not isinstance(embedding, QuantEmbedding):
        return None
    ours, theirs = head.packed, embedding.packed
    if head.bias is not None or (ours.format, ours.shape, ours.params) != (
        theirs.format, theirs.shape, theirs.params
    ):  # fmt: skip
        return None
    pairs = [(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items()]
    if not all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in pairs):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _stored_head(model: PreTrainedModel, packed: bool) -> str | None:
    """Name of a tied head of which the file holds only the embedding's tensors, or None.

    A dequantized embedding is no packed head's weight, unless it is 16 bits wide in the first
    place.
    """
    embedding = input_embeddings(model)
    if not isinstance(embedding, QuantEmbedding):
        return None
    fmt = formats.get(embedding.packed.format)
    same = fmt.dense and embedding.packed.tensors["weight"].dtype == embedding.dtype
    return _tied_head(model) if packed or same else None


def stored_tensors(
    model: PreTrainedModel, names: Names, packed: bool, tied: str | None
) -> Iterator[tuple[str, Tensor]]:
    """(the files' name, tensor) of all that belongs in the file, a tied tensor under its first name
    only.

    packed: embeddings stay so. tied: a packed head to leave out. Layer by layer, so that the
    checkpoint's form of a prepacked weight exists for one layer at a time.
    """
    seen: set[tuple[Any, ...]] = set()
    transposed = transposed_layers(model)
    for prefix, module in model.named_modules():
        if prefix == tied:
            continue
        own: dict[str, Tensor]
        if isinstance(module, QuantEmbedding):
            stays = packed and not formats.get(module.packed.format).dense
            own = (
                dict(module.packed.tensors)
                if stays
                else {"weight": module.packed.dequantize(module.dtype)}
            )
        elif isinstance(module, QuantLinear):
            own = dict(module.packed.tensors)
            if prefix in transposed and formats.get(module.packed.format).dense:
                own["weight"] = own["weight"].T
            if module.bias is not None:
                own["bias"] = module.bias
        elif _inside_quantized(model, prefix):
            continue
        elif isinstance(module, QuantExperts) or _by_themselves(prefix, module, names):
            yield from _experts_tensors(prefix, module, names)
            continue
        else:
            own = {k: v for k, v in module._parameters.items() if v is not None}
            buffers = module._buffers.items()
            own |= {
                k: v
                for k, v in buffers
                if v is not None and k not in module._non_persistent_buffers_set
            }
        for name, tensor in own.items():
            if tensor.is_meta:
                raise ValueError(
                    f"{prefix}.{name}: expected data to save, got a tensor on the meta device; of an offloaded model "
                    "take the hooks off first (accelerate.hooks.remove_hook_from_submodules)"
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
    """A tensor under the files' name, or in the parts that they keep it in."""
    parts = names.parts(name)
    if not parts or tensor.shape[parts[0][1].dim] % len(parts):
        yield names.to_stored(name), tensor
        return
    pieces = tensor.chunk(len(parts), parts[0][1].dim)
    yield from ((stored, piece) for (stored, _), piece in zip(parts, pieces, strict=True))


def _experts_tensors(prefix: str, module: nn.Module, names: Names) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module of experts, each expert's by themselves."""
    own = names.experts[prefix]
    if isinstance(module, QuantExperts):
        for e in range(module.parts.count):
            for role, packed in module.parts.expert(e).items():
                yield from (
                    (f"{own.of(e, role)}.{name}", tensor) for name, tensor in packed.tensors.items()
                )
        return
    gate_up, down = module.gate_up_proj, module.down_proj
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    rows = gate_up.shape[1] // 2
    for e in range(gate_up.shape[0]):
        parts = {GATE: gate_up[e, :rows], UP: gate_up[e, rows:], DOWN: down[e]}
        yield from ((f"{own.of(e, role)}.weight", tensor) for role, tensor in parts.items())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name not in ("gate_up_proj", "down_proj"):
            yield names.to_stored(f"{prefix}.{name}"), tensor


def _inside_quantized(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return bool(parent) and isinstance(model.get_submodule(parent), QuantLinear)
