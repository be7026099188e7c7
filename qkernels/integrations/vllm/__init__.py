"""vLLM serves our formats: an out-of-tree quantization method called "qkernels".

    vllm serve DIR                              a directory of `qk.save_model` that names our own method
    vllm serve DIR --quantization qkernels      anybody's GPTQ, AWQ, bitsandbytes, compressed-tensors or FP8

The package's entry point `vllm.general_plugins` calls `register`; nothing here is imported without
vLLM.

    checkpoint.py   what a checkpoint's config and file headers say of each module   (no vLLM)
    loading.py      a checkpoint's weights -> the packed parts that one process holds (no vLLM)
    experts.py      the experts of a layer that one process holds, and their product  (no vLLM)
    config.py       vLLM's interface: QuantizationConfig and the methods of linears and embeddings
    moe.py          vLLM's interface: the method of mixtures of experts
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM of the method. Called by vLLM in each of its processes; calling it again is
    harmless.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .checkpoint import NAME
    from .config import QKernelsConfig

    register_quantization_config(NAME)(QKernelsConfig)
