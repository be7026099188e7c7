"""Algorithms that choose the codes from calibration data: GPTQ, AWQ, SmoothQuant, SpQR, LDLQ, ...

driver.py                       quantizes a model block by block, and can resume
algorithms.py                   one class per algorithm: what it does with one block
gptq.py awq.py smoothquant.py   the mathematics, for one layer; SpQR's and QuIP#'s are in
                                formats/, because those formats cannot be written without them
calibration.py                  calibration tokens, and the layers' inputs for them
importance.py                   llama.cpp's importance matrix and its file
architectures.py                which operator feeds which layers, per model type
digest.py                       hashes of models and tensors, to resume only the same job
specs.py                        a format with parameters as text: "gptq:bits=4,group_size=128"
"""

from .calibration import calibration_ids
from .importance import ImportanceMatrix

__all__ = ["ImportanceMatrix", "calibration_ids"]
