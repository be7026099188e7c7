"""config.json of a Hugging Face model directory, and the model it describes, without weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...formats.compressed_tensors import METHOD
from ..files import check_regular, errors_naming_file, read_json
from ..tensor_files import TensorFiles
from .config_checks import check_fields, check_values, without_implementations
from .quantization import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
QUANTIZATION = "quantization_config"
#: Field of config.json that names the file to load. transformers skips a `quant_method` that it
#: does not know, with a warning, and would run the directories that only we read on random weights.
#: If this field names no file, transformers stops and prints the name.
WEIGHTS = "transformers_weights"
NOTE = (
    "only qkernels reads these weights: import qkernels.integrations.transformers before "
    "from_pretrained"
)
_OLD_KEY = "compression_config"
#: sizes that the tensors in the files bound: see _check_sizes
_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "head_dim",
    "num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts",
    "n_routed_experts", "moe_num_experts", "moe_intermediate_size",
)  # fmt: skip
#: fields without which a config class would silently use the sizes of its default model
_REQUIRED_FIELDS = ("hidden_size", "num_hidden_layers", "vocab_size")
#: bytes of all buffers, which a model computes once: masks and tables of positions
_MAX_BUFFERS = 2**31
#: allowance of _SizeLimits for models with few tensors in their files: tensors made while the model
#: is built, and numbers in tables of positions that Python computes
_MORE_TENSORS, _MORE_NUMBERS = 20_000, 1 << 22
#: files in which AutoGPTQ and AutoAWQ kept their config before config.json had a field for it
_OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


class NoExperts(TorchFunctionMode):
    """Creates tensors of three dimensions on the meta device, where they take no memory.

    A module of experts allocates its weights before anything can replace it; a whole layer of them
    may not fit in memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and len(args) == 3 and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(directory: Path, files: TensorFiles) -> tuple[PreTrainedModel, Plan]:
    """(model on the meta device with unquantized layers, what is quantized) from config.json.

    Raises ValueError for sizes that the tensors in `files` cannot have, before anything of that
    size is allocated.
    """
    from accelerate import init_empty_weights

    config, quantized = read_config(directory)
    where = f"{directory / CONFIG}"
    plan = Plan(where, quantized)
    with errors_naming_file(directory / CONFIG, "a config of a known model class"):
        _check_sizes(where, config, files)
        model_class = _model_class(where, config)
    _try_on_meta(where, model_class, config, files)
    expected = f"a {model_class.__name__}'s config"
    with (
        errors_naming_file(directory / CONFIG, expected),
        init_empty_weights(include_buffers=False),
        NoExperts(),
    ):
        model = model_class._from_config(config)
    return model, plan


class _SizeLimits(TorchFunctionMode):
    """Stops code that creates more tensors, or larger parameters, than the files can hold."""

    _MAKERS = (
        torch.empty,
        torch.ones,
        torch.zeros,
        torch.full,
        torch.arange,
        torch.tensor,
        torch.rand,
        torch.randn,
    )

    def __init__(self, files: TensorFiles) -> None:
        super().__init__()
        self.tensors = self.most_tensors = 16 * len(files.infos) + _MORE_TENSORS
        self.numbers = self.most_numbers = _most_weights(files) + _MORE_NUMBERS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = func(*args, **(kwargs or {}))
        self.tensors -= func in self._MAKERS
        if self.tensors < 0:
            raise _TooLargeError(
                f"expected at most {self.most_tensors} tensors, as the files hold fewer, got more"
            )
        # Count parameters only. Experts' parameters, of three dimensions, are never allocated
        # (NoExperts), and _try_on_meta checks the buffers at the end.
        if func is torch.empty and tensor.dim() < 3:
            self.numbers -= tensor.numel()
        if self.numbers < 0:
            raise _TooLargeError(
                f"expected parameters of at most {self.most_numbers} numbers, as the files hold "
                "fewer, got more"
            )
        return tensor


class _TooLargeError(ValueError):
    """The model is larger than its files allow."""


def _try_on_meta(where: str, model_class: Any, config: Any, files: TensorFiles) -> None:
    """Build the model once on the meta device, to find what is too large.

    Raises ValueError if the model has far more tensors than the files, or larger buffers than any
    real model. Buffers take memory when the model is built in earnest.
    """
    try:
        with torch.device("meta"), _SizeLimits(files):
            model = model_class._from_config(copy.deepcopy(config))
    except _TooLargeError as error:
        raise ValueError(f"{where}: {error}") from None
    except Exception:  # a bad config: `skeleton` reports it
        return
    sizes = {name: buffer.numel() * buffer.element_size() for name, buffer in model.named_buffers()}
    if sum(sizes.values()) > _MAX_BUFFERS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"{where}: expected buffers of at most {_MAX_BUFFERS} bytes, got "
            f"{sum(sizes.values())}, the largest is {largest}"
        )


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config, unquantized and on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), NoExperts():
        return type(model)(model.config)


def transposed_layers(model: nn.Module) -> set[str]:
    """Names of the layers that the model's class creates as transformers' Conv1D (GPT-2's).

    The weight of a Conv1D is (K, N).
    """
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    module_globals = vars(sys.modules[type(model).__module__]).values()
    if not isinstance(model, PreTrainedModel) or not any(
        value is Conv1D for value in module_globals
    ):
        return set()
    return {
        name
        for name, module in without_weights(model).named_modules()
        if isinstance(module, Conv1D)
    }


def _model_class(where: str, config: Any) -> Any:
    """The class that `architectures` names, or else the causal language model of the config's type.

    ValueError if there is neither.
    """
    import transformers

    model_class: Any
    names = getattr(config, "architectures", None) or []
    for name in names if isinstance(names, list) else [names]:
        model_class = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            expected = getattr(model_class, "config_class", None)
            if expected is not None and not isinstance(config, expected):
                raise ValueError(
                    f"{where}: architectures: expected a class for the model type "
                    f"{config.model_type!r}, got {name!r}"
                )
            return model_class
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in causal:
        raise ValueError(
            f"{where}: architectures: expected a model class of transformers, because "
            f"{config.model_type!r} is no causal language model's type, got {names!r:.80}"
        )
    model_class = causal[type(config)]
    return model_class[0] if isinstance(model_class, tuple) else model_class


def _most_weights(files: TensorFiles) -> int:
    """An upper bound of the number of weights in the files: one for each bit."""
    return 8 * sum(info.nbytes for info in files.infos.values())


def _check_sizes(where: str, config: Any, files: TensorFiles) -> None:
    """ValueError for more layers than tensors, or a size above the number of weights."""
    weights = _most_weights(files)
    for config_part in (config, config.get_text_config()):
        for field in _SIZES:
            value = getattr(config_part, field, None)
            limit = len(files.infos) if field == "num_hidden_layers" else weights
            if type(value) is int and value > limit:
                raise ValueError(
                    f"{where}: {field}: expected at most {limit}, as the files hold "
                    f"{len(files.infos)} tensors and {weights // 8} bytes, got {value}"
                )


def _pop_quantization(path: Path, values: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the `quantization_config` from a config.json's `values` and return it.

    Some models of several parts have it in their `text_config`. In 2024 compressed-tensors called
    it `compression_config`, at first with a `quantization_config` and a `sparsity_config` inside,
    and method "sparseml".
    """
    text = values.get("text_config")
    inner = text.pop(QUANTIZATION, None) if isinstance(text, dict) else None
    outer, old_config = values.pop(QUANTIZATION, None), values.pop(_OLD_KEY, None)
    candidates = (
        (QUANTIZATION, outer), (f"text_config.{QUANTIZATION}", inner), (_OLD_KEY, old_config)
    )  # fmt: skip
    name, config = next(((n, value) for n, value in candidates if value is not None), ("", None))
    if config is None:
        return None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: {name}: expected an object, got {config!r:.60}")
    if name != _OLD_KEY:
        return config
    nested = config.get(QUANTIZATION)
    if isinstance(nested, dict):
        config = {"sparsity_config": config.get("sparsity_config"), **nested}
    if config.get("quant_method", "sparseml") == "sparseml":
        config = {**config, "quant_method": METHOD}
    return config


def read_values(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(config.json at `path` without `quantization_config`; that config or None), still as JSON.

    Raises FileNotFoundError, or ValueError for values that no model's config has: see
    config_checks.
    """
    values = read_json(path)
    quantization = _pop_quantization(path, values)
    values.pop(WEIGHTS, None)
    check_values(path, values)
    return without_implementations(path, values), quantization


def read_config(directory: Path) -> tuple[Any, Mapping[str, Any] | None]:
    """(transformers config without `quantization_config`; that config or None) of a directory.

    Raises ValueError if the file is no JSON, or lacks or misstates a field.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = directory / CONFIG
    values, quantization = read_values(path)
    for name, method in _OLD_CONFIGS.items():
        if quantization is None and check_regular(directory / name):
            quantization = {"quant_method": method, **read_json(directory / name)}
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{path}: model_type: expected a model transformers knows, got {model_type!r:.100}"
        )
    config_class = CONFIG_MAPPING[model_type]
    with errors_naming_file(path, f"a valid {model_type} config"):
        # {"__float__": "Infinity"}: JSON has no number for infinity
        values = config_class._decode_special_floats(values)
    check_fields(path, config_class, values)
    aliases = getattr(config_class, "attribute_map", {})
    nested = any(isinstance(value, dict) and "hidden_size" in value for value in values.values())
    for field in _REQUIRED_FIELDS:
        # a vision model has no vocabulary
        has_field = hasattr(config_class, aliases.get(field, field))
        if nested or not has_field or aliases.get(field, field) in values or field in values:
            continue
        raise ValueError(f"{path}: {field}: expected a positive integer, got none")
    for field in _REQUIRED_FIELDS:
        value = values.get(aliases.get(field, field), values.get(field, 1))
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: {field}: expected a positive integer, got {value!r}")
    with errors_naming_file(path, f"a valid {model_type} config"):
        return config_class.from_dict(values), quantization
