"""GPTQModel 7.7: Marlin and its Triton kernel, both on our own GPTQ tensors.

Marlin is compiled with nvcc at first use, from sources in its package. That takes minutes, so
`bench.gpu.parcel` compiles it beforehand, by `build`. GPTQModel's Machete takes no part, because it
fetches CUTLASS from the network. Codes and scales are ours, so the products are held to our
reference as closely as our kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.benchmark.race import Layer

from . import Peer, same_weight

#: file of the compiled Marlin in the folder $QKERNELS_PREBUILT
LIBRARY = "marlin_bf16.so"


def _regular_expressions() -> None:
    """Put Python's `re` in the place of the package pypcre.

    GPTQModel imports pypcre, which is distributed as sources and needs those of libpcre2. It uses
    only functions that `re` has.
    """
    if importlib.util.find_spec("pcre") is None:
        stand_in = types.ModuleType("pcre")
        vars(stand_in).update(
            {name: getattr(re, name) for name in ("compile", "escape", "split", "Pattern")}
        )
        flags = {"MULTILINE": re.MULTILINE, "CASELESS": re.IGNORECASE, "DOTALL": re.DOTALL}
        stand_in.Flag = types.SimpleNamespace(**flags)  # type: ignore[attr-defined]
        stand_in.__spec__ = importlib.util.spec_from_loader("pcre", None)
        sys.modules["pcre"] = stand_in


def build() -> bool:
    """Load Marlin for bfloat16 from $QKERNELS_PREBUILT; compile it now if it is not there.

    Raises:
        RuntimeError: this fails, with GPTQModel's message.
    """
    _regular_expressions()
    from gptqmodel.utils import marlin

    library = Path(os.environ.get("QKERNELS_PREBUILT", "")) / LIBRARY
    if library.is_file():
        os.environ["QKERNELS_MARLIN"] = str(library)
        marlin._MARLIN_BF16_TORCH_OPS_EXTENSION.prebuilt_library_env = "QKERNELS_MARLIN"
    if not marlin.marlin_runtime_available(torch.bfloat16):
        raise RuntimeError(marlin.marlin_runtime_error(torch.bfloat16))
    return True


class GPTQModel(Peer):
    """One kernel of GPTQModel.

    kernel: module under gptqmodel.nn_modules.qlinear. cls: class in it. zeros: checkpoint_format
    ("gptq" or "gptq_v2") that says how the kernel wants zero points stored.
    """

    module = "gptqmodel"

    def __init__(self, kernel: str, cls: str, bits: int, zeros: str) -> None:
        self.kernel, self.cls, self.bits, self.zeros = kernel, cls, bits, zeros
        self.name = f"gptqmodel {kernel}"
        self.group = f"int{bits} g128"

    def prepare(self, weight: Tensor) -> Layer:
        if self.kernel == "marlin":
            build()
        _regular_expressions()
        module = importlib.import_module(f"gptqmodel.nn_modules.qlinear.{self.kernel}")
        n, k = weight.shape
        p = qk.quantize(
            weight, "gptq", bits=self.bits, group_size=128, checkpoint_format=self.zeros
        )
        linear = getattr(module, self.cls)(
            bits=self.bits, group_size=128, desc_act=False, sym=True, in_features=k,
            out_features=n, bias=False, dtype=torch.bfloat16, register_buffers=True,
        )  # fmt: skip
        tensors = dict(p.tensors)
        tensors.setdefault("g_idx", torch.arange(k, dtype=torch.int32, device=weight.device) // 128)
        for name, tensor in tensors.items():
            self._put(linear, name, tensor)
        linear = linear.to(weight.device).eval()
        linear.post_init()
        return same_weight(linear, p)

    def _put(self, linear: nn.Module, name: str, tensor: Tensor) -> None:
        """Copy a tensor into a buffer of the layer.

        Raises:
            ValueError: the layer has no such buffer, or one of another shape: GPTQModel's layout
                has changed.
        """
        buffer = getattr(linear, name, None)
        if buffer is None or tuple(buffer.shape) != tuple(tensor.shape):
            got = "none" if buffer is None else f"{tuple(buffer.shape)}"
            raise ValueError(
                f"{self.cls}.{name}: expected a tensor of shape {tuple(tensor.shape)}, got {got}"
            )
        dtype = torch.bfloat16 if name == "scales" else tensor.dtype
        buffer.data = tensor.to(dtype)


CONTESTANTS = [
    GPTQModel("marlin", "MarlinLinear", 4, "gptq"),
    GPTQModel("marlin", "MarlinLinear", 8, "gptq"),
    GPTQModel("tritonv2", "TritonV2Linear", 4, "gptq_v2"),
]
