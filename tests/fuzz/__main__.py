"""The runner: starts a child for a target, and another when it dies; each death is a finding."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from . import child, documents

#: seconds without an execution after which a child hangs: more than the oracle allows, and than a
#: start takes
_PATIENCE, _START = 60.0, 400.0
_MOST_DEATHS = 20
CHILD = ["-m", "tests.fuzz.child"]
_PROGRESS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/")


@dataclass
class Result:
    """The outcome of fuzzing one target.

    coverage: edges in qkernels; none without atheris.
    """

    target: str
    executions: int = 0
    seconds: float = 0.0
    coverage: int = 0
    features: int = 0
    corpus: int = 0
    deaths: int = 0
    findings: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        rate = self.executions / max(self.seconds, 1e-9)
        text = f"{self.target}: {self.executions} executions in {self.seconds:.0f} s "
        text += f"({rate:.0f} a second), "
        text += f"coverage {self.coverage} edges, {self.features} features, corpus {self.corpus}, "
        text += f"{self.deaths} children died, {len(self.findings)} findings"
        for path in self.findings:
            cause = path.with_suffix(".txt").read_text().splitlines()[0]
            text += f"\n  {cause}\n    python -m tests.fuzz {self.target} --replay {path}"
        return text


def fuzz(target: str, seconds: float, corpus: Path | None, findings: Path) -> Result:
    """Fuzz one target; `seconds` counts from its first execution on."""
    result = Result(target)
    with tempfile.TemporaryDirectory(prefix="qkernels-fuzz-", dir=child.memory()) as scratch:
        state, log = Path(scratch) / "state", Path(scratch) / "log"
        kept = corpus / target if corpus is not None else Path(scratch) / "corpus"
        kept.mkdir(parents=True, exist_ok=True)
        state.write_bytes(bytes(child.STATE_BYTES))
        while result.seconds < seconds - 1:
            with tempfile.TemporaryDirectory(dir=scratch) as work:
                paths = [kept, findings, state, Path(work)]
                code, spent = _one_child(target, seconds - result.seconds, paths, log)
            result.seconds += spent
            result.executions, data = child.read_state(state)
            for line in _PROGRESS.findall(log.read_text(errors="replace")):
                result.coverage, result.features = (
                    max(result.coverage, int(line[0])),
                    max(result.features, int(line[1])),
                )
            if code == 0:
                break
            result.deaths += 1
            _save_death(findings, code, data, log.read_text(errors="replace"))
            if result.deaths == _MOST_DEATHS or (spent == 0 and not data):
                break  # it cannot even start, or does nothing but die
        result.corpus = len(list(kept.iterdir()))
    result.findings = sorted(findings.glob("*.json"))
    return result


def _one_child(target: str, seconds: float, paths: list[Path], log: Path) -> tuple[int, float]:
    """Run a child; kill it if it hangs. Returns (exit status, seconds since its first input)."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, *CHILD, target, str(max(1, seconds)), *map(str, paths)]
    state = paths[2]
    before, begin = child.read_state(state)[0], 0.0
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
        )
        count, moved = before, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            now = child.read_state(state)[0]
            if now != count:
                begin = begin or time.monotonic()
                count, moved = now, time.monotonic()
            if time.monotonic() - moved > (_PATIENCE if count != before else _START):
                process.send_signal(signal.SIGABRT)  # which makes it print where it is
                time.sleep(1)
                process.kill()
    return process.returncode, time.monotonic() - begin if begin else 0.0


def _save_death(findings: Path, code: int, data: bytes, log: str) -> None:
    name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    frames = re.findall(r'File ".*?(qkernels/[^"]*)", line \d+ in (\S+)', log)
    where = ":".join(frames[0]) if frames else "no line of ours"
    child.save(
        findings,
        f"process died of {name}: {where}",
        log[-6000:],
        data or documents.text_of({"seed": "?", "edits": []}),
    )


def replay(target: str, paths: list[Path]) -> int:
    """Run saved inputs. Returns how many are findings."""
    with tempfile.TemporaryDirectory(prefix="qkernels-fuzz-", dir=child.memory()) as scratch:
        session, bad = child.Session(target, Path(scratch), guided=False), 0
        session.oracle.limit_memory()
        for path in paths:
            case = documents.parse(path.read_bytes())
            found = (
                session.run(case)
                if case is not None
                else session.oracle.Finding("no case of documents.py")
            )
            print(f"{path}: {'good' if found is None else found.cause}")
            if found is not None:
                print(found.detail)
                bad += 1
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=sys.modules["tests.fuzz"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", choices=[*child.TARGETS, "all"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--corpus", type=Path, help="folder that keeps what was reached, by target")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz/findings"))
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE")
    given = parser.parse_args()
    if given.replay:
        os.environ["TRITON_INTERPRET"] = "1"
        return int(replay(given.target, given.replay) > 0)
    bad = 0
    for target in child.TARGETS if given.target == "all" else (given.target,):
        result = fuzz(target, given.seconds, given.corpus, given.findings / target)
        print(result, flush=True)
        bad += len(result.findings)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
