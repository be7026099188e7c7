"""Compiles the CUDA extension for this machine's GPU, or finds it compiled; --tiny says what would
be done.
"""

from __future__ import annotations

import sys

from qkernels.backends.cuda import build

if __name__ == "__main__":
    print("CUDA kernels:", build.state() if "--tiny" in sys.argv else build.extension().__file__)
