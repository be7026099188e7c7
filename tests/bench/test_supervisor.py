"""A race goes on, with its earlier results, if a contestant crashes, hangs or runs out of time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import supervisor, worker
from qkernels.benchmark import race

from .broken import CONTESTANTS


def raced(
    rows: list[int], deadline: float = 1e9, peers: str = "tests.bench.broken"
) -> list[race.Row]:
    field = worker.contestants("bf16", "reference", peers, True)
    cases = [(number, 64, 128, list(rows)) for number in range(len(field))]
    job = worker.Job("bf16", "reference", peers, True, "cpu", 1, cases, {})
    return [
        row
        for row in supervisor.run(job, field, time.monotonic() + deadline, print)
        if isinstance(row, race.Row)
    ]


def test_what_breaks_its_process_costs_its_own_place_only() -> None:
    found = {(row.contestant, row.m): row for row in raced([1, 3])}
    assert len(found) == 2 * (len(CONTESTANTS) + 2)
    assert {m: found["torch bf16", m].failed for m in (1, 3)} == {1: "", 3: ""}
    for how, why in (("dies", "the process died (9)"), ("hangs", "hung: no answer for 3 s")):
        assert found[f"qkernels broken {how}", 1].failed.startswith(why)
        after = found[f"qkernels broken {how}", 3]
        assert (after.failed, after.chain is not None, after.speedup is not None) == (
            "",
            True,
            True,
        )
    assert found["qkernels broken always", 3].failed.startswith("the process died (9)")


def test_who_breaks_too_often_is_left_out() -> None:
    rows = [row for row in raced([1, 2, 3, 4, 5, 6]) if row.contestant == "qkernels broken always"]
    assert [row.m for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.failed.startswith("the process died") for row in rows] == [True] * 4 + [False] * 2
    assert rows[-1].failed == "left out: it broke its process too often"


def test_a_deadline_ends_it_and_says_so() -> None:
    start = time.monotonic()
    rows = raced([1, 3], deadline=0.1)
    assert time.monotonic() - start < 30
    assert {row.failed for row in rows} == {"no time was left"}
    assert len(rows) == 2 * (len(CONTESTANTS) + 2), "the dense product, ours, and those"


def test_results_are_on_disk_before_the_end(tmp_path: Path) -> None:
    """A race that `timeout` stops while a kernel hangs leaves its earlier results, and a page."""
    arguments = [
        "--tiny",
        "--suite",
        "bf16",
        "--peers",
        "tests.bench.broken",
        "--output",
        str(tmp_path),
        "--name",
        "r",
    ]
    root, hanging = Path(__file__).parents[2], tmp_path / "hanging"
    environment = {"QKERNELS_TEST_PATIENCE": "600", "QKERNELS_TEST_HANGING": str(hanging)}
    running = subprocess.Popen(
        [sys.executable, "-m", "bench", *arguments, "--backend", "reference"], cwd=root,
        stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        for _ in range(600):
            time.sleep(0.1)
            if hanging.exists():
                break
        time.sleep(0.5)  # the rows before it are read by now
        running.send_signal(signal.SIGTERM)
        said, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    found = json.loads((tmp_path / "r.json").read_text())["results"]
    assert {row["contestant"] for row in found if row["chain"]} >= {
        "torch bf16",
        "qkernels broken dies",
    }
    assert "stopped" in said
    assert "# Race" in (tmp_path / "r.md").read_text()


def test_a_line_says_what_matters() -> None:
    row = race.Row(
        "qkernels cuda nf4", "nf4", 64, 128, 1, chain=12.34, speedup=3.456, bandwidth=3000.0
    )
    gone = race.Row("qkernels cuda nf4", "nf4", 64, 128, 16, failed="hung: no answer for 45 s")
    assert (
        command.line([row, gone], 4000.0)
        == "64x128 cuda nf4: M1 12.3us 3.46x 75% | M16 hung: no answer for 45 s"
    )
    peer = race.Row("humming", "w8a8", 64, 128, 1, failed="humming is not installed")
    also = race.Row("humming", "w8a8", 64, 128, 16, failed="humming is not installed")
    assert (
        command.line([peer, also], None)
        == "64x128 humming [w8a8]: M1 humming is not installed | M16 -"
    )


@pytest.mark.parametrize("job", [{"copy": True}, {"warm": True}])
def test_jobs_travel_as_json(job: dict[str, bool]) -> None:
    made = worker.Job(
        "nf4", "triton", "none", True, "cpu", 1, [(0, 64, 128, [1])], {"64,128,1": 2.5}, **job
    )
    assert worker.Job(**json.loads(json.dumps(vars(made)))).dense == {"64,128,1": 2.5}
