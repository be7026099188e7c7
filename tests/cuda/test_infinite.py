"""Infinite activations in the CUDA kernels, with the checks of tests/kernels/test_infinite.py."""

from __future__ import annotations

import pytest

from ..kernels import test_infinite as promise

pytestmark = pytest.mark.usefixtures("without_wgmma", "poisoned")


@promise.family_cases
@pytest.mark.parametrize("m", [5, 9])
def test_cuda(name: str, params: dict[str, object], m: int) -> None:
    promise.check(name, params, "cuda", m)


@promise.family_cases
def test_cuda_batch_invariant(name: str, params: dict[str, object]) -> None:
    promise.check(name, params, "cuda", 5, True)


@promise.family_cases
def test_cuda_for_many_rows(name: str, params: dict[str, object]) -> None:
    """The Hopper kernel, if the format has one."""
    promise.check(name, params, "cuda", 130)
