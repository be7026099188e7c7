"""Launches that are kept: the same kernel with the same arguments as triton's own way of launching it.

A stand-in for the driver takes the launches of kernels compiled for sm_90, so this needs no GPU; it needs a
process of its own, for in this one kernels may be interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels as qk
from bench import host
from qkernels.backends import triton

pytest.importorskip("triton")


def launched(name: str, params: dict[str, object], bias: bool, m: int) -> None:
    """In a process without the interpreter: compare kept launches with triton's, argument for argument."""
    p = qk.quantize(torch.randn(96, 256), name, **params)
    added = torch.randn(96).half() if bias else None
    plain, odd = torch.randn(m, 256).half(), torch.randn(m * 256 + 1).half()[1:].view(m, 256)
    assert plain.data_ptr() % 16 == 0
    assert odd.data_ptr() % 16 != 0, "of another alignment, so of another kernel"
    with host.null_driver(record=True) as driver, host.only(host.launcher_of("triton", name, params)):
        for x in (plain, odd):
            taken = []
            for _ in range(4):  # triton's, triton's by the kept one's first call, kept, kept
                driver.launches.clear()
                with torch.inference_mode():
                    y = qk.matmul(x, p, added)
                taken.append((y, list(driver.launches)))
            kept = taken[-1][1]
            for _, _, values in kept:
                assert not any(isinstance(v, torch.Tensor) for v in flat(values)), "this was no kept launch"
            for y, found in taken:
                assert [(function, grid) for function, grid, _ in found] == [
                    (function, grid) for function, grid, _ in kept
                ]
                assert y.data_ptr() in addresses(found[-1][2]), "the output is not what the kernel writes"
                assert (plain if x is plain else odd).data_ptr() in addresses(found[0][2])
            first = taken[0][1]
            for (_, _, theirs), (_, _, ours) in zip(first, kept, strict=True):
                # All that may differ is where this call's own memory lies.
                assert len(theirs) == len(ours)
                weights = {t.data_ptr() for t in p.storage.values()}
                for a, b in zip(flat(theirs), addresses(ours), strict=True):
                    if isinstance(a, torch.Tensor) and a.data_ptr() not in weights:
                        assert b > 2**20, "an address"
                    else:
                        assert addresses([a]) == [b]


def flat(values: Any) -> list[Any]:
    return [part for v in values for part in (flat(v) if type(v) is tuple else [v])]


def addresses(values: Any) -> list[Any]:
    return [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in flat(values)]


@pytest.mark.parametrize(
    "case",
    [
        ("gptq", {"bits": 4, "group_size": 64}, True, 1),
        ("w8a8", {}, False, 1),
        ("int8", {}, True, 3),
    ],
    ids=lambda case: case[0],
)
def test_kept_launches_are_tritons_own(case: tuple[str, dict[str, object], bool, int]) -> None:
    code = f"from tests.kernels.test_launch import launched; launched(*{case!r})"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_kept_launch_in_the_interpreter() -> None:
    if not triton.interpreted():
        pytest.skip("kernels are compiled here")
    from qkernels.backends.triton.launch import Launch
    from qkernels.triton_kernels.gather import gather_columns

    x, perm, y = torch.randn(2, 32).half(), torch.arange(32, dtype=torch.int32), torch.empty(2, 32).half()
    launch = Launch(gather_columns, (2, 1), {"BLOCK": 32}, ())
    launch.slots = tuple(gather_columns.arg_names[:3])
    launch.fixed |= dict(zip(gather_columns.arg_names[3:5], (32, 32), strict=True))
    for _ in range(2):
        y.fill_(float("nan"))
        launch(x, perm, y)
        assert torch.equal(y, x)
    assert not launch._ready
