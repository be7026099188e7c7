"""config.json of a Hugging Face model directory, and the model it describes, still without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from ..formats.compressed_tensors import METHOD
from .quantization import Plan
from .tensor_files import TensorFiles, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
QUANTIZATION = "quantization_config"
_OLD_KEY = "compression_config"
#: without these in config.json a config class would silently take its own model's sizes
_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads",
    "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "moe_intermediate_size",
)  # fmt: skip
_REQUIRED_FIELDS = ("hidden_size", "num_hidden_layers", "vocab_size")
#: where AutoGPTQ and AutoAWQ kept their config before config.json had a place for it
_OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


class NoExperts(TorchFunctionMode):
    """Sends tensors of three dimensions to the meta device before they are there.

    What holds the weights of experts is made in memory first; a whole layer of them may not fit.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and len(args) == 3 and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(directory: Path, files: TensorFiles) -> tuple[PreTrainedModel, Plan]:
    """(model on the meta device with plain linears, what is quantized) as config.json describes it.

    Raises ValueError for sizes that the tensors in `files` cannot have, before anything is made that big.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config, quantized = read_config(directory)
    where = f"{directory / CONFIG}"
    plan = Plan(where, quantized)
    _check_sizes(where, config, files)
    try:
        with init_empty_weights(include_buffers=False), NoExperts():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config can break a model class in any way
        raise ValueError(f"{where}: expected a causal language model's config, got {error!r:.300}") from error
    return model, plan


def _check_sizes(where: str, config: Any, files: TensorFiles) -> None:
    """ValueError for more layers than tensors, or a size above the number of weights there can be."""
    weights = 8 * sum(info.nbytes for info in files.infos.values())  # of a bit each
    for part in (config, config.get_text_config()):
        for field in _SIZES:
            value = getattr(part, field, None)
            limit = len(files.infos) if field == "num_hidden_layers" else weights
            if type(value) is int and value > limit:
                raise ValueError(
                    f"{where}: {field}: expected at most {limit}, as the files hold {len(files.infos)} tensors "
                    f"and {weights // 8} bytes, got {value}"
                )


def _quantization(path: Path, values: dict[str, Any]) -> dict[str, Any] | None:
    """Take the `quantization_config` out of a config.json's `values`.

    Some models of several parts have it in their `text_config`. compressed-tensors called it `compression_config` in
    2024, at first with a `quantization_config` and a `sparsity_config` inside it, and method "sparseml".
    """
    text = values.get("text_config")
    inner = text.pop(QUANTIZATION, None) if isinstance(text, dict) else None
    outer, old = values.pop(QUANTIZATION, None), values.pop(_OLD_KEY, None)
    stated = [(name, given) for name, given in ((QUANTIZATION, outer), (f"text_config.{QUANTIZATION}", inner),
                                                (_OLD_KEY, old)) if given is not None]  # fmt: skip
    if not stated:
        return None
    name, given = stated[0]
    if not isinstance(given, dict):
        raise ValueError(f"{path}: {name}: expected an object, got {given!r:.60}")
    if name != _OLD_KEY:
        return given
    part = given.get(QUANTIZATION)
    if isinstance(part, dict):
        given = {"sparsity_config": given.get("sparsity_config"), **part}
    if given.get("quant_method", "sparseml") == "sparseml":
        given = {**given, "quant_method": METHOD}
    return given


def read_config(directory: Path) -> tuple[Any, Mapping[str, Any] | None]:
    """(transformers config without it, `quantization_config` or None) of a model directory.

    Raises ValueError if the file is no JSON, or lacks or misstates a field.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = directory / CONFIG
    values = read_json(path)
    quantization = _quantization(path, values)
    for name, method in _OLD_CONFIGS.items():
        if quantization is None and (directory / name).is_file():
            quantization = {"quant_method": method, **read_json(directory / name)}
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{path}: model_type: expected a model transformers knows, got {kind!r}")
    config_class = CONFIG_MAPPING[kind]
    aliases = getattr(config_class, "attribute_map", {})
    nested = any(isinstance(value, dict) and "hidden_size" in value for value in values.values())
    for field in _REQUIRED_FIELDS:
        if nested or aliases.get(field, field) in values or field in values:
            continue
        raise ValueError(f"{path}: {field}: expected a positive integer, got none")
    for field in _REQUIRED_FIELDS:
        value = values.get(aliases.get(field, field), values.get(field, 1))
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: {field}: expected a positive integer, got {value!r}")
    try:
        return config_class.from_dict(values), quantization
    except Exception as error:  # its checks raise their own kinds, some of them not ValueErrors
        raise ValueError(f"{path}: expected a valid {kind} config, got: {error}") from error
