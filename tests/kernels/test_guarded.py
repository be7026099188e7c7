"""No Triton kernel touches a byte beyond its tensors, or before them. Triton's interpreter alone
does not notice that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from ..conftest import layout_of
from .guarded import CASES, EXPERTS

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="for kernels in triton's interpreter only"
)


def run(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.kernels.guarded", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=dict(os.environ)
    )
    return done.returncode, f"{done.stdout}{done.stderr[-2000:]}"


@pytest.mark.parametrize("where", ["end", "begin"])
def test_no_kernel_leaves_its_tensors(where: str) -> None:
    code, said = run(where)
    assert code == 0, (
        f"{signal.strsignal(-code) if code < 0 else code} after {said.splitlines()[-1:]}\n{said}"
    )
    count = sum(layout_of(*case) is not None for case in CASES) + len(EXPERTS)
    assert said.splitlines()[-1] == f"{count} products"


def test_one_element_beyond_is_noticed() -> None:
    code, said = run("planted")
    assert (code, said.splitlines()) == (
        -signal.SIGSEGV,
        ["planted: 0 beyond", "planted: 1 beyond"],
    )
