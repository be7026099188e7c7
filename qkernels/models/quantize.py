"""Whole models: quantize in place, load, save, and count what they weigh."""

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
    """Replace every nn.Linear of `model` by a QuantLinear in `format`, in place; returns the model.

    GPT-2's Conv1D, a transposed linear, is taken for one.

    Without `calibration` weights are rounded to nearest, on the device they lie on. With it, token
    ids (samples, tokens) as `qkernels.calibration_ids` makes them, an algorithm chooses the codes
    block by block: the format's own (GPTQ for gptq, AWQ for awq, SmoothQuant for w8a8 and int8,
    static activation ranges for fp8) or the one named; its options go beside the format's
    parameters (gptq: damp, static_groups, clip_search; awq: clip; smoothquant: alpha). GGUF types
    take an importance matrix (or are given one, an `ImportanceMatrix`, for `calibration`), and
    q4_k_m and q5_k_m are llama.cpp's mixtures. AWQ and SmoothQuant change norms, too. `resume`
    names a directory that keeps finished blocks, to go on from after an interruption.

    The output projection (`lm_head`) and other heads are left alone, and so is each module whose
    full name matches one of the fnmatch patterns in `skip`, and each QuantLinear that is there
    already. So are, with a warning, layers that are not called but whose weight other code
    multiplies with (Mamba's dt_proj, the out_proj of torch's MultiheadAttention), and subclasses of
    nn.Linear that compute something else, and what transformers keeps in float32 (T5's wo).
    `progress` shows a bar on stderr, or one line if that is no terminal.

    Experts of a mixture that are linear layers are quantized like any. Those that are parameters of
    three dimensions, as in transformers from version 5 on, are left alone with a warning; with
    `experts` they become QuantExperts, by round-to-nearest.

    A group size that is not given is one for all layers: 128, or with a warning one that suits
    their input features better, the largest power of two from 32 on that divides all of them.

    Raises ValueError for a model that is a linear layer itself, and, naming the module, if one does
    not fit the format (a group size that it cannot store, a NaN in its weight), if a `skip` pattern
    matches nothing, or if calibration data or algorithm do not fit the format. The model is then
    unchanged: every layer is checked before the first is replaced. Only a scale that overflows its
    16-bit dtype, or a Hessian that stays singular, shows later, and leaves the layers before it
    quantized.
    """
    from ..formats.gguf import recipes
    from ..quantizers import algorithms, driver
    from ..quantizers.importance import ImportanceMatrix

    recipe = format if format in recipes.RECIPES else None
    fmt = formats.get(recipes.RECIPES[recipe] if recipe else format)
    if recipe and (params or resume is not None):
        given = next(iter(params), "resume")
        raise ValueError(
            f"{recipe}: {given}: expected none, because a recipe chooses formats itself"
        )
    places = linears(model, skip)
    stacks = _expert_stacks(model, skip, experts, recipe, calibration)
    kinds = {names[0]: fmt.name for names, _ in places}
    if recipe:
        kinds = recipes.assign(recipe, model, {names[0]: linear for names, linear in places})
    params = fmt.complete(_shapes(places, stacks if experts else []), params)
    chosen = None
    importance = calibration if isinstance(calibration, ImportanceMatrix) else None
    if importance is not None:
        calibration = None
        _check_importance(importance, fmt, places, kinds)
    if calibration is not None:
        kind = algorithms.choose(fmt, algorithm)
        params, options = driver.split_options(fmt, kind, params)
        chosen = kind(model, fmt, params, options)
        chosen.formats = kinds if recipe else {}
    elif algorithm is not None or resume is not None:
        given = "algorithm" if algorithm is not None else "resume"
        raise ValueError(
            f"{given}: expected None without calibration data, got {algorithm or resume!r}"
        )
    checked = {k: v for k, v in params.items() if k not in fmt.quantize_only}
    for names, linear in places:
        try:
            formats.get(kinds[names[0]]).resolve((linear.out_features, linear.in_features), checked)
            check_weight(f"{format}: weight", linear.weight)
            if linear.weight.is_meta:
                raise ValueError(
                    "weight: expected data, got a tensor on the meta device; is the model offloaded?"
                )
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from None
    for name, module in stacks if experts else ():
        try:
            experts_layers.check(module, fmt.name, checked)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, module in stacks if experts else ():
        stack = QuantExperts.from_module(module, format, **params)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, stack)
    if chosen is not None:
        wanted = {names[0]: linear for names, linear in places}
        for name, linear in wanted.items():  # those of GPT-2 come as another module
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
        with _bar(f"Quantizing to {format} with {chosen.name}", progress) as advance:
            driver.quantize_calibrated(
                model, fmt, wanted, calibration, chosen, resume, lambda done, total: advance(total)
            )
        _mark(model)
        return model
    with _bar(f"Quantizing to {format}", progress) as advance:
        # Popped one by one, so that a layer's float weight is freed as soon as it is replaced.
        total = len(places)
        places.reverse()
        while places:
            names, linear = places.pop()
            try:
                more = _weighted(importance, names[0], linear, kinds[names[0]])
                layer = QuantLinear.from_linear(linear, kinds[names[0]], **params, **more)
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
    places: list[tuple[list[str], nn.Linear]], stacks: list[tuple[str, nn.Module]]
) -> dict[str, tuple[int, int]]:
    """Name -> (N, K) of all weights that are to be quantized."""
    found = {names[0]: (linear.out_features, linear.in_features) for names, linear in places}
    for name, module in stacks:
        try:
            found |= {
                f"{name}.{own}": shape for own, shape in experts_layers.shapes(module).items()
            }
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def _expert_stacks(
    model: nn.Module, skip: Iterable[str] | None, wanted: bool, recipe: str | None, calibration: Any
) -> list[tuple[str, nn.Module]]:
    """(name, module) of experts that are no linear layers; says so if they are not `wanted`."""
    patterns = [skip] if isinstance(skip, str) else list(skip or ())
    found = [
        (n, m) for n, m in expert_modules(model) if not any(fnmatchcase(n, p) for p in patterns)
    ]
    if wanted and any(module is model for _, module in found):
        raise ValueError(
            f"model: expected a module with experts in it, which are replaced there, got bare "
            f"{type(model).__name__}; qkernels.QuantExperts.from_module makes packed experts of it"
        )
    if wanted and (recipe or calibration is not None):
        raise ValueError(
            "experts: expected False with a recipe or calibration data: they are rounded to nearest"
        )
    if found and not wanted:
        count = sum(p.numel() for _, m in found for p in m.parameters())
        warnings.warn(
            f"qkernels: the experts of {len(found)} layers ({found[0][0]}, ...), {count:,} weights, are no linear "
            "layers and stay as they are; experts=True quantizes them, too",
            stacklevel=3,
        )
    return found


def _weighted(importance: Any, name: str, linear: nn.Linear, format: str) -> dict[str, Any]:
    """What `qkernels.quantize` is told of the importance of a layer's inputs, where its format
    minds.
    """
    if importance is None or "importance" not in formats.get(format).quantize_only:
        return {}
    return {"importance": importance.of(name, linear.in_features).to(linear.weight.device)}


def _check_importance(
    importance: Any, fmt: Any, places: list[tuple[list[str], nn.Linear]], kinds: dict[str, str]
) -> None:
    if "importance" not in fmt.quantize_only:
        raise ValueError(
            f"calibration: expected token ids or None for {fmt.name}, got an importance matrix"
        )
    for names, linear in places:
        _weighted(importance, names[0], linear, kinds[names[0]])


@contextmanager
def _bar(title: str, show: bool) -> Iterator[Any]:
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
    """A copy of the module tree around the same parameters and buffers.

    Quantizing the copy in place leaves the original as it was, at the cost of the packed weights
    only.
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

    A directory's model is of the class that its config names (`architectures`), a causal language
    model if it names none. Where the config ties weights that the file holds twice with different
    values, both are kept.

    A directory's quantized layers become QuantLinear and keep their packed bytes; experts of a
    mixture, which checkpoints keep each by itself, become QuantExperts, stacked as they are, or
    stay plain if they are. A GGUF file of a Llama, Mixtral, Qwen2 or Qwen3 model (and their
    mixtures) computes from the file's own bytes, mapped but for experts, which are stacked;
    embeddings stay packed, too. `dtype`, or its name, converts the tensors that are not packed;
    None keeps the file's (GGUF: float32). Nothing is downloaded, and no pickle and no code from the
    directory is read; what its config says of implementations of attention ("flash_attention_2") is
    left out, so that transformers takes what suits this machine.

    Weights on the CPU stay mapped: they are the file's own bytes for as long as the model lives. A
    file that is replaced, as `save_model` and downloads do it, leaves the old one to the model. One
    that is cut or written to in place changes the model, or ends the process by SIGBUS; during the
    load that is noticed before each tensor, and refused. `copy.deepcopy(model)`, and a model on
    another device, need the file no more.

    Raises FileNotFoundError if there is nothing at `path`, ValueError naming file and field if it
    is not what it should be.
    """
    from .. import checkpoints

    return checkpoints.load(path, device=device, dtype=dtype)


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Save as a Hugging Face directory: config.json, safetensors, and the tokenizer if given.

    A path that ends in .gguf makes a GGUF file, which needs the tokenizer. In a directory GGUF's
    types and packed embeddings go by our own `quantization_config`; beside linears of another
    method an embedding is written dequantized.

    Quantized layers are stored in the ecosystem's own tensor names and `quantization_config`,
    experts of a mixture each by itself under its architecture's own names (Mixtral's
    `block_sparse_moe.experts.3.w1`). Weights above `max_shard_bytes` are cut into shards with an
    index. The directory appears whole or not at all; an earlier save at `path` is replaced. Raises
    ValueError if the layers differ in a way that no `quantization_config` can say, or if `path`
    holds something else.
    """
    from .. import checkpoints

    checkpoints.save(model, path, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)


# ---------------------------------------------------------------------- what it weighs
@dataclass(frozen=True)
class ModelSummary:
    """What a model holds.

    Attributes:
        weights: number of weights, packed ones counted as the (N, K) matrix they stand for, tied
        once. quantized_layers, quantized_weights, quantized_bytes: the QuantLinear layers and the
        matrices of
            QuantExperts, their N*K in sum,
            and the bytes of their checkpoint tensors.
        bits_per_weight: 8 * quantized_bytes / quantized_weights, None if no layer is quantized.
        total_bytes: bytes of everything in the model.
        formats: layers in each format.
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
