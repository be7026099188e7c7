"""SmoothQuant: the paper's formula, and its effect."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import qkernels as qk
from bench.outliers import plant
from qkernels.quantizers.smoothquant import smoothing_scale

from ..tiny import ids, tiny_model


def test_formula() -> None:
    scale = smoothing_scale(
        torch.tensor([8.0, 2.0]), [torch.tensor([[0.5, -2.0]]), torch.tensor([[1.0, 0.1]])], 0.5
    )
    torch.testing.assert_close(scale, torch.tensor([8.0**0.5 / 1.0**0.5, 2.0**0.5 / 2.0**0.5]))
    everything = smoothing_scale(torch.tensor([8.0, 2.0]), [torch.ones(1, 2)], 1.0)
    torch.testing.assert_close(everything, torch.tensor([8.0, 2.0]))
    dead = smoothing_scale(torch.zeros(2), [torch.zeros(1, 2)], 0.5)
    assert bool((dead > 0).all())
    assert bool(dead.isfinite().all())


def test_planted_outliers_break_w8a8_but_not_what_is_made_for_them() -> None:
    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(ids(64, seed=3)[None]).logits

    model = tiny_model()
    # int8 codes have few values left for the other features
    spiked = plant(copy.deepcopy(model), factor=20.0, channels=2)
    want = logits(model)
    torch.testing.assert_close(logits(spiked), want, rtol=1e-3, atol=1e-4)
    calibration = ids(4 * 48).view(4, 48)

    def error(name: str, data: Tensor | None = None, **params: object) -> float:
        quantized = qk.quantize_model(copy.deepcopy(spiked), name, data, progress=False, **params)
        return float((logits(quantized) - want).norm() / want.norm())

    broken = error("w8a8")
    assert error("w8a8", calibration, alpha=0.5) < broken / 4
    assert error("int8") < broken / 2
