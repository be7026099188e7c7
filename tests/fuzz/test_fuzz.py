"""Inputs that once broke something are handled, and some seconds of fuzzing find nothing new.

The docstring of the package says how to fuzz for hours.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from . import child, documents, oracle
from .__main__ import fuzz

CORPUS = Path(__file__).parent / "corpus"
SECONDS = float(os.environ.get("QKERNELS_FUZZ_SECONDS", "5"))


@pytest.mark.parametrize("target", child.TARGETS)
def test_what_once_broke(target: str) -> None:
    """In a process of its own, because it may die."""
    cases = sorted((CORPUS / target).glob("*.json"))
    assert cases
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", target, "--replay", *map(str, cases)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert len(re.findall(r"\.json: good$", done.stdout, re.M)) == len(cases)


@pytest.mark.parametrize("target", child.TARGETS)
def test_some_seconds(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed is fixed, so a finding comes from a change; longer runs start from others."""
    monkeypatch.setenv("QKERNELS_FUZZ_SEED", "17")
    result = fuzz(target, SECONDS, None, tmp_path / "findings")
    details = [path.read_text() + path.with_suffix(".txt").read_text() for path in result.findings]
    assert not result.findings, "\n\n".join([str(result), *details])
    assert result.deaths == 0
    assert result.executions >= 2 * SECONDS, str(result)  # 20 times as many where nothing else runs
    assert child.atheris is None or result.coverage > 100, str(result)


def test_corpus_is_small_and_readable() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000
    for path in files:
        case = documents.parse(path.read_bytes())
        assert case is not None, path
        assert case["edits"], path


# ---------------------------------------------------------------------- the harness itself
def _hang() -> None:
    while True:
        pass


def _without_name() -> None:
    oracle.attempt("load", ("model.gguf",), lambda: int("x"))


@pytest.mark.parametrize(("run", "cause"), [
    (lambda: {}["x"], "KeyError"), (_without_name, "load: the message names none"),
    (_hang, "takes too long"), (lambda: bytearray(1 << 60), "takes too much memory"),
    (lambda: bytearray(b"x") * (300 << 20), "takes too much memory"),
], ids=["error", "no-name", "hang", "bomb", "growth"])  # fmt: skip
def test_what_the_oracle_sees(
    run: Callable[[], None], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "CPU_SECONDS", 0.3 if run is _hang else 20)
    found = oracle.checked(run)
    assert found is not None
    assert cause in found.cause
    assert oracle.checked(lambda: oracle.attempt("load", ("model.gguf",), lambda: None)) is None


@pytest.mark.parametrize("code", [
    "open('/tmp/elsewhere', 'w')", "open('/root/.ssh/id')",
    "import socket; socket.create_connection(('127.0.0.1', 9))", "import os; os.system('true')",
    "import pickle; pickle.loads(pickle.dumps(print))",
])  # fmt: skip
def test_what_is_forbidden(code: str, tmp_path: Path) -> None:
    """In a process of its own, because audit hooks cannot be removed."""
    start = "from pathlib import Path; from tests.fuzz import oracle; "
    start += f"oracle.forbid((Path({str(tmp_path)!r}),))"
    inside = f"open({str(tmp_path / 'x')!r}, 'w').close()"
    done = subprocess.run(
        [sys.executable, "-c", f"{start}; {inside}; {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "tests.fuzz.oracle.Outside" in done.stderr
    assert (tmp_path / "x").exists()


DYING = """
import os, sys, time, faulthandler
from pathlib import Path
from tests.fuzz import child
faulthandler.enable()
class Session:
    seeds = {"plain": {}}
    def run(self, case):
        if case["edits"]:
            %s
recorder = child.Recorder(Session(), Path(sys.argv[4]), Path(sys.argv[5]))
recorder(b'{"seed":"plain","edits":[]}')
time.sleep(1)
recorder(b'{"seed":"plain","edits":[["drop",["x"]]]}')
"""


@pytest.mark.parametrize(("body", "cause"), [
    ("os.kill(os.getpid(), 11)", "SIGSEGV"), ("os.kill(os.getpid(), 7)", "SIGBUS"),
    ("os.kill(os.getpid(), 9)", "SIGKILL"), ("os._exit(3)", "exit status 3"),
    ("time.sleep(60)", "SIGABRT"),
], ids=["segv", "bus", "kill", "exit", "hang"])  # fmt: skip
def test_a_death_is_a_finding(
    body: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finding has the input, and another process goes on with the rest of the time."""
    script = tmp_path / "dying.py"
    script.write_text(DYING % body)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # the script lies elsewhere
    monkeypatch.setattr("tests.fuzz.__main__.CHILD", [str(script)])
    monkeypatch.setattr("tests.fuzz.__main__._MOST_DEATHS", 2)
    monkeypatch.setattr("tests.fuzz.__main__._PATIENCE", 3)
    result = fuzz("imatrix", 100, None, tmp_path / "findings")
    (finding,) = result.findings
    assert cause in finding.with_suffix(".txt").read_text().splitlines()[0]
    assert finding.read_bytes() == b'{"seed":"plain","edits":[["drop",["x"]]]}'
    assert (result.deaths, result.executions) == (2, 2)
