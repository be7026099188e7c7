"""Compile the peers' kernels for the GPU machine, so that a race there starts at once.

    QKERNELS_PREBUILT=FOLDER python -m bench.gpu.prebuild marlin|humming|check

This needs the GPU machine's Python and torch, and nvcc. The peers' own code chooses and compiles
the kernels; it is made to see an H200, then an H100. Each kernel is stored in FOLDER, where the
adapters in bench/peers look for it. "check" raises RuntimeError if one is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ..peers import gptqmodel_, humming_

#: GPU -> bytes of L2 cache, kHz of the memory, bits of its bus: Humming's choices depend on them
CARDS = {
    "NVIDIA H200": (62_914_560, 3_201_000, 6144),
    "NVIDIA H100 80GB HBM3": (52_428_800, 2_619_000, 5120),
}
SM_COUNT, CLOCK_KHZ = 132, 1_980_000


@contextlib.contextmanager
def _hopper(name: str) -> Any:
    """Within the context, torch sees one GPU of compute capability 9.0; nothing can run on it."""
    properties = types.SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=SM_COUNT)
    replaced = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: name, "get_arch_list": lambda: ["sm_90"],
        "device": lambda *_, **__: contextlib.nullcontext(),
    }  # fmt: skip
    with mock.patch.multiple(torch.cuda, **replaced):
        yield


def marlin(folder: Path) -> None:
    """Compile GPTQModel's Marlin for bfloat16; this takes minutes."""
    target = folder / gptqmodel_.LIBRARY
    if target.is_file():
        return
    with tempfile.TemporaryDirectory() as scratch, _hopper("NVIDIA H200"):
        os.environ["GPTQMODEL_MARLIN_BF16_BUILD_ROOT"] = scratch
        gptqmodel_.build()
        (library,) = Path(scratch).rglob("*marlin*.so")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)


def check(folder: Path) -> None:
    """Load Marlin, import the other peers, and look up all of Humming's kernels.

    Raises:
        RuntimeError: a kernel is missing.
    """
    never = mock.patch(
        "torch.utils.cpp_extension._run_ninja_build", side_effect=RuntimeError("not prebuilt")
    )
    with _hopper("NVIDIA H200"), never:
        importlib.import_module("bitsandbytes")
        gptqmodel_.build()
        for contestant in gptqmodel_.CONTESTANTS:
            importlib.import_module(f"gptqmodel.nn_modules.qlinear.{contestant.kernel}")
    if compiled := humming(folder):
        raise RuntimeError(f"humming: expected every kernel in {folder}, had to compile {compiled}")


def humming(folder: Path, size: int = 8192) -> int:
    """Compile Humming's kernels for 4-bit groups of 128 and for int8 x int8, at size x size, all M.

    This takes minutes. Returns how many kernels were compiled.
    """
    raced = [one for one in humming_.CONTESTANTS if one.group in ("int4 g128", "w8a8")]
    return sum(_humming(folder, card, one, size) for card in CARDS for one in raced)


def _humming(folder: Path, card: str, contestant: humming_.Humming, size: int) -> int:
    """Compile the kernels of one contestant for one GPU. Returns how many were compiled."""
    import humming.utils.device

    store = folder / "humming"
    before = len(list(store.glob("*.cubin")))
    with _hopper(card):
        humming.utils.device._extension = types.SimpleNamespace(_DeviceInfo=_info(card))
        from humming import config, device, forward, kernel, layer, transform
        from humming.kernel.humming import HummingKernel
        from humming.kernel.process_input import ProcessInputKernel
        from humming.ops import input as inputs
        from humming.ops import utils

        class StopHereError(Exception):
            """The kernels are compiled; starting them needs a GPU."""

        def prepare(*args: Any, **kwargs: Any) -> None:
            prepared(*args, **kwargs)
            raise StopHereError

        prepared, numbers = inputs._prepare_process_input_op, itertools.count(1)
        zeros = torch.zeros
        nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
        classes = [
            one
            for one in vars(kernel).values()
            if isinstance(one, type) and one is not HummingKernel
        ]
        replaced: list[tuple[Any, str, Any]] = [
            (transform, "DeviceInfo", lambda *_: device.DeviceInfo(0)),
            (utils, "init_humming_launcher", nothing),
            (config.LayerConfig, "check_device", nothing),
            (HummingKernel, "register_kernel", lambda self: _number(self, next(numbers))),
            (ProcessInputKernel, "register_kernel", lambda self: _number(self, next(numbers))),
            *((one, "__call__", nothing) for one in classes),
            (kernel.UnpackWeightKernel, "__call__", lambda self, inputs, outputs: outputs.zero_()),
            (inputs, "_prepare_process_input_op", prepare),
            (forward, "_resolve_use_pdl", lambda *_: False),
            (torch.Tensor, "is_cuda", True),
            (torch.Tensor, "cuda", lambda self, *_, **__: self),
            (torch, "zeros", lambda *size, device=None, **kwargs: zeros(*size, **kwargs)),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, value in replaced:
                stack.enter_context(mock.patch.object(owner, name, value))
            humming_.keep_kernels(store)
            device.DeviceInfo._instances.clear()
            HummingKernel._instances.clear()
            HummingKernel._str2kernel_cache.clear()
            linear: Any = layer.HummingLayer(
                shape_n=size, shape_k=size, weight_config=dict(contestant.weights),
                input_config=None if contestant.inputs is None else dict(contestant.inputs),
                torch_dtype=torch.bfloat16,
            )  # fmt: skip
            linear.load_from_unquantized(torch.zeros(size, size, dtype=torch.bfloat16))
            linear.transform()
            HummingKernel.prepare_kernels(linear.humming_config.to_str(), None, None, 0)
            if contestant.inputs is not None:
                with contextlib.suppress(StopHereError):
                    x = torch.zeros(16, size, dtype=torch.bfloat16)
                    forward.may_process_input(linear.humming_config, x, m_major_scale=False)
    after = len(list(store.glob("*.cubin")))
    print(
        f"humming, {card}, {contestant.group}: "
        f"{before} kernels were there, {after - before} compiled",
        flush=True,
    )
    return after - before


def _number(kernel: Any, number: int) -> None:
    """Stands in for `register_kernel`, which loads the kernel onto the GPU."""
    kernel.kernel_id, kernel.kernel_name = number, ""


def _info(card: str) -> type:
    """A stand-in for the class by which Humming's native module describes a GPU."""
    cache, memory_khz, width = CARDS[card]
    operations = {
        "float16": 1,
        "bfloat16": 1,
        "float8e4m3": 2,
        "float8e5m2": 2,
        "int8": 2,
        "int4": 4,
    }
    facts = {
        "index": 0, "is_ppu": False, "name": card, "sm_count": SM_COUNT, "sm_major": 9,
        "sm_minor": 0, "sm_version": 90, "max_threads_per_block": 1024, "max_threads_per_sm": 2048,
        "max_registers_per_sm": 65536, "l2_cache_size": cache, "l2_cache_size_mb": cache / 2**20,
        "l1_cache_size": 2**18, "l1_cache_size_kb": 256.0, "default_smem_size": 49152,
        "max_smem_size": 232448, "max_smem_size_kb": 227.0, "memory_clock_khz": memory_khz,
        "memory_bus_width": width, "sm_clock_khz": CLOCK_KHZ,
        "memory_bandwidth_gbps": memory_khz * 2 * width / 8 / 1e6,
        "tensorcore_tops": {
            dtype: SM_COUNT * 4096 * CLOCK_KHZ / 1e9 * m for dtype, m in operations.items()
        },
        "__init__": lambda self, index=None: None,
    }  # fmt: skip
    return type("DeviceInfo", (), facts)


COMMANDS: dict[str, Callable[[Path], Any]] = {"marlin": marlin, "humming": humming, "check": check}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS or "QKERNELS_PREBUILT" not in os.environ:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]](Path(os.environ["QKERNELS_PREBUILT"]).resolve())
