"""LoRA adapters of PEFT on QuantLinear: QLoRA, with a base in any format. Nothing is patched.

    from peft import LoraConfig, get_peft_model
    from qkernels.integrations.peft import with_quant_linear

    config = with_quant_linear(LoraConfig(r=16, target_modules="all-linear"), model)
    model = get_peft_model(model, config)

An adapter's saved config does not remember this: load one with
`PeftModel.from_pretrained(model, path, config=with_quant_linear(LoraConfig.from_pretrained(path)))`.
Merging (`merge_and_unload`) makes the layer a 16-bit one, format fp16: an adapter added to packed codes would
be rounded away. Unmerging gives the packed weight back as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..linear import QuantLinear
from ..packed import quantize


def with_quant_linear(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """`config`, made to put adapters on QuantLinear layers, too; the same object.

    PEFT's "all-linear" means nn.Linear only. With `model` it becomes the names of its QuantLinear layers.
    """
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    if model is not None and config.target_modules == "all-linear":
        config.target_modules = [n for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    return config


class LoraQuantLinear(nn.Module, LoraLayer):
    """y = QuantLinear(x) + sum over active adapters of scaling * B(A(dropout(x))); the base stays packed.

    Adapters compute in their own dtype, float32 unless the model says otherwise, and the sum is in the
    base's, the input's.
    """

    def __init__(
        self,
        base_layer: QuantLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self._packed_base: list[QuantLinear] = []  # of a merged layer; a list, so that it is no submodule
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, QuantLinear)
        return module.in_features, module.out_features

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter, on the packed weight's device. ValueError for a variant of LoRA not done here."""
        for field in ("use_dora", "alora_invocation_tokens", "arrow_config", "velora_config"):
            if getattr(config, field, None):
                raise ValueError(f"{field}: expected none with QuantLinear, got {getattr(config, field)!r}")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        device = self.get_base_layer().packed.device
        for modules in (self.lora_A, self.lora_B):
            modules[adapter_name].to(device)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * B @ A, (N, K) float32."""
        a, b = self.lora_A[adapter].weight.float(), self.lora_B[adapter].weight.float()
        return (b @ a) * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight, which becomes float16. ValueError if a sum is no finite float16."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        with torch.no_grad():
            dense = base.packed.dequantize() + sum(self.get_delta_weight(name) for name in names)
        if not self._packed_base:
            self._packed_base.append(base)
        self.base_layer = QuantLinear(quantize(dense, "fp16"), base.bias, base.backend, base.batch_invariant)
        self.base_layer.requires_grad_(False)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """The packed weight as it was, all adapters beside it again."""
        if self._packed_base:
            self.base_layer = self._packed_base.pop()
        self.merged_adapters.clear()

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            a, b = self.lora_A[name], self.lora_B[name]
            inner = x if torch.is_autocast_enabled(x.device.type) else x.to(a.weight.dtype)
            y = y + (b(a(self.lora_dropout[name](inner))) * self.scaling[name]).to(y.dtype)
        return y

    def __repr__(self) -> str:
        return "lora." + super().__repr__()
