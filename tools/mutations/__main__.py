"""Breaks the kernels on purpose, one line at a time, and checks that the tests notice.

    python -m tools.mutations [--only PART]

Prints one line a mutation and exits with 1 if one went unnoticed. Works on a copy of the tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import SUITES

ROOT = Path(__file__).resolve().parents[2]


def copy_of(root: Path, tree: Path) -> Path:
    """A copy of the repository at `root` in `tree`, whose package has the copy's Triton kernels."""
    shutil.copytree(
        root,
        tree,
        symlinks=True,
        ignore=shutil.ignore_patterns(".git", ".venv", "smollm2*", "__pycache__"),
    )
    link = tree / "qkernels" / "triton_kernels"
    link.unlink(missing_ok=True)
    link.symlink_to("../triton_kernels")
    return tree


def survives(tree: Path, file: str, old: str, new: str, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass with `old` replaced. ValueError if it is not there."""
    path = tree / file
    text = path.read_text()
    if old not in text:
        raise ValueError(f"{file}: {old!r} is not there: bring the list up to date")
    path.write_text(text.replace(old, new, 1))
    environment = {**os.environ, "PYTHONPATH": str(tree), "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n",
        os.environ.get("MUTATION_WORKERS", "2"),
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=900)
    finally:
        path.write_text(text)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutations whose file name contains this")
    parser.add_argument("--suite", help="those that tests with this in their name must notice")
    only, suite = (args := parser.parse_args()).only, args.suite or ""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of(ROOT, Path(folder) / "tree")
        for (file, old, new), tests in (
            (m, tests) for mutations, tests in SUITES for m in mutations
        ):
            if only in file and any(suite in test for test in tests):
                alive = survives(tree, file, old, new, tests)
                missed += alive
                print(f"{'MISSED' if alive else 'caught'}  {file}: {old}  ->  {new}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
