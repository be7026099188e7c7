"""Compile the CUDA extension for this machine's GPU, unless it is compiled; --tiny only looks."""

from __future__ import annotations

import sys

from qkernels.backends.cuda import build

if __name__ == "__main__":
    print("CUDA kernels:", build.state() if "--tiny" in sys.argv else build.extension().__file__)
