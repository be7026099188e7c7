"""LoRA adapters of PEFT on QuantLinear: QLoRA, with a base in any format. Nothing is patched.

    from peft import LoraConfig, get_peft_model
    from qkernels.integrations.peft import with_quant_linear

    config = with_quant_linear(LoraConfig(r=16, target_modules="all-linear"), model)
    model = get_peft_model(model, config)

An adapter's saved config does not remember this: load one with `PeftModel.from_pretrained(model,
path, config=with_quant_linear(LoraConfig.from_pretrained(path), model))`.

Merging (`merge_adapter`, `merge_and_unload`) makes each layer an nn.Linear, or GPT-2's Conv1D, in
the dtype of the model: an adapter added to packed codes would be rounded away, and what is merged
should be an ordinary layer, to be saved, trained or quantized again like any. Unmerging gives the
packed weight back as it was.
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

#: `init_lora_weights` that neither read nor change the base's weight. EVA's reads inputs, when it
#: is asked to.
_INITS = (True, False, "gaussian", "eva")
#: what PEFT adds to `modules_to_save` for a task, and quantizing does not know to leave alone
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def with_quant_linear(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """`config`, made to put adapters on QuantLinear layers, too; the same object.

    Give the `model` that gets the adapters, if there is one already: then "all-linear", which means
    nn.Linear to PEFT, takes in its QuantLinear layers, `modules_to_save` is checked, and merged
    layers become nn.Linear in the dtype of the model, which loses its marks of a quantized one when
    none is left. Layers that were not told their model merge into a QuantLinear of format fp16,
    which takes inputs of any dtype.

    Raises ValueError if `modules_to_save` names packed layers, whose weights would not be trained,
    or for "all-linear" without `model` or with `layer_replication`, which is about to change it.
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
    """The model that layers belong to, which they do not keep alive. A copy of it has copies that
    know it.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._of = None if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        return None if self._of is None else self._of()

    @cached_property
    def transposed(self) -> set[str]:
        """Names of the layers that the model's class makes as transformers' Conv1D."""
        model = self()
        return set() if model is None else transposed_layers(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Model:
        return _Model(memo.get(id(self()), self()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Model, (None,)  # a file that holds a config, or a layer, is not to hold the model


def _all_linear(model: nn.Module) -> Iterator[str]:
    """Names of what PEFT's "all-linear" would be if each QuantLinear were an nn.Linear."""
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
    """ValueError if PEFT would train and save a copy of something that is packed."""
    heads = _HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    targets = (*(config.modules_to_save or ()), *heads)
    for name, module in model.named_modules():
        if not targets or not name.endswith(targets):  # PEFT's own rule
            continue
        for inner, part in module.named_modules():
            if isinstance(part, (Holder, QuantExperts)):
                whole = f"{name}.{inner}".rstrip(".")
                raise ValueError(
                    f"modules_to_save: expected plain modules, got {whole}, whose weight is packed "
                    "and is not trained"
                )


class LoraQuantLinear(Linear):
    """y = QuantLinear(x) + sum over active adapters of scaling * B(A(dropout(x))); the base stays
    packed.

    Adapters compute in their own dtype, float32 unless the model says otherwise, and the sum is in
    the base's, the input's: PEFT's own `Linear` is at work, which differs in what it merges into.
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
        """ValueError for a variant of LoRA that is not done here; see `update_layer`."""
        if parameter_name is not None:
            raise ValueError(
                "target_parameters: expected no parameter of a QuantLinear, got "
                f"{kwargs.get('target_name')}"
            )
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False  # packed weights are (N, K), GPT-2's, too
        self._active_adapter = adapter_name
        self._name = kwargs.get("target_name") or "QuantLinear"
        self._model = model or _Model(None)
        self._packed_base: list[
            QuantLinear
        ] = []  # of a merged layer; a list, so that it is no submodule
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, (QuantLinear, nn.Linear))
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype | None]:
        """Where PEFT puts adapters, and as what: the dtype of the codes is none for them."""
        packed = self._packed_base[0] if self._packed_base else base_layer
        assert isinstance(packed, QuantLinear)
        return packed.packed.device, self._dtype()

    def _dtype(self) -> torch.dtype | None:
        """The model's dtype: that of its first parameter that is no adapter's. None if the model is
        not known.
        """
        model = self._model()
        parameters = () if model is None else model.named_parameters()
        return next(
            (p.dtype for n, p in parameters if p.is_floating_point() and "lora_" not in n), None
        )

    # ------------------------------------------------------------------ adapters
    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone, so that PEFT refuses a variant of which `update_layer` knows nothing
        yet.
        """
        return {(): None}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter, on the packed weight's device.

        ValueError for a variant of LoRA, or an initialization that reads the base's weight: plain
        LoRA would take its place.
        """
        # PEFT marks its variants, but this one, which it does only on layers of GPTQModel.
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

        Adapters that come later are added to the packed weight together with those before, so the
        order and the number of calls do not matter. Sums are always checked, whatever `safe_merge`
        says: ValueError if one is not finite in that dtype. As in PEFT, RuntimeError for
        `lora_bias` on a base that has no bias.
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
            merged = _plain(weight, bias, transposed=self._name in self._model.transposed)
        if not self._packed_base:
            self._packed_base.append(packed)
        self.base_layer = merged.requires_grad_(False).train(packed.training)
        self.merged_adapters = names

    def _finite(self, what: str, tensor: Tensor, dtype: torch.dtype, names: list[str]) -> Tensor:
        cast = tensor.to(dtype)
        if not torch.isfinite(cast).all():
            largest = tensor.abs().max().item()
            raise ValueError(
                f"{self._name}: expected a {what} that is finite in {dtype} after merging "
                f"{', '.join(names)}, got a largest value of {largest:g}"
            )
        return cast

    def unmerge(self) -> None:
        """The packed weight as it was, all adapters beside it again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer = self._packed_base.pop()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in this layer's place. A model without another packed one is no longer
        quantized.
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


def _plain(weight: Tensor, bias: Tensor | None, transposed: bool) -> nn.Module:
    rows, columns = weight.shape
    layer: nn.Module
    if transposed:
        layer, weight = Conv1D(rows, columns), weight.T.contiguous()
    else:
        layer = nn.Linear(columns, rows, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().to(weight.dtype))
    return layer
