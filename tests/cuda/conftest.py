"""Runs the CUDA backend on the CPU, in the emulator of csrc/emulation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from qkernels.backends import cuda, registry

from . import host

#: order in which the emulator runs blocks; a test may change it
ORDER = [0]
#: macros that kernels are compiled with
DEFINES: list[str] = []


def emulate(
    name: str, call: ctypes.Structure, reads: list[torch.Tensor], writes: list[torch.Tensor]
) -> str:
    lib, function = host.entry(name, tuple(DEFINES))
    host.expose(lib, reads, writes, ORDER[0])
    return str(function(ctypes.byref(call)).decode())


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the emulator if there is no GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda, "emulator", emulate)
    elif (why := cuda.unavailable()) is not None:
        pytest.skip(why)
    monkeypatch.setattr("tests.cuda.conftest.ORDER", [0])
    monkeypatch.setattr("tests.cuda.conftest.DEFINES", [])
    registry.choose.cache_clear()
    yield
    registry.choose.cache_clear()


@pytest.fixture
def without_wgmma(monkeypatch: pytest.MonkeyPatch, emulated: None) -> None:
    """No weight-only kernel of Hopper, which the emulator and sm_90 would take from 17 rows on."""
    monkeypatch.setattr("qkernels.backends.cuda.hopper.rejects", lambda problem: "for sm_90")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output starts as NaN, so an element that the kernel does not write fails the test."""
    real = torch.empty

    def poison(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = real(*args, **kwargs)
        if tensor.dtype == torch.uint8:  # scratch memory: NaN in every float
            return tensor.fill_(0xFF)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poison)
