"""Fixtures and cases of all tests. Without a GPU, Triton kernels run in triton's interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that share cores would wait for each other's threads: torch's, and those of numpy's
    # BLAS, which reads these variables when it is loaded. Processes that tests start inherit them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # triton reads this when a kernel is decorated, so it must be set before any kernel module
    # loads.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from qkernels import formats
from qkernels.formats.gguf import TYPES as GGUF_TYPES

from . import interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.speed_up()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

#: file that each failure is added to as it happens, for a run that may be cut short; see
#: bench/gpu/plan.py
FAILURES = os.environ.get("QKERNELS_FAILURES")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
collect_ignore = [] if DEVICE == "cuda" else ["gpu"]  # tests that need a GPU

#: every storage format with the parameter sets that change its layout or arithmetic
CASES = [
    ("fp16", {}),
    ("bf16", {}),
    ("gptq", {"bits": 4, "group_size": 64}),
    ("gptq", {"bits": 4, "group_size": 32, "symmetric": False}),
    ("gptq", {"bits": 4, "group_size": 32, "symmetric": False, "checkpoint_format": "gptq_v2"}),
    ("gptq", {"bits": 4, "group_size": 64, "act_order": True}),
    ("gptq", {"bits": 4, "group_size": 24}),
    ("gptq", {"bits": 3, "group_size": 64, "symmetric": False}),
    ("gptq", {"bits": 3, "group_size": 32, "act_order": True}),
    ("gptq", {"bits": 2, "group_size": -1}),
    ("gptq", {"bits": 8, "group_size": 64, "symmetric": False}),
    ("awq", {"group_size": 64}),
    ("awq", {"group_size": -1, "symmetric": True}),
    ("pack_quantized", {"bits": 3, "group_size": 32, "symmetric": False}),
    ("pack_quantized", {"bits": 4, "group_size": 32, "act_order": True}),
    ("nf4", {}),
    ("nf4", {"block_size": 32, "double_quant": True}),
    ("nf4", {"block_size": 4096}),
    ("fp4", {"block_size": 128}),
    ("fp4", {"double_quant": True}),
    ("mxfp4", {}),
    ("spqr", {}),
    ("spqr", {"checkpoint_format": "spqr_quant", "act_order": True}),
    ("spqr", {"bits": 4, "group_size": 32, "threshold": 0.05}),
    ("spqr", {"bits": 2, "group_size": 8, "row_group": 8, "act_order": True}),
    *(("quip", {"bits": bits}) for bits in (2, 3, 4)),
    *(("quip_sharp", {"bits": bits}) for bits in (2, 3, 4)),
    ("int8", {}),
    ("w8a8", {}),
    ("w8a8", {"granularity": "tensor"}),
    ("w8a8", {"activation": "static", "input_scale": 0.03}),
    ("w8a8", {"activation": "static", "input_scale": 0.03, "input_zero_point": -7}),
    ("fp8", {}),
    ("fp8", {"granularity": "tensor", "float_format": "e5m2"}),
    ("fp8", {"granularity": "tensor", "activation": "static", "input_scale": 0.02}),
    ("fp8", {"activation": "dynamic"}),
    ("w8a8", {"activation": "none", "group_size": 32, "symmetric_weight": False}),
    ("fp8", {"granularity": "block"}),
    ("fp8", {"granularity": "block", "block_rows": 32, "block_columns": 48}),
    ("fp8", {"granularity": "block", "activation": "dynamic"}),
    *((gguf.name, {}) for gguf in GGUF_TYPES),
]


def case_id(case: tuple[str, dict[str, object]]) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def layout_of(name: str, params: dict[str, object]) -> str | None:
    """The kernel layout of a case of CASES."""
    fmt = formats.get(name)
    return fmt.kernel_layout({**fmt.defaults, **params})


def k_of(name: str, k: int) -> int:
    """k, rounded up to a multiple that the format takes."""
    multiple = formats.get(name).k_multiple
    return -(-k // multiple) * multiple


all_cases = pytest.mark.parametrize(("name", "params"), CASES, ids=map(case_id, CASES))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if FAILURES and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        lines = [line[2:] for line in report.longreprtext.splitlines() if line.startswith("E ")]
        with open(FAILURES, "a") as file:
            file.write(
                f"{report.nodeid}: {' '.join(lines)[:300] or report.longreprtext[-300:]!r}\n"
            )


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End this worker if the GPU is unusable after an illegal access; xdist starts another."""
    report = yield
    if report.failed and DEVICE == "cuda" and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"{item.nodeid}: {report.longreprtext[-500:]}", file=sys.__stderr__, flush=True)
            os._exit(1)
    return report


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(torch.initial_seed() % 2**31)


@pytest.fixture(autouse=True)
def _fresh_seed(request: pytest.FixtureRequest) -> None:
    """New random inputs every run; a failing test prints its seed, QKERNELS_SEED repeats it."""
    seed = int(os.environ.get("QKERNELS_SEED", torch.seed() % 2**31))
    torch.manual_seed(seed)
    request.node.add_report_section("setup", "seed", f"QKERNELS_SEED={seed}")
