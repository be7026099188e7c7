"""One process that fuzzes one target until its time is over, or until it dies.

    python -m tests.fuzz.child TARGET SECONDS CORPUS FINDINGS STATE SCRATCH

`__main__.py` starts and watches it. STATE is a file that both processes map: the number of
executions, and the current input, which survives a crash. SCRATCH is a folder in memory.
"""

from __future__ import annotations

import hashlib
import importlib
import mmap
import os
import pkgutil
import random
import re
import struct
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    import atheris
except ImportError:  # no wheel for this Python or system
    atheris = None

TARGETS = ("gguf", "directories", "imatrix", "pack")
STATE_BYTES = 1 << 16
_MOST_BYTES = 4096
_HEAD = struct.Struct("<QI")


class Session:
    """A target with its seeds.

    scratch: folder of its files. guided: count coverage, which makes the start slow.
    """

    def __init__(self, name: str, scratch: Path, guided: bool = True) -> None:
        self.name, self.scratch = name, scratch
        self.target = _imported(name, guided)
        from . import oracle

        self.oracle = oracle
        self.seeds = self.target.seeds(self.scratch)
        self.folder = self.scratch / "model"

    def run(self, case: dict[str, Any]) -> Any:
        """The oracle's Finding for an input, or None."""
        from . import documents

        if case["seed"] not in self.seeds:
            return self.oracle.Finding(f"no seed {case['seed']!r}")
        edits = case["edits"]
        tree = documents.edited(self.seeds[case["seed"]], edits)
        return self.oracle.checked(lambda: self.target.run(tree, edits, self.folder))

    def shrunk(self, case: dict[str, Any], cause: str) -> dict[str, Any]:
        """The input without the edits that the finding does not need."""
        for i in reversed(range(len(case["edits"]))):
            fewer = {**case, "edits": case["edits"][:i] + case["edits"][i + 1 :]}
            found = self.run(fewer)
            if found is not None and found.cause == cause:
                case = fewer
        return case


def memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _imported(name: str, guided: bool) -> ModuleType:
    """The module of a target.

    qkernels is instrumented when it is imported for the first time.
    """
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    instrumented: AbstractContextManager[Any] = nullcontext()
    if atheris is not None and guided:
        # Triton reads its kernels' source and bytecode itself; the others read no files.
        without = ("triton_kernels", "backends", "benchmark", "integrations", "cli")
        instrumented = atheris.instrument_imports(
            include=["qkernels"], exclude=[f"qkernels.{part}" for part in without]
        )
    with instrumented:
        # or what is imported late is not instrumented
        for part in (
            "checkpoints",
            "formats",
            "layouts",
        ):
            folder = importlib.import_module(f"qkernels.{part}")
            for module in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}."):
                importlib.import_module(module.name)
    return importlib.import_module(f"tests.fuzz.target_{name}")


class Recorder:
    """Runs inputs, counts them in the state, and saves findings."""

    def __init__(self, session: Session, findings: Path, state: Path) -> None:
        self.session, self.findings = session, findings
        self.known: dict[str, int] = {}
        with state.open("r+b") as file:
            self.state = mmap.mmap(file.fileno(), STATE_BYTES)
        self.count = _HEAD.unpack_from(self.state)[0]

    def __call__(self, data: bytes) -> int:
        from . import documents

        case = documents.parse(data)
        if case is None or case["seed"] not in self.session.seeds:
            return -1  # not for the corpus
        _HEAD.pack_into(self.state, 0, self.count, len(data))
        self.state[_HEAD.size : _HEAD.size + len(data)] = data
        found = self.session.run(case)
        self.count += 1
        _HEAD.pack_into(self.state, 0, self.count, 0)
        if found is not None and found.cause not in self.known:
            self.known[found.cause] = 1
            small = self.session.shrunk(case, found.cause)
            save(self.findings, found.cause, found.detail, documents.text_of(small))
        elif found is not None:
            self.known[found.cause] += 1
        return 0


def save(folder: Path, cause: str, detail: str, data: bytes) -> Path:
    """Write a finding and print it, unless there is one with the same cause."""
    slug = re.sub(r"\W+", "-", cause)[:80].strip("-")
    path = folder / f"{slug}-{hashlib.sha256(cause.encode()).hexdigest()[:6]}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"{cause}\n\n{detail}\n", errors="replace")
    return path


def read_state(path: Path) -> tuple[int, bytes]:
    """(executions, the input that was running; empty between two inputs)."""
    content = path.read_bytes()
    count, length = _HEAD.unpack_from(content)
    return count, content[_HEAD.size : _HEAD.size + length]


def _fuzz(recorder: Recorder, seconds: int, corpus: Path) -> None:
    from . import documents
    from .mutate import Mutator

    session = recorder.session
    mutator = Mutator(session.seeds, session.target.WORDS)
    start = session.scratch / "seeds"
    start.mkdir()
    for name in session.seeds:
        (start / name.replace("/", "_")).write_bytes(documents.text_of({"seed": name, "edits": []}))
    kept = Path(__file__).parent / "corpus" / session.name
    session.oracle.limit_memory()
    session.oracle.forbid((session.scratch, recorder.findings))
    if atheris is None:
        _blind(recorder, mutator, seconds)
        return
    change: Callable[[bytes], bytes] = lambda text: atheris.Mutate(text, max(1, 2 * len(text)))  # noqa: E731
    options = [
        f"-max_total_time={seconds}", f"-max_len={_MOST_BYTES}", "-len_control=0",
        "-rss_limit_mb=0", "-timeout=0", "-reload=0", "-report_slow_units=100000",
        f"-seed={_seed()}", f"-artifact_prefix={session.scratch}/",
        *(f"-handle_{name}=0" for name in ("abrt", "bus", "fpe", "ill", "int", "segv", "term",
                                           "xfsz")),
    ]  # fmt: skip
    folders = [str(corpus), str(start), *([str(kept)] if kept.is_dir() else [])]
    atheris.Setup(
        [sys.argv[0], *options, *folders],
        recorder,
        custom_mutator=lambda data, most, seed: mutator(bytes(data), most, seed, change),
        custom_crossover=lambda one, other, most, seed: mutator.cross(
            bytes(one), bytes(other), most, seed
        ),
    )
    atheris.Fuzz()


def _seed() -> int:
    """$QKERNELS_FUZZ_SEED, or a new random seed."""
    return int(os.environ.get("QKERNELS_FUZZ_SEED") or time.time_ns() % 2**31)


def _blind(recorder: Recorder, mutator: Any, seconds: int) -> None:
    """Fuzz without coverage, by mutations of the seeds and of their mutations."""
    rng, end = random.Random(_seed()), time.monotonic() + seconds
    while time.monotonic() < end:
        data = b""
        for _ in range(rng.choice((1, 2, 4))):
            data = mutator(data, _MOST_BYTES, rng.randrange(2**32))
        recorder(data)


def main(arguments: list[str]) -> None:
    import faulthandler

    faulthandler.enable()
    name, seconds, *paths = arguments
    corpus, findings, state, scratch = (Path(path).resolve() for path in paths)
    _fuzz(Recorder(Session(name, scratch), findings, state), int(float(seconds)), corpus)


if __name__ == "__main__":
    main(sys.argv[1:])
