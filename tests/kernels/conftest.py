"""Fixtures of the kernels' tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qkernels.backends.triton import interpreted


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output starts as NaN, so an element that the kernel does not write fails the test."""
    real = torch.empty

    def poison(*args: object, **kwargs: object) -> torch.Tensor:
        made = real(*args, **kwargs)
        if made.dtype == torch.uint8:  # scratch memory: NaN in every float
            return made.fill_(0xFF)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def dots_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's dot sums the products of an element in the order of k, as tensor cores do.

    The interpreter uses numpy's matmul, and on some CPUs its BLAS changes the order with the number
    of columns.
    """
    if not interpreted():
        return
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if not np.issubdtype(d.data.dtype, np.floating):
            return theirs(self, a, b, d, *rest)
        products = values(a)[:, :, None] * values(b)[None, :, :]
        found = np.add.reduce(products, axis=-2)  # not the last axis: one k after another
        return interpreter.TensorHandle(found + d.data, d.dtype.scalar)

    def values(t: Any) -> Any:
        if t.dtype.primitive_bitwidth == 8:
            kind = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}[t.dtype.name]
            return torch.from_numpy(t.data).view(kind).float().numpy()
        return t.data.astype(np.float32)

    theirs = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
