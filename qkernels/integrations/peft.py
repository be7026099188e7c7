"""LoRA adapters of PEFT on QuantLinear: QLoRA, with a base in any format, without patches.

    from peft import LoraConfig, get_peft_model
    from qkernels.integrations.peft import with_quant_linear

    config = with_quant_linear(LoraConfig(r=16, target_modules="all-linear"), model)
    model = get_peft_model(model, config)

An adapter's saved config does not remember this. Load an adapter with

    config = with_quant_linear(LoraConfig.from_pretrained(path), model)
    model = PeftModel.from_pretrained(model, path, config=config)

Merging (`merge_adapter`, `merge_and_unload`) turns each layer into an nn.Linear, or into GPT-2's
Conv1D, in the dtype of the model. An adapter added to packed codes would be rounded away, and a
merged layer should be an ordinary one that can be saved, trained or quantized again. Unmerging
restores the packed weight unchanged.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property, partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoints.hf.model_config import transposed_layers
from ..nn.base import Holder
from ..nn.embedding import output_embeddings
from ..nn.experts import QuantExperts
from ..nn.linear import QuantLinear, is_linear
from ..weights.packed import pack

#: values of `init_lora_weights` that neither read nor change the weight of the base; EVA reads
#: inputs, when asked to
_INITS = (True, False, "gaussian", "eva")
#: layers that PEFT adds to `modules_to_save` for a task, and that quantizing does not know to skip
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def with_quant_linear(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """`config`, changed so that it also puts adapters on QuantLinear layers; the same object.

    Give the `model` that gets the adapters, if it exists already. Then "all-linear", which means
    nn.Linear to PEFT, includes its QuantLinear layers; `modules_to_save` is checked; and merged
    layers become nn.Linear in the dtype of the model. When no packed layer is left, the model is no
    longer marked as quantized. Without the model, layers merge into a QuantLinear of format fp16,
    which takes inputs of any dtype.

    Raises ValueError if `modules_to_save` names packed layers, whose weights would not be trained,
    or for "all-linear" without `model` or with `layer_replication`, which changes the model later.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    layer: Any = partial(LoraQuantLinear, model=_Model(model))
    config._register_custom_module({QuantLinear: layer})
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        if model is None:
            raise ValueError(
                "target_modules: expected names of layers, or a model, got 'all-linear' and none"
            )
        if config.layer_replication:
            raise ValueError(
                "target_modules: expected names of layers with layer_replication, got 'all-linear'"
            )
        config.target_modules = list(_all_linear(model))
    if model is not None:
        _check_saved_modules(config, model)
    return config


class _Model:
    """The model that layers belong to, without keeping it alive.

    If the model is copied, its copied layers refer to the copy.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._reference = None if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        return None if self._reference is None else self._reference()

    @cached_property
    def transposed(self) -> set[str]:
        """Names of the layers that the model's class creates as transformers' Conv1D."""
        model = self()
        return set() if model is None else transposed_layers(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Model:
        return _Model(memo.get(id(self()), self()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Model, (None,)  # a pickled config or layer must not contain the model


def _all_linear(model: nn.Module) -> Iterator[str]:
    """Names of the layers of PEFT's "all-linear", with each QuantLinear counted as an nn.Linear."""
    output = output_embeddings(model)
    inside: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(tuple(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
            module = module.get_base_layer()
        if module is not output and (isinstance(module, QuantLinear) or is_linear(module)):
            yield name


def _check_saved_modules(config: LoraConfig, model: nn.Module) -> None:
    """ValueError if PEFT would train and save a copy of a packed module."""
    heads = _HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    targets = (*(config.modules_to_save or ()), *heads)
    for name, module in model.named_modules():
        if not targets or not name.endswith(targets):  # the rule that PEFT uses
            continue
        for inner, part in module.named_modules():
            if isinstance(part, (Holder, QuantExperts)):
                whole = f"{name}.{inner}".rstrip(".")
                raise ValueError(
                    f"modules_to_save: expected plain modules, got {whole}, whose weight is packed "
                    "and is not trained"
                )


class LoraQuantLinear(Linear):
    """y = QuantLinear(x) + sum over active adapters of scaling * B(A(dropout(x))).

    The base stays packed. Adapters compute in their own dtype, float32 unless the model says
    otherwise; the sum has the dtype of the base's output, which is that of the input. PEFT's own
    `Linear` does the work; this class differs in what adapters merge into.
    """

    base_layer: nn.Module

    def __init__(
        self,
        base_layer: QuantLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        model: _Model | None = None,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """ValueError for an unsupported variant of LoRA; see `update_layer`."""
        if parameter_name is not None:
            raise ValueError(
                "target_parameters: expected no parameter of a QuantLinear, got "
                f"{kwargs.get('target_name')}"
            )
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False  # packed weights are (N, K), even GPT-2's
        self._active_adapter = adapter_name
        self._name = kwargs.get("target_name") or "QuantLinear"
        self._model = model or _Model(None)
        # the base of a merged layer; in a list, so that it is no submodule
        self._packed_base: list[QuantLinear] = []
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, (QuantLinear, nn.Linear))
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype | None]:
        """The device and dtype for new adapters: the dtype of the codes does not suit them."""
        packed = self._packed_base[0] if self._packed_base else base_layer
        assert isinstance(packed, QuantLinear)
        return packed.packed.device, self._dtype()

    def _dtype(self) -> torch.dtype | None:
        """The model's dtype: that of its first parameter outside adapters.

        None if the model is not known.
        """
        model = self._model()
        parameters = () if model is None else model.named_parameters()
        return next(
            (p.dtype for n, p in parameters if p.is_floating_point() and "lora_" not in n), None
        )

    # ------------------------------------------------------------------ adapters
    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Only plain LoRA, so that PEFT refuses variants that `update_layer` does not know yet."""
        return {(): None}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter, on the packed weight's device.

        Raises ValueError for a variant of LoRA, and for an initialization that reads the base's
        weight, because plain LoRA would silently replace them.
        """
        # PEFT marks all its variants except this one, which it supports only on layers of
        # GPTQModel.
        variants = [
            "use_qalora",
            *(f.name for f in fields(config) if f.metadata.get("is_lora_variant")),
        ]
        for name in variants:
            if getattr(config, name, None):
                raise ValueError(
                    f"{name}: expected none with QuantLinear, got {getattr(config, name)!r}"
                )
        init = config.init_lora_weights
        if (init.lower() if isinstance(init, str) else init) not in _INITS:
            raise ValueError(
                f"init_lora_weights: expected one of {_INITS} with QuantLinear, whose weight is "
                f"packed, got {init!r}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    # ------------------------------------------------------------------ merging
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the base an nn.Linear, with adapters added, in the dtype of the model.

        All merged adapters are always added to the packed weight together, so the order and the
        number of calls do not matter. The sums are always checked, whatever `safe_merge` says:
        ValueError if one is not finite in that dtype. As in PEFT, RuntimeError for `lora_bias` on a
        base without a bias.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        names = list(dict.fromkeys([*self.merged_adapters, *names]))
        packed = self._packed_base[0] if self._packed_base else self.get_base_layer()
        assert isinstance(packed, QuantLinear)
        biased = [name for name in names if self.lora_bias[name]]
        if biased and packed.bias is None:
            raise RuntimeError(
                "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
            )
        dtype = self._dtype()
        with torch.no_grad():
            weight = packed.packed.dequantize() + sum(
                self.get_delta_weight(name).float() for name in names
            )
            weight = self._finite("weight", weight, dtype or torch.float16, names)
            bias = packed.bias
            if biased:
                assert bias is not None
                deltas = sum(self.lora_B[n].bias.float() * self.scaling[n] for n in biased)
                bias = self._finite("bias", bias.float() + deltas, dtype or bias.dtype, names)
        if dtype is None:
            dense = pack("fp16", {"weight": weight}, tuple(weight.shape))
            merged: nn.Module = QuantLinear(dense, bias, packed.backend, packed.batch_invariant)
        else:
            merged = _linear_layer(weight, bias, transposed=self._name in self._model.transposed)
        if not self._packed_base:
            self._packed_base.append(packed)
        self.base_layer = merged.requires_grad_(False).train(packed.training)
        self.merged_adapters = names

    def _finite(self, what: str, tensor: Tensor, dtype: torch.dtype, names: list[str]) -> Tensor:
        """`tensor` in `dtype`. ValueError if a value is not finite there."""
        cast = tensor.to(dtype)
        if not torch.isfinite(cast).all():
            largest = tensor.abs().max().item()
            raise ValueError(
                f"{self._name}: expected a {what} that is finite in {dtype} after merging "
                f"{', '.join(names)}, got a largest value of {largest:g}"
            )
        return cast

    def unmerge(self) -> None:
        """Restore the packed weight, with all adapters beside it again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer = self._packed_base.pop()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer that PEFT puts in this layer's place.

        A model without another packed layer is no longer marked as quantized.
        """
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        model = self._model()
        if model is not None and not any(
            isinstance(m, (Holder, QuantExperts)) for m in model.modules()
        ):
            for module in model.modules():
                if getattr(module, "hf_quantizer", None) is not None:
                    module.hf_quantizer.remove_quantization_config(module)
        return self.get_base_layer()


def _linear_layer(weight: Tensor, bias: Tensor | None, transposed: bool) -> nn.Module:
    """An nn.Linear, or a Conv1D if `transposed`, with these values."""
    rows, columns = weight.shape
    layer: nn.Module
    if transposed:
        layer, weight = Conv1D(rows, columns), weight.T.contiguous()
    else:
        layer = nn.Linear(columns, rows, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().to(weight.dtype))
    return layer
