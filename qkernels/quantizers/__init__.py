"""Algorithms that choose the codes: GPTQ, AWQ, SmoothQuant, SpQR, LDLQ, ranges, importance.

gptq.py awq.py smoothquant.py   the mathematics, one layer at a time; that of SpQR and QuIP# is in formats/,
                                because those formats cannot be written without it
importance.py                   llama.cpp's importance matrix and its file
specs.py                        "gptq:bits=4,group_size=128", a format with parameters, as text
calibration.py                  what layers see of calibration text
architectures.py                which operator feeds which layers, model by model
algorithms.py driver.py         block by block through a model
"""

from .calibration import calibration_ids
from .importance import ImportanceMatrix

__all__ = ["ImportanceMatrix", "calibration_ids"]
