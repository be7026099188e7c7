"""vLLM serves our formats: an out-of-tree quantization method called "qkernels".

    vllm serve DIR                          a directory of `qk.save_model` that names our method
    vllm serve DIR --quantization qkernels  any GPTQ, AWQ, bitsandbytes, compressed-tensors or FP8

The package's entry point `vllm.general_plugins` calls `register`. This package imports nothing that
needs vLLM before that.

    checkpoint.py   what a checkpoint's config and file headers say of each module    (no vLLM)
    loading.py      a checkpoint's weights -> the packed parts that one process holds (no vLLM)
    experts.py      the experts of a layer that one process holds, and their product  (no vLLM)
    config.py       vLLM's interface: QuantizationConfig, methods of linear layers and embeddings
    moe.py          vLLM's interface: the method of expert layers
"""

from __future__ import annotations


def register() -> None:
    """Register the method. vLLM calls this in each of its processes, maybe more than once."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .checkpoint import NAME
    from .config import QKernelsConfig

    register_quantization_config(NAME)(QKernelsConfig)
