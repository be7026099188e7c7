"""The list of tests/mutations.py keeps up with the kernels: what it breaks is there. Running it takes hours."""

from __future__ import annotations

from .mutations import ROOT, SUITES


def test_what_is_broken_is_there() -> None:
    listed = [(file, old, new) for mutations, _ in SUITES for file, old, new in mutations]
    gone = [(file, old) for file, old, _ in listed if old not in (ROOT / file).read_text()]
    assert gone == []
    assert [m for m in listed if m[1] == m[2]] == []
    for _, tests in SUITES:
        assert [test for test in tests if not (ROOT / test).exists()] == []
