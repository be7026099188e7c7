"""config.json of a Hugging Face model directory, and the model it describes, still without weights."""

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
from ..files import check_regular, read_json, told_by
from ..tensor_files import TensorFiles
from .config_checks import check_fields, check_values, without_implementations
from .quantization import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
QUANTIZATION = "quantization_config"
#: config.json's field for the file to load. transformers skips a `quant_method` that it does not
#: know, with a
#: warning, and would run our own directories on random weights. A name that is no file it refuses,
#: and prints.
WEIGHTS = "transformers_weights"
NOTE = "only qkernels reads these weights: import qkernels.integrations.transformers before from_pretrained"
_OLD_KEY = "compression_config"
#: without these in config.json a config class would silently take its own model's sizes
_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads",
    "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "moe_intermediate_size",
)  # fmt: skip
_REQUIRED_FIELDS = ("hidden_size", "num_hidden_layers", "vocab_size")
#: bytes of what a model computes once: masks and tables of positions
_MAX_BUFFERS = 2**31
#: made while a model is built that has none in its files; numbers in tables of positions, which are
#: computed in Python
_MORE_TENSORS, _MORE_NUMBERS = 20_000, 1 << 22
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

    Raises ValueError for sizes that the tensors in `files` cannot have, before anything is made
    that big.
    """
    from accelerate import init_empty_weights

    config, quantized = read_config(directory)
    where = f"{directory / CONFIG}"
    plan = Plan(where, quantized)
    with told_by(directory / CONFIG, "a config of a model class that is there"):
        _check_sizes(where, config, files)
        kind = _model_class(where, config)
    _try_on_meta(where, kind, config, files)
    expected = f"a {kind.__name__}'s config"
    with (
        told_by(directory / CONFIG, expected),
        init_empty_weights(include_buffers=False),
        NoExperts(),
    ):
        model = kind._from_config(config)
    return model, plan


class _Unsigned(TorchFunctionMode):
    """Stops what makes more tensors, or parameters of more numbers, than there can be."""

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
        self.numbers = self.most_numbers = _weights(files) + _MORE_NUMBERS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.tensors -= func in self._MAKERS
        if self.tensors < 0:
            raise _TooMuchError(
                f"expected at most {self.most_tensors} tensors, as the files hold fewer, got more"
            )
        # Of parameters alone: those of experts, of three dimensions, are never made (NoExperts),
        # and buffers are looked at when all are there.
        if func is torch.empty and made.dim() < 3:
            self.numbers -= made.numel()
        if self.numbers < 0:
            raise _TooMuchError(
                f"expected parameters of at most {self.most_numbers} numbers, as the files hold fewer, got more"
            )
        return made


class _TooMuchError(ValueError):
    pass


def _try_on_meta(where: str, kind: Any, config: Any, files: TensorFiles) -> None:
    """Build the model without memory first. ValueError if it has far more tensors than the files,
    or buffers, which are really there later, that no model has."""
    try:
        with torch.device("meta"), _Unsigned(files):
            model = kind._from_config(copy.deepcopy(config))
    except _TooMuchError as error:
        raise ValueError(f"{where}: {error}") from None
    except Exception:  # of a bad config: building it in earnest says so
        return
    sizes = {name: buffer.numel() * buffer.element_size() for name, buffer in model.named_buffers()}
    if sum(sizes.values()) > _MAX_BUFFERS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"{where}: expected buffers of at most {_MAX_BUFFERS} bytes, got {sum(sizes.values())}, the largest is {largest}"
        )


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config, plain and on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), NoExperts():
        return type(model)(model.config)


def transposed_layers(model: nn.Module) -> set[str]:
    """Names of the layers that the model's class makes as transformers' Conv1D, whose weight is (K,
    N): GPT-2's.
    """
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    known = vars(sys.modules[type(model).__module__]).values()
    if not isinstance(model, PreTrainedModel) or not any(value is Conv1D for value in known):
        return set()
    return {
        name
        for name, module in without_weights(model).named_modules()
        if isinstance(module, Conv1D)
    }


def _model_class(where: str, config: Any) -> Any:
    """The class that `architectures` names; the causal language model of this type if it names none
    known.

    ValueError if there is neither.
    """
    import transformers

    kind: Any
    names = getattr(config, "architectures", None) or []
    for name in names if isinstance(names, list) else [names]:
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            expected = getattr(kind, "config_class", None)
            if expected is not None and not isinstance(config, expected):
                raise ValueError(
                    f"{where}: architectures: expected a class for the model type {config.model_type!r}, got {name!r}"
                )
            return kind
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in causal:
        raise ValueError(
            f"{where}: architectures: expected a model class of transformers, because {config.model_type!r} is no "
            f"causal language model's type, got {names!r:.80}"
        )
    kind = causal[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


def _weights(files: TensorFiles) -> int:
    """How many there can be, of a bit each."""
    return 8 * sum(info.nbytes for info in files.infos.values())


def _check_sizes(where: str, config: Any, files: TensorFiles) -> None:
    """ValueError for more layers than tensors, or a size above the number of weights there can be."""
    weights = _weights(files)
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

    Some models of several parts have it in their `text_config`. compressed-tensors called it
    `compression_config` in 2024, at first with a `quantization_config` and a `sparsity_config`
    inside it, and method "sparseml".
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


def read_values(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(the config.json at `path` without it, `quantization_config` or None), still as JSON.

    Raises FileNotFoundError, or ValueError for what no model's config says: see config_checks.
    """
    values = read_json(path)
    quantization = _quantization(path, values)
    values.pop(WEIGHTS, None)
    check_values(path, values)
    return without_implementations(path, values), quantization


def read_config(directory: Path) -> tuple[Any, Mapping[str, Any] | None]:
    """(transformers config without it, `quantization_config` or None) of a model directory.

    Raises ValueError if the file is no JSON, or lacks or misstates a field.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = directory / CONFIG
    values, quantization = read_values(path)
    for name, method in _OLD_CONFIGS.items():
        if quantization is None and check_regular(directory / name):
            quantization = {"quant_method": method, **read_json(directory / name)}
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{path}: model_type: expected a model transformers knows, got {kind!r:.100}"
        )
    config_class = CONFIG_MAPPING[kind]
    with told_by(path, f"a valid {kind} config"):
        # {"__float__": "Infinity"}, which JSON has no number for
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
    with told_by(path, f"a valid {kind} config"):
        return config_class.from_dict(values), quantization
