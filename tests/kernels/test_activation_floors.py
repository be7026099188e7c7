"""Tiny activations: the floors of DeepSeek and compressed-tensors for rows and groups near zero.

DeepGEMM, `per_token_cast_to_fp8`: amax of 128 features, at least 1e-4, / 448. FBGEMM and vLLM per
token: a scale of at least 1 / (448 * 512). The weight is an identity, so y is the quantized x.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import qkernels as qk
from qkernels.formats import fp8

ROOT = Path(__file__).parents[2]
#: the largest activation of a group: zero, far and just below each floor, and above
LARGEST = (0.0, 1e-12, 1e-9, 1e-7, 1e-6, 3e-5, 9e-5, 2e-4, 1.0)


def e4m3(values: np.ndarray) -> np.ndarray:
    """The nearest of the 127 values >= 0, ties to even codes, without the cast of a library."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    grid = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    above = np.searchsorted(grid, np.abs(values)).clip(1, 126)
    low, high = grid[above - 1], grid[above]
    middle, size = (low + high) / 2, np.abs(values)
    up = (size > middle) | ((size == middle) & (above % 2 == 0))
    return np.sign(values) * np.where(up, high, low)


def activations(granularity: str) -> tuple[torch.Tensor, np.ndarray]:
    """x, and what it is in FP8, float64; NaN where float32 may round it to either neighbour."""
    shape = (len(LARGEST), 128)
    x = (torch.rand(shape) * 2 - 1).bfloat16().float()
    x = (x / x.abs().amax(1, keepdim=True) * torch.tensor(LARGEST)[:, None]).bfloat16()
    values = x.double().numpy()
    amax = np.abs(values).max(1, keepdims=True)
    scale = (
        np.maximum(amax, 1e-4) / 448
        if granularity == "block"
        else np.maximum(amax / 448, 1 / (448 * 512))
    )
    low, high = (e4m3(values / scale * (1 + by)) for by in (-1e-5, 1e-5))
    return x, np.where(low == high, low * scale, np.nan)


BACKENDS = ["reference", "triton"]


def check(granularity: str, backend: str) -> None:
    p = qk.quantize(torch.eye(128), "fp8", granularity=granularity, activation="dynamic")
    x, want = activations(granularity)
    got = qk.matmul(x, p, backend=backend).double().numpy()
    sure = ~np.isnan(want)
    assert sure.mean() > 0.9
    assert (want[sure] == 0).any()
    assert (want[sure] != 0).any()
    # codes are 6% from each other; bfloat16 rounds by 0.4%, the interpreter cuts off twice that
    np.testing.assert_allclose(got[sure], want[sure], rtol=0.01, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["block", "channel"])
def test_tiny_activations(granularity: str, backend: str) -> None:
    check(granularity, backend)


def test_every_language_has_the_same_floors() -> None:
    group, token = fp8._GROUP_AMAX_FLOOR, fp8._TOKEN_FLOOR
    assert (group, token) == (1e-4, 1 / (448 * 512))
    text = (ROOT / "triton_kernels/activations.py").read_text()
    assert re.search(r"^TOKEN_FLOOR = tl.constexpr\(1 / \(448 \* 512\)\)$", text, re.M)
    assert re.search(r"^GROUP_AMAX_FLOOR = tl.constexpr\(1e-4\)$", text, re.M)
    text = (ROOT / "csrc/eight_bit/quantize.h").read_text()
    assert re.search(r"kTokenFloor = 1\.0f / \(448 \* 512\), kGroupFloor = 1e-4f;", text)
