"""qkernels as a quantization backend of transformers. Importing it registers it, without patches.

    from qkernels.integrations.transformers import QKernelsConfig, checkpoint_config

    # quantize a 16-bit model while it is loaded
    config = QKernelsConfig("nf4", block_size=64)
    AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    # run a quantized checkpoint (GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8) in our layers
    AutoModelForCausalLM.from_pretrained(path, config=checkpoint_config(path))
    # a directory in formats that only we read (GGUF's types, SpQR, QuIP): the import is enough
    AutoModelForCausalLM.from_pretrained(path)

`save_pretrained` writes the format's own tensors and `quantization_config`, as
`qkernels.save_model` does, so every reader of such checkpoints reads the result. A quantized
checkpoint needs `config=`, because transformers does not let `quantization_config=` change the
method that the checkpoint's config names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import formats
from ..checkpoints.hf import expert_layers, layers, quantization
from ..checkpoints.hf.model_config import NOTE, WEIGHTS
from ..checkpoints.hf.plain_weights import load_dequantized, warn_dequantized
from ..checkpoints.hf.quantization import Plan
from ..checkpoints.hf.save_pretrained import Saver
from ..checkpoints.hf.tying import put_in_place
from ..checkpoints.tensor_files import TensorFiles
from ..models.candidates import linears
from ..nn.base import Holder
from ..nn.linear import QuantLinear, linear_of
from ..nn.stand_in import StandIn

METHOD = quantization.OWN_METHOD


@register_quantization_config(METHOD)
class QKernelsConfig(QuantizationConfigMixin):
    """The value of `from_pretrained(quantization_config=...)`.

    format, params: as in `qkernels.quantize_model`; weights are rounded to nearest.
    skip: fnmatch patterns of modules to leave unquantized; the output projection always is.
    checkpoint: instead of a format, the `quantization_config` of a checkpoint that is already
    quantized.
    """

    def __init__(
        self,
        format: str | None = None,
        skip: list[str] | None = None,
        checkpoint: dict[str, Any] | None = None,
        **params: Any,
    ) -> None:
        """ValueError unless `format` is known and takes `params`, or only `checkpoint` is given."""
        params.pop("quant_method", None)
        # from config.json of a directory in formats that only we read
        if "groups" in params and format is None and checkpoint is None:
            checkpoint = {"quant_method": METHOD, "groups": params.pop("groups")}
        if (format is None) == (checkpoint is None):
            raise ValueError(
                f"format: expected one of {', '.join(formats.names())}; got {format!r}"
            )
        self.quant_method = METHOD
        self.format, self.skip, self.checkpoint, self.params = format, skip, checkpoint, params
        if format is not None:
            defaults = formats.get(format).defaults
            for name in params:
                if name not in defaults:
                    raise ValueError(
                        f"{format}: unknown parameter {name!r}; expected one of: "
                        f"{', '.join(defaults) or 'none'}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary.

        A saved model has a different one, that of its format's ecosystem: see Saver.
        """
        fields = {
            "format": self.format,
            "skip": self.skip,
            "checkpoint": self.checkpoint,
            **self.params,
        }
        return {
            "quant_method": METHOD,
            **{key: value for key, value in fields.items() if value is not None},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"


def checkpoint_config(path: str | os.PathLike[str], **options: Any) -> Any:
    """The config of a quantized checkpoint, changed so that its layers load as QuantLinear.

    Give it to `from_pretrained(path, config=...)`; `options` go to `AutoConfig.from_pretrained`.
    Raises ValueError if the checkpoint is not quantized.
    """
    config = AutoConfig.from_pretrained(path, **options)
    stored_config = getattr(config, "quantization_config", None)
    if stored_config is None:
        raise ValueError(
            f"{path}: expected a quantized checkpoint, got a config without quantization_config"
        )
    stored_config = stored_config if isinstance(stored_config, dict) else stored_config.to_dict()
    Plan(os.fspath(path), stored_config)
    config.quantization_config = QKernelsConfig(checkpoint=stored_config).to_dict()
    return config


class _Placeholder(nn.Module):
    """Takes the place of a QuantLinear until loading is complete.

    Packed tensors are non-persistent buffers, and transformers creates such buffers again after
    loading.
    """

    def __init__(self, weight: StandIn | None = None, bias: nn.Parameter | None = None) -> None:
        """weight: for models that initialize the weights of their layers by name."""
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self._is_hf_initialized = True


class _Quantize(ConversionOps):
    """Replaces a linear layer by a QuantLinear when its weight arrives; one object per weight."""

    def __init__(self, quantizer: QKernelsQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: nn.Module | None = None,
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        assert model is not None
        for name, value in input_dict.items():
            prefix = name.rpartition(".")[0]
            self.quantizer.replace(model, prefix, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


@register_quantizer(METHOD)
class QKernelsQuantizer(Saver):
    """Puts QuantLinear layers into a model while transformers loads it."""

    quantization_config: QKernelsConfig

    def __init__(self, quantization_config: QKernelsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.to_quantize: set[str] = set()
        self.params: dict[str, Any] = {}
        self.layers: dict[str, nn.Module] = {}
        #: module name -> its name in the files
        self.stored: dict[str, str] = {}
        #: dequantized weights of modules that none of our layers can replace
        self.matrices: dict[str, nn.Parameter] = {}
        self.device = torch.device("cpu")

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        several_devices = isinstance(device_map, dict) and len(set(device_map.values())) > 1
        if several_devices or (isinstance(device_map, str) and torch.cuda.device_count() > 1):
            raise ValueError(
                f"device_map: expected one device for the whole model, got {device_map!r}"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Replace "auto" and similar names by the GPU if there is one, else by the CPU."""
        if not isinstance(device_map, str):
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove our NOTE from the config before transformers looks for the file that it names.

        The NOTE keeps programs without this integration from loading our directories.
        """
        if getattr(config, WEIGHTS, None) == NOTE:
            delattr(config, WEIGHTS)
        return config

    # ------------------------------------------------------------------ before the tensors arrive
    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: Any = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        if isinstance(device_map, dict):
            device_map = next(iter(device_map.values()), None)
        self.device = torch.device("cpu" if device_map is None else device_map)
        if self.quantization_config.checkpoint is not None:
            self._read(model, checkpoint_files)
            return model
        assert self.quantization_config.format is not None
        fmt = formats.get(self.quantization_config.format)
        places = linears(model, self.quantization_config.skip)
        shapes = {names[0]: (linear.out_features, linear.in_features) for names, linear in places}
        self.params = fmt.complete(shapes, self.quantization_config.params)
        for names, _ in places:
            try:
                fmt.resolve(shapes[names[0]], self.params)
            except ValueError as error:
                raise ValueError(f"{names[0]}: {error}") from None
            self.to_quantize |= set(names)
        return model

    def _read(self, model: PreTrainedModel, checkpoint_files: list[str] | None) -> None:
        """Read the packed layers of the checkpoint, and make transformers ignore their tensors."""
        plan = Plan(str(model.config.name_or_path), self.quantization_config.checkpoint)
        if not checkpoint_files or not all(
            str(file).endswith(".safetensors") for file in checkpoint_files
        ):
            raise ValueError(
                f"checkpoint: expected safetensors files, got {checkpoint_files!r:.200}"
            )
        where = Path(checkpoint_files[0]).parent
        with TensorFiles([Path(file) for file in checkpoint_files]) as files:
            inventory = layers.Inventory(model, files)
            for prefix, tensor_names in inventory.layers.items():
                module = model.get_submodule(prefix)
                scheme = layers.scheme_of(tensor_names, files, plan, quantization.kinds_of(module))
                if scheme is None:
                    continue
                self.stored[prefix] = layers.stored_module(tensor_names)
                if inventory.names.needs_plain_weight(prefix):  # e.g. a router
                    load_dequantized(
                        module, prefix, tensor_names, files, scheme, self.device, model.dtype
                    )
                    self.matrices[prefix] = module.weight  # type: ignore[assignment]
                else:
                    self.layers[prefix] = layers.quantized_layer(
                        where, model, prefix, tensor_names, files, scheme, self.device
                    )
            warn_dequantized(list(self.matrices))
            context = expert_layers.LoadContext(where, files, plan, self.device, None, None)
            for prefix, weights in inventory.experts.items():
                expert_names = inventory.names.experts[prefix]
                stack = expert_layers.packed_experts(
                    model.get_submodule(prefix), expert_names, weights, context
                )
                if stack is not None:
                    # saving needs the names of the projections of experts
                    stack.leaves = expert_names.leaves
                    self.layers[prefix], self.stored[prefix] = stack, expert_names.stored
            unknown = [name for name in files.infos if not inventory.takes(name)]
            if unknown and not self.layers:
                raise ValueError(
                    f"{where}: expected tensors of {type(model).__name__}'s layers, got "
                    f"only others: {', '.join(unknown[:3])}, ..."
                )
            self._tie(model, {inventory.names.from_stored(name) for name in files.infos})
        for prefix, layer in self.layers.items():
            model.set_submodule(
                prefix, _Placeholder(layer.weight if isinstance(layer, Holder) else None)
            )
        prefixes = {*self.stored, *self.stored.values()}
        packed = rf"^(?:{'|'.join(map(re.escape, sorted(prefixes)))})\."
        for field in ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing"):
            setattr(model, field, {*(getattr(model, field) or ()), packed})

    def _tie(self, model: PreTrainedModel, present: set[str]) -> None:
        """Keep transformers from tying packed weights, and tie them here.

        present: names of the tensors in the files. A weight that the files lack shares its packed
        source.
        """
        tied = getattr(model, "all_tied_weights_keys", {})
        for target, source in list(tied.items()):
            target_layer, source_layer = (name.rpartition(".")[0] for name in (target, source))
            if target_layer not in self.layers and source_layer not in self.layers:
                continue
            del tied[target]
            layer = self.layers.get(source_layer)
            if (
                target_layer not in self.layers
                and target not in present
                and isinstance(layer, Holder)
            ):
                put_in_place(model, target_layer, layer)
                self.layers[target_layer] = model.get_submodule(target_layer)
                self.stored[target_layer] = target_layer

    # ------------------------------------------------------------------ while the tensors arrive
    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        prefix, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and prefix in self.to_quantize

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self)

    def replace(self, model: nn.Module, name: str, weight: Tensor) -> None:
        """Quantize `weight` of the linear layer called `name`."""
        module = model.get_submodule(name)
        config = self.quantization_config
        assert config.format is not None
        module.weight = nn.Parameter(weight, requires_grad=False)
        bias, module.bias = module.bias, None  # type: ignore[assignment]
        try:
            layer = QuantLinear.from_linear(linear_of(module), config.format, **self.params)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.layers[name] = layer
        # the bias may already be loaded, or arrive later
        model.set_submodule(name, _Placeholder(layer.weight, bias))  # type: ignore[arg-type]

    # ------------------------------------------------------------------ after loading
    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for prefix, layer in self.layers.items():
            placeholder = model.get_submodule(prefix)
            if isinstance(layer, QuantLinear) and layer.bias is None:
                layer.register_parameter("bias", placeholder.bias)
            model.set_submodule(prefix, layer)
        for prefix, weight in self.matrices.items():
            model.get_submodule(prefix).weight = weight
        self.layers, self.stored, self.matrices = {}, {}, {}
        model.requires_grad_(False)
        return model
