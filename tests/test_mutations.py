"""The snippets in tools/mutations.py exist in the sources. Running the mutations takes hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.mutations import SUITES
from tools.mutations.__main__ import ROOT, copy_of


def test_what_is_broken_is_there() -> None:
    listed = [(file, old, new) for mutations, _ in SUITES for file, old, new in mutations]
    gone = [(file, old) for file, old, _ in listed if old not in (ROOT / file).read_text()]
    assert gone == []
    assert [m for m in listed if m[1] == m[2]] == []
    for _, tests in SUITES:
        assert [test for test in tests if not (ROOT / test).exists()] == []


@pytest.mark.parametrize("link", ["", "../triton_kernels", "absolute"])
def test_the_kernels_that_are_broken_are_those_that_run(tmp_path: Path, link: str) -> None:
    """Whether the repository has no link to the kernels, a relative or an absolute one."""
    (root := tmp_path / "root").mkdir()
    for folder in ("qkernels", "triton_kernels"):
        (root / folder).mkdir()
    (root / "triton_kernels" / "experts.py").write_text("sound")
    if link:
        (root / "qkernels" / "triton_kernels").symlink_to(
            root / "triton_kernels" if link == "absolute" else link
        )
    tree = copy_of(root, tmp_path / "tree")
    (tree / "triton_kernels" / "experts.py").write_text("broken")
    assert (tree / "qkernels" / "triton_kernels" / "experts.py").read_text() == "broken"
    assert (root / "triton_kernels" / "experts.py").read_text() == "sound"
