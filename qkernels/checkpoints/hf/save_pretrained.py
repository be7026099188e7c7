"""What makes `model.save_pretrained` of a model with packed layers write what `qkernels.save_model`
writes.

transformers asks a model's `hf_quantizer`, if it has one, what to write. Models that are quantized
or loaded here get one that answers from the layers as they are then.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import quantization, writer
from .names import Names


class Saver(HfQuantizer):
    """An `hf_quantizer` that knows how to save."""

    requires_calibration = False

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """All tensors under the files' names; sets the model's `quantization_config`, or removes it
        if all is plain.

        ValueError for formats that only our own config describes: `save_model` adds a NOTE to
        config.json, without which transformers would load them as random weights, and transformers'
        `save_pretrained` drops it.
        """
        if getattr(model, "_hf_peft_config_loaded", False):  # then adapters alone are saved
            return None, {}
        writer.check_kinds(model)
        names = Names(model)
        config, packed = writer.quantization_config(model, names)
        if config is None:
            self.remove_quantization_config(model)
        elif config["quant_method"] == quantization.OWN:
            kinds = sorted({group["format"] for group in config["groups"]})
            raise ValueError(
                f"save_pretrained: expected formats that have a quantization_config others know, got {', '.join(kinds)}; "
                "qkernels.save_model(model, path) saves them"
            )
        else:
            model.config.quantization_config = config
        return dict(writer.stored_tensors(model, names, packed, None)), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top are; packed weights are not."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def mark(model: nn.Module) -> None:
    """Give `model`, and transformers' models in it, a Saver if they have no quantizer."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "hf_quantizer", None) is None:
            module.hf_quantizer = Saver(QuantizationConfigMixin(quant_method=quantization.OWN))
