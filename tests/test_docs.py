"""The pages say what is so: paths, symbols, environment variables and the support matrix."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qkernels.cli import main
from qkernels.layouts.codecs import CODES, SCALES

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "csrc/README.md", "bench/README.md")
]
PAGES += sorted((ROOT / "docs").glob("*.md"))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FOLDERS = ("qkernels", "triton_kernels", "csrc", "tests", "bench", "tools", "docs", "examples")
#: `folder/file.py`, or `folder/file.py::symbol`
NAMED = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./]*)(?:::(\w+))?`")


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pages
def test_files_and_symbols_exist(page: Path) -> None:
    missing = []
    for name, symbol in NAMED.findall(page.read_text()):
        path = ROOT / name
        if not path.exists():
            missing.append(name)
        elif symbol and not re.search(rf"\b{symbol}\b", path.read_text()):
            missing.append(f"{name}::{symbol}")
    assert missing == []


def test_every_variable_is_on_its_page() -> None:
    """The page has a row for each QKERNELS_ variable that the code names, and no other."""
    files = [ROOT / "setup.py", *(f for name in FOLDERS for f in (ROOT / name).rglob("*.py"))]
    variable = re.compile(r"QKERNELS_[A-Z_]+[A-Z]")
    used = {name for file in files for name in variable.findall(file.read_text())}
    page = (ROOT / "docs/environment.md").read_text()
    rows = set(re.findall(r"^\| `(QKERNELS_\w+)` \|", page, flags=re.M))
    assert rows == used


def test_the_matrix_is_what_the_code_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") > 20
    assert printed in (ROOT / "docs/formats.md").read_text()


def test_the_page_of_kernels_lists_every_decoder_and_scaler() -> None:
    page = (ROOT / "docs/kernels.md").read_text()
    tables = page[page.index("| decoder |") : page.index("### Where each part is")]
    cells = re.findall(r"^\| (`[^|]*`) \|", tables, flags=re.M)
    listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert listed == {name for name, _ in CODES} | set(SCALES)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_example_of_a_new_format_runs(backend: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "examples/new_format.py", "--backend", backend], cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "e2m1_example (128, 256), M=4" in done.stdout
