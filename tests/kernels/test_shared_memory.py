"""`configs.shared_bytes` is an upper bound for compiled kernels, so that `fitted` returns only
configurations that can be launched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from bench.static.jobs import experts as expert_jobs
from bench.static.jobs import weight_only as jobs
from qkernels import formats
from qkernels.backends.triton import configs, weight_only

#: format, bits and configuration. In all of them decoded weights pass through shared memory, with
#: tiles of both lengths
JOBS: list[tuple[str, int, tuple[int, int, int, int]]] = [
    ("gptq", 3, (16, 128, 8, 2)),
    ("gptq", 3, (16, 128, 8, 3)),
    ("gptq", 3, (32, 128, 8, 2)),
    ("q5_k", 5, (16, 64, 4, 3)),
    ("q6_k", 6, (32, 128, 8, 2)),
    ("quip_sharp", 2, (16, 128, 8, 3)),
    ("quip_sharp", 3, (32, 128, 8, 2)),
]
ARCH = 89


def compiled_bytes() -> list[int]:
    """Shared memory of each job's kernel. For a process without the interpreter."""
    from bench.static.facts import _compiled

    found = []
    for name, bits, sizes in JOBS:
        config = configs.GemmConfig(*sizes)
        kernel: Any = expert_jobs if name == "gptq" else jobs
        label = f"{name} bits={bits} " if name in ("gptq", "quip_sharp") else f"{name} "
        launcher = kernel.launcher
        tabled, launcher.tabled = launcher.tabled, lambda problem, config=config: config
        job = next(
            j for j in kernel.compile_jobs(ARCH) if j.label.startswith(label) and "bf16" in j.label
        )
        launcher.tabled = tabled
        found.append(_compiled(job).metadata.shared)
    return found


def estimates(traits: list[weight_only.layout.WeightOnlyTraits]) -> list[int]:
    return [
        configs.shared_bytes(configs.GemmConfig(*sizes), weight_only.sizes(of))
        for (_, _, sizes), of in zip(JOBS, traits, strict=True)
    ]


def traits() -> list[weight_only.layout.WeightOnlyTraits]:
    found = []
    for name, bits, _ in JOBS:
        params = next(
            params
            for job_name, params in jobs.formats_of_jobs()
            if job_name == name and params.get("bits", bits) == bits
        )
        fmt = formats.get(name)
        found.append(fmt.weight_only_traits((8192, 8192), fmt.resolve((8192, 8192), params)))
    return found


def test_compiled_kernels_need_no_more() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    needed = json.loads(done.stdout)
    for job, need, estimate in zip(JOBS, needed, estimates(traits()), strict=True):
        assert need <= estimate, f"{job}: {need} bytes, estimated {estimate}"


def test_three_bits_of_experts_lose_the_stage_that_does_not_fit() -> None:
    """104 KiB with three stages, 84 with two; a block may have 99."""
    (three, *_) = traits()
    three_stages = configs.GemmConfig(16, 128, 8, 3)
    assert configs.fitted(three_stages, ARCH, weight_only.sizes(three)).num_stages == 2
    assert configs.fitted(three_stages, 80, weight_only.sizes(three)).num_stages == 3


if __name__ == "__main__":
    print(json.dumps(compiled_bytes()))
