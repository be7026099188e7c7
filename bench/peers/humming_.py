"""Humming (vllm-project/humming), which compiles kernels for each layer's shape and dtype by NVRTC.

Kernels that `bench.gpu.parcel` compiled beforehand come from $QKERNELS_PREBUILT.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkernels.benchmark.race import Layer

from . import EIGHT_BIT, FOUR_BIT, Peer, layer


def keep_kernels(store: Path) -> None:
    """Make Humming look a kernel up in `store` by its source, and put the ones it compiles there.

    The keys of Humming's own cache depend on times and paths of files, which differ between
    machines.
    """
    from humming.jit.runtime import KernelRuntime

    compiler = KernelRuntime._get_compiler()
    if "keeping" in vars(compiler):
        return
    compile_new = compiler.compile.__func__

    def compile(
        cls: Any,
        code: str,
        sm_version: Any,
        kernel_expr: str,
        disable_fast_math: bool = False,
        postprocess_cubin: Any = None,
    ) -> str:
        source = (code, sm_version, kernel_expr, disable_fast_math, postprocess_cubin is not None)
        file = store / f"{hashlib.sha256(repr(source).encode()).hexdigest()[:24]}.cubin"
        if not file.is_file():
            compiled = compile_new(
                cls, code, sm_version, kernel_expr, disable_fast_math, postprocess_cubin
            )
            part = file.with_suffix(f".{os.getpid()}")
            store.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(compiled, part)
            part.replace(file)
        return str(file)

    compiler.compile, compiler.keeping = classmethod(compile), True


class Humming(Peer):
    """weights, inputs: Humming's configurations. bits: of a weight with its scales."""

    name, module = "humming", "humming"

    def __init__(
        self,
        group: str,
        weights: dict[str, Any],
        inputs: dict[str, Any] | None,
        bits: float,
        kind: str = "bf16",
    ) -> None:
        self.group, self.weights, self.inputs, self.bits, self.kind = (
            group,
            weights,
            inputs,
            bits,
            kind,
        )

    def prepare(self, weight: Tensor) -> Layer:
        from humming.layer import HummingLayer

        if prebuilt := os.environ.get("QKERNELS_PREBUILT"):
            keep_kernels(Path(prebuilt) / "humming")
        n, k = weight.shape
        linear = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config=dict(self.weights),
            input_config=None if self.inputs is None else dict(self.inputs),
            torch_dtype=torch.bfloat16,
        ).to(weight.device)
        linear.load_from_unquantized(weight.bfloat16())
        linear.transform()
        tolerance = FOUR_BIT if self.bits < 8 else EIGHT_BIT
        return layer(linear, int(n * k * self.bits / 8), weight, tolerance, self.kind)


CONTESTANTS = [
    Humming("int4 g128", {"dtype": "int4", "group_size": 128}, None, 4.125),
    Humming("int8 g128", {"dtype": "int8", "group_size": 128}, None, 8.125),
    Humming("fp8", {"dtype": "float8e4m3"}, None, 8.0),
    Humming("w8a8", {"dtype": "int8"}, {"dtype": "int8"}, 8.0, "int8"),
]
