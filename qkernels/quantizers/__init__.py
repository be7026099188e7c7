"""Algorithms that choose the codes: GPTQ, AWQ, SmoothQuant, SpQR, LDLQ, ranges, importance.

gptq.py awq.py smoothquant.py spqr.py quip.py   the mathematics, one layer at a time
importance.py                   llama.cpp's importance matrix and its file
recipes.py                      llama.cpp's mixtures of block types
calibration.py                  what layers see of calibration text
architectures.py                which operator feeds which layers, model by model
algorithms.py driver.py         block by block through a model
"""

from .calibration import calibration_ids
from .importance import ImportanceMatrix

__all__ = ["ImportanceMatrix", "calibration_ids"]
