"""Whole models: quantize in place, load, save, and count weights and bytes."""

from __future__ import annotations

import copy
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import formats
from ..formats.base import check_weight
from ..nn import experts as experts_layers
from ..nn.experts import QuantExperts, expert_modules
from ..nn.linear import QuantLinear
from .candidates import linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantize_model(
    model: nn.Module,
    format: str,
    calibration: Any = None,
    *,
    algorithm: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    skip: Iterable[str] | None = None,
    experts: bool = False,
    progress: bool = True,
    **params: Any,
) -> nn.Module:
    """Replace every nn.Linear of `model` by a QuantLinear in `format`, in place.

    GPT-2's Conv1D, a transposed linear layer, counts as nn.Linear.

    Layers that stay as they are:
        - the output projection (`lm_head`) and other heads;
        - modules whose full name matches a pattern in `skip`, and layers quantized before;
        - with a warning: layers that are never called because other code multiplies with their
          weight (Mamba's dt_proj, the out_proj of torch's MultiheadAttention), subclasses of
          nn.Linear that compute something else, and layers that transformers keeps in float32
          (T5's wo);
        - with a warning, unless `experts` is set: experts of a mixture that are parameters of three
          dimensions, as in transformers from version 5 on. Experts that are linear layers are
          quantized like all others.

    Args:
        format: a storage format, or q4_k_m or q5_k_m, llama.cpp's mixtures of GGUF types.
        calibration: token ids (samples, tokens), as `qkernels.calibration_ids` makes them. With
            them an algorithm chooses the codes block by block; without them weights are rounded to
            nearest, on their own device. GGUF types also take an `ImportanceMatrix`.
        algorithm: the algorithm to use instead of the format's default (gptq: GPTQ, awq: AWQ, w8a8
            and int8: SmoothQuant, fp8: static activation ranges, GGUF types: an importance matrix).
            AWQ and SmoothQuant also change norms.
        resume: directory for finished blocks, to resume from after an interruption.
        skip: fnmatch patterns of full module names.
        experts: make QuantExperts of three-dimensional experts, by round-to-nearest.
        progress: show a bar on stderr, or one line if stderr is no terminal.
        params: the format's parameters, and the algorithm's options (gptq: damp, static_groups,
            clip_search; awq: clip; smoothquant: alpha). Without `group_size` all layers get the
            same: 128, or with a warning, where 128 does not divide all numbers of input features,
            the largest power of two from 32 on that does.

    Returns:
        `model`.

    Raises:
        ValueError: if the model is a linear layer itself; if a layer does not fit the format (a
            group size that it cannot store, a NaN in its weight), naming the layer; if a `skip`
            pattern matches nothing; if calibration data or algorithm do not fit the format. Every
            layer is checked before the first is replaced, so the model is then unchanged. Two
            errors show only later and leave the layers before them quantized: a scale that
            overflows its 16-bit dtype, and a Hessian that stays singular.
    """
    from ..formats.gguf import recipes
    from ..quantizers import algorithms, driver
    from ..quantizers.importance import ImportanceMatrix

    recipe = format if format in recipes.RECIPES else None
    fmt = formats.get(recipes.RECIPES[recipe] if recipe else format)
    if recipe and (params or resume is not None):
        argument = next(iter(params), "resume")
        raise ValueError(
            f"{recipe}: {argument}: expected none, because a recipe chooses formats itself"
        )
    layers = linears(model, skip)
    stacks = _expert_stacks(model, skip, experts, recipe, calibration)
    layer_formats = {names[0]: fmt.name for names, _ in layers}
    if recipe:
        layer_formats = recipes.assign(recipe, model, {names[0]: m for names, m in layers})
    params = fmt.complete(_shapes(layers, stacks if experts else []), params)
    runner = None
    importance = calibration if isinstance(calibration, ImportanceMatrix) else None
    if importance is not None:
        calibration = None
        _check_importance(importance, fmt, layers, layer_formats)
    if calibration is not None:
        kind = algorithms.choose(fmt, algorithm)
        params, options = driver.split_options(fmt, kind, params)
        runner = kind(model, fmt, params, options)
        runner.formats = layer_formats if recipe else {}
    elif algorithm is not None or resume is not None:
        argument = "algorithm" if algorithm is not None else "resume"
        raise ValueError(
            f"{argument}: expected None without calibration data, got {algorithm or resume!r}"
        )
    stored_params = {k: v for k, v in params.items() if k not in fmt.quantize_only}
    for names, linear in layers:
        try:
            shape = (linear.out_features, linear.in_features)
            formats.get(layer_formats[names[0]]).resolve(shape, stored_params)
            check_weight(f"{format}: weight", linear.weight)
            if linear.weight.is_meta:
                raise ValueError(
                    "weight: expected data, got a tensor on the meta device; "
                    "is the model offloaded?"
                )
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from None
    for name, module in stacks if experts else ():
        try:
            experts_layers.check(module, fmt.name, stored_params)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, module in stacks if experts else ():
        stack = QuantExperts.from_module(module, format, **params)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, stack)
    if runner is not None:
        by_name = {names[0]: linear for names, linear in layers}
        for name, linear in by_name.items():  # GPT-2's Conv1D became an nn.Linear in `linears`
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
        with _bar(f"Quantizing to {format} with {runner.name}", progress) as advance:
            driver.quantize_calibrated(
                model, fmt, by_name, calibration, runner, resume, lambda done, total: advance(total)
            )
        _mark(model)
        return model
    with _bar(f"Quantizing to {format}", progress) as advance:
        # Popped one by one, so that a layer's float weight is freed as soon as it is replaced.
        total = len(layers)
        layers.reverse()
        while layers:
            names, linear = layers.pop()
            try:
                layer_format = layer_formats[names[0]]
                more = _importance_of(importance, names[0], linear, layer_format)
                layer = QuantLinear.from_linear(linear, layer_format, **params, **more)
            except ValueError as error:
                raise ValueError(f"{names[0]}: {error}") from None
            for name in names:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer)
            advance(total)
    _mark(model)
    return model


def _mark(model: nn.Module) -> None:
    """Make transformers save the model as `save_model` does."""
    if "transformers" in sys.modules:
        from ..checkpoints.hf.save_pretrained import attach_saver

        attach_saver(model)


def _shapes(
    layers: list[tuple[list[str], nn.Linear]], stacks: list[tuple[str, nn.Module]]
) -> dict[str, tuple[int, int]]:
    """Name -> (N, K) of all weights to quantize."""
    shapes = {names[0]: (linear.out_features, linear.in_features) for names, linear in layers}
    for name, module in stacks:
        try:
            shapes |= {
                f"{name}.{key}": value for key, value in experts_layers.shapes(module).items()
            }
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return shapes


def _expert_stacks(
    model: nn.Module,
    skip: Iterable[str] | None,
    replace: bool,
    recipe: str | None,
    calibration: Any,
) -> list[tuple[str, nn.Module]]:
    """(name, module) of experts that are no linear layers; warns of them unless `replace`."""
    patterns = [skip] if isinstance(skip, str) else list(skip or ())
    stacks = [
        (n, m) for n, m in expert_modules(model) if not any(fnmatchcase(n, p) for p in patterns)
    ]
    if replace and any(module is model for _, module in stacks):
        raise ValueError(
            f"model: expected a module with experts in it, which are replaced there, got bare "
            f"{type(model).__name__}; qkernels.QuantExperts.from_module makes packed experts of it"
        )
    if replace and (recipe or calibration is not None):
        raise ValueError(
            "experts: expected False with a recipe or calibration data: they are rounded to nearest"
        )
    if stacks and not replace:
        count = sum(p.numel() for _, m in stacks for p in m.parameters())
        warnings.warn(
            f"qkernels: the experts of {len(stacks)} layers ({stacks[0][0]}, ...), {count:,} "
            "weights, are no linear layers and stay as they are; experts=True quantizes them, too",
            stacklevel=3,
        )
    return stacks


def _importance_of(importance: Any, name: str, linear: nn.Linear, format: str) -> dict[str, Any]:
    """The argument `importance` of `qkernels.quantize` for a layer, if its format takes one."""
    if importance is None or "importance" not in formats.get(format).quantize_only:
        return {}
    return {"importance": importance.of(name, linear.in_features).to(linear.weight.device)}


def _check_importance(
    importance: Any,
    fmt: Any,
    layers: list[tuple[list[str], nn.Linear]],
    layer_formats: dict[str, str],
) -> None:
    """Raise ValueError unless the importance matrix fits the format and all layers."""
    if "importance" not in fmt.quantize_only:
        raise ValueError(
            f"calibration: expected token ids or None for {fmt.name}, got an importance matrix"
        )
    for names, linear in layers:
        _importance_of(importance, names[0], linear, layer_formats[names[0]])


@contextmanager
def _bar(title: str, show: bool) -> Iterator[Any]:
    """A progress bar on stderr; yields a function that takes the total and advances by one."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    if show and not console.is_terminal:
        console.print(title)
    hidden = not (show and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda total: bar.update(task, advance=1, total=total)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree with the same parameters and buffers.

    Quantizing the copy in place does not change the original, and only the packed weights cost
    memory.
    """
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})


# ---------------------------------------------------------------------- load and save
def load_model(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
) -> PreTrainedModel:
    """Load a model from a Hugging Face directory or a .gguf file.

    A directory's model has the class that its config names (`architectures`); if it names none, the
    model is a causal language model. Where the config ties weights that the file holds twice with
    different values, both are kept. Quantized layers become QuantLinear and keep their packed
    bytes. Quantized experts of a mixture, which checkpoints store one by one, are stacked to
    QuantExperts; unquantized experts stay unquantized. The config's choice of an attention
    implementation ("flash_attention_2") is ignored, so that transformers takes one that suits this
    machine.

    A GGUF file may hold a Llama, Mixtral, Qwen2 or Qwen3 model or one of their mixtures. Layers
    compute from the file's own bytes, which are mapped, except for experts, which are stacked.
    Embeddings also stay packed.

    Nothing is downloaded, and no pickle and no code from the directory is read.

    Weights on the CPU stay mapped: they are the file's bytes for as long as the model lives. If the
    file is replaced by another, as `save_model` and downloads do, the model keeps the old one. If
    it is truncated or written in place, the model changes or the process ends by SIGBUS; during the
    load this is checked before each tensor and refused. `copy.deepcopy(model)` and a model on
    another device do not need the file.

    Args:
        device: device of the model.
        dtype: dtype, or its name, of the tensors that are not packed; None keeps the file's (GGUF:
            float32).

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: naming file and field, for a file with anything unexpected in it.
    """
    from .. import checkpoints

    return checkpoints.load(path, device=device, dtype=dtype)


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Save as a Hugging Face directory, or as a GGUF file if `path` ends in .gguf.

    A directory has config.json, safetensors, and the tokenizer if given. Quantized layers have the
    ecosystem's own tensor names and `quantization_config`; experts of a mixture are stored one by
    one under their architecture's names (Mixtral's `block_sparse_moe.experts.3.w1`). GGUF's types
    and packed embeddings have our own `quantization_config`; next to linear layers of another
    method an embedding is written dequantized. The directory appears completely or not at all, and
    replaces an earlier save at `path`.

    Args:
        tokenizer: saved with the model; a GGUF file needs it.
        max_shard_bytes: weights above this size are divided into shards with an index.

    Raises:
        ValueError: if no `quantization_config` can describe the layers, or if `path` holds
            something else.
    """
    from .. import checkpoints

    checkpoints.save(model, path, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)


# ---------------------------------------------------------------------- weights and bytes
@dataclass(frozen=True)
class ModelSummary:
    """Counts of a model's weights and bytes.

    Attributes:
        weights: number of weights; a packed weight counts as its (N, K) matrix, tied weights once.
        quantized_layers: number of QuantLinear layers and of matrices of QuantExperts.
        quantized_weights: their weights, the sum of N*K.
        quantized_bytes: bytes of their checkpoint tensors.
        bits_per_weight: 8 * quantized_bytes / quantized_weights, None if no layer is quantized.
        total_bytes: bytes of everything in the model.
        formats: format -> number of layers.
    """

    weights: int
    quantized_layers: int
    quantized_weights: int
    quantized_bytes: int
    bits_per_weight: float | None
    total_bytes: int
    formats: dict[str, int]


def model_summary(model: nn.Module) -> ModelSummary:
    """Count weights and bytes; tied and shared tensors count once."""
    weights = quantized_weights = quantized_bytes = other = 0
    kinds: dict[str, int] = {}
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    packed_buffers: set[int] = set()
    for layer in layers:
        packed = layer.packed
        quantized_weights += math.prod(packed.shape)
        quantized_bytes += packed.nbytes
        kinds[packed.format] = kinds.get(packed.format, 0) + 1
        packed_buffers |= {id(buffer) for buffer in layer.buffers()}
    stacks = [s for m in model.modules() if isinstance(m, QuantExperts) for s in m.parts.stacks]
    for stack in stacks:
        quantized_weights += stack.count * math.prod(stack.shape)
        quantized_bytes += stack.nbytes
        kinds[stack.format] = kinds.get(stack.format, 0) + stack.count
    for parameter in model.parameters():
        weights += parameter.numel()
        other += parameter.numel() * parameter.element_size()
    for buffer in model.buffers():
        if id(buffer) not in packed_buffers:
            other += buffer.numel() * buffer.element_size()
    return ModelSummary(
        weights=weights + quantized_weights,
        quantized_layers=len(layers) + sum(stack.count for stack in stacks),
        quantized_weights=quantized_weights,
        quantized_bytes=quantized_bytes,
        bits_per_weight=8 * quantized_bytes / quantized_weights if quantized_weights else None,
        total_bytes=other + quantized_bytes,
        formats=kinds,
    )
