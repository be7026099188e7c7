"""Contestants for `--peers tests.bench.broken` that break their process, each in its own way."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor, nn

from qkernels.benchmark import race


class _Product(nn.Module):
    def __init__(self, dense: nn.Module, how: str) -> None:
        super().__init__()
        self.dense, self.how = dense, how

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1 or self.how == "always":
            if self.how == "hangs":
                if mark := os.environ.get("QKERNELS_TEST_HANGING"):
                    Path(mark).touch()
                time.sleep(3600)
            os._exit(9)
        return self.dense(x)


class Broken(race.Dense):
    """Breaks its process at M = 1, or at every M."""

    group = "bf16"

    def __init__(self, how: str) -> None:
        self.name, self.how = f"qkernels broken {how}", how
        if how == "hangs":
            self.patience = float(os.environ.get("QKERNELS_TEST_PATIENCE", "3"))

    def prepare(self, weight: Tensor) -> race.Layer:
        made = super().prepare(weight)
        made.call = _Product(made.call, self.how)
        return made


CONTESTANTS = [Broken("dies"), Broken("hangs"), Broken("always")]
