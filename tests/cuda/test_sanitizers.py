"""The emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a subprocess.

This test runs the tests of the emulator and of the FP8 kernels. To run all tests, which compiles
all kernels again and takes long:

    SANITIZED=tests/cuda python -m pytest -n 0 tests/cuda/test_sanitizers.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

TESTS = [
    "tests/cuda/test_emulator.py",
    "tests/cuda/test_eight_bit.py::test_tiny_activations",
]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "QKERNELS_SANITIZE": "1",
}


@pytest.mark.skipif(
    torch.cuda.is_available() or shutil.which("g++") is None,
    reason="runs the emulator, built by g++",
)
def test_kernels_under_sanitizers() -> None:
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    chosen = os.environ.get("SANITIZED")
    tests = chosen.split() if chosen else TESTS
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    command += ["--deselect", "tests/cuda/test_sanitizers.py"]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(libraries)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-6000:]}"
