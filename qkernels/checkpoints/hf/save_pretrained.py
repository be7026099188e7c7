"""Makes `model.save_pretrained` write the same files as `qkernels.save_model`.

transformers asks a model's `hf_quantizer`, if it has one, what to write. Models that are quantized
or loaded here get a quantizer that answers from the layers as they are at that time.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import quantization, writer
from .names import Names


class Saver(HfQuantizer):
    """An `hf_quantizer` that can save, and does nothing else."""

    requires_calibration = False

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """All tensors under their stored names; also sets the model's `quantization_config`.

        If nothing is packed, it removes that config. Raises ValueError for formats that only our
        own config
        describes: `save_model` adds a NOTE to config.json, without which transformers would load
        such files as random weights, and transformers' `save_pretrained` drops that note.
        """
        if getattr(model, "_hf_peft_config_loaded", False):  # then PEFT saves its adapters only
            return None, {}
        writer.check_savable(model)
        names = Names(model)
        config, packed = writer.quantization_config(model, names)
        if config is None:
            self.remove_quantization_config(model)
        elif config["quant_method"] == quantization.OWN_METHOD:
            own_formats = sorted({group["format"] for group in config["groups"]})
            raise ValueError(
                "save_pretrained: expected formats that have a quantization_config others know, "
                f"got {', '.join(own_formats)}; qkernels.save_model(model, path) saves them"
            )
        else:
            model.config.quantization_config = config
        return dict(writer.stored_tensors(model, names, packed, None)), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters on top are trainable; packed weights are not."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach_saver(model: nn.Module) -> None:
    """Give `model`, and transformers models inside it, a Saver if they have no quantizer."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "hf_quantizer", None) is None:
            module.hf_quantizer = Saver(
                QuantizationConfigMixin(quant_method=quantization.OWN_METHOD)
            )
