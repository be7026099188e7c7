"""Imports run downwards and in no circle, and no backend imports another.

Every import counts, also one inside a function and one for type checkers. `python -m
tests.test_imports` prints which room imports from which.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: rooms of the package; each may import from those before it. A room is a folder of qkernels/, or a
#: file directly in it
FLOORS = (
    "version", "tensors", "counters", "layouts", "formats", "weights", "backends", "ops", "nn",
    "checkpoints", "quantizers", "models", "benchmark", "integrations", "cli", "__init__",
    "__main__",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Dotted name -> file of each module of the package and of bench/."""
    files = [path for top in ("qkernels", "bench") for path in (ROOT / top).rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
        if "triton_kernels" not in path.parts
    }


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of `known` that a module imports, at its top or inside functions."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{module}.{alias.name}"
                # the Triton kernels are outside the package and import nothing from it
                if alias.name != "triton_kernels":
                    targets.add(target if target in known else module)
    return (targets & known.keys()) - {name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, path, known) for name, path in known.items()}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_imports_run_downwards(graph: dict[str, set[str]]) -> None:
    package = {name: targets for name, targets in graph.items() if name.startswith("qkernels")}
    assert {room(name) for name in package} == set(FLOORS)
    upwards = [
        f"{name} imports {target}"
        for name, targets in package.items()
        for target in targets
        if target.startswith("bench") or FLOORS.index(room(target)) > FLOORS.index(room(name))
    ]
    assert upwards == []


def test_no_backend_imports_another(graph: dict[str, set[str]]) -> None:
    for one, other in (("triton", "cuda"), ("cuda", "triton")):
        inside = [name for name in graph if name.startswith(f"qkernels.backends.{one}")]
        assert inside
        assert [
            n for n in inside for t in graph[n] if t.startswith(f"qkernels.backends.{other}")
        ] == []


def main() -> None:
    known = modules()
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, path in known.items():
        if name.startswith("qkernels"):
            rooms[room(name)] |= {room(target) for target in imported(name, path, known)}
    for floor in reversed(FLOORS):
        print(f"{floor:12}", *sorted(rooms[floor] - {floor}))


if __name__ == "__main__":
    main()
