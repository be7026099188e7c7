"""bench.smoke notices each kind of fault, and survives a process that dies."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk
from bench import smoke, starts

RIGHT = qk.matmul


def checks(monkeypatch: pytest.MonkeyPatch, fault: Any) -> list[smoke.Check]:
    """The checks of NF4 if `fault` changes the kernel's result, but not the reference's."""

    def matmul(x: Tensor, p: qk.PackedWeight, backend: str = "auto", **kwargs: Any) -> Tensor:
        y = RIGHT(x, p, backend="reference")
        return y if backend == "reference" else fault(y)

    monkeypatch.setattr(smoke.qk, "matmul", matmul)
    return list(smoke.check("nf4", "triton", "cpu", tiny=True))


def test_a_right_kernel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checks(monkeypatch, lambda y: y)
    assert {one.check for one in found} == {"error", "repeat"}
    assert not any(one.failed for one in found)


def one_wrong(y: Tensor) -> Tensor:
    """Change a single output by a tenth of the outputs' usual size."""
    y = y.clone()
    y.view(-1)[7] += 0.1 * y.float().pow(2).mean().sqrt().to(y.dtype)
    return y


def unwritten(y: Tensor) -> Tensor:
    y = y.clone()
    y[-1, -1] = float("nan")
    return y


@pytest.mark.parametrize(
    "fault", [one_wrong, unwritten, lambda y: y * 1.05], ids=["one", "nan", "all"]
)
def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    found = checks(monkeypatch, fault)
    assert all(one.failed for one in found if one.check == "error")


def test_a_kernel_with_other_bits_now_and_then_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    found = checks(monkeypatch, lambda y: y * (1 + 2**-6) if next(calls) % 5 == 4 else y)
    assert any(one.failed for one in found if one.check == "repeat")
    assert not any(
        one.failed for one in found if one.check == "error" and "of its bound" not in one.failed
    )


def test_poisoned_memory_is_poisoned() -> None:
    with smoke.poisoned():
        assert bool(torch.empty(8).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_process_that_dies_takes_its_own_case_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process does the remaining cases."""
    started: list[list[tuple[str, str]]] = []

    class Worker:
        class process:  # noqa: N801
            @staticmethod
            def wait() -> int:
                return 1 if len(started) == 1 else 0

        def __init__(self, job: smoke.Job, module: str) -> None:
            started.append(list(job.cases))
            self.events: list[list[dict[str, Any]] | None] = [
                [{"begin": list(case)}, {"end": [*case, 0.0]}] for case in job.cases
            ] + [None]
            if len(started) == 1:
                self.events = [[{"begin": ["nf4", "cuda"]}], None]

        def lines(self, wait: float) -> list[dict[str, Any]] | None:
            return self.events.pop(0)

        def last_words(self) -> str:
            return "Segmentation fault"

        def kill(self) -> None:
            pass

    monkeypatch.setattr(smoke.supervisor, "Worker", Worker)
    share = smoke.Share([("nf4", "cuda"), ("q4_k", "cuda")], tiny=True)
    found, more = [], True
    while more:
        new, more = share.poll()
        found += new
    assert started == [[("nf4", "cuda"), ("q4_k", "cuda")], [("q4_k", "cuda")]]
    assert [(one.case, one.failed) for one in found] == [
        ("nf4", "the process died (1): Segmentation fault")
    ]
    lines = smoke.summary(
        [*found, smoke.Check("q4_k", "cuda", "", 1, "", "error", 0.5)], [("awq", "cuda")]
    )
    assert lines[0].startswith("FAILED cuda nf4, 1 of 1: ")
    assert "0.50 cuda q4_k" in lines
    assert lines[-1] == "no time was left for: cuda awq"


def test_nodes_of_a_graph_are_counted_by_kind(tmp_path: Path) -> None:
    """The driver's own calls count them; here a library answers in the place of libcuda."""
    source = """
    #include <stddef.h>
    static int kinds[3] = {0, 2, 0};
    int cuGraphGetNodes(void* graph, void** nodes, size_t* count) {
        if (graph != (void*)0x1234567890) return 400;
        if (nodes) for (int i = 0; i < 3; ++i) nodes[i] = &kinds[i];
        *count = 3;
        return 0;
    }
    int cuGraphNodeGetType(void* node, int* kind) { *kind = *(int*)node; return 0; }
    """
    library = tmp_path / "libcuda.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"],
        input=source.encode(),
        check=True,
    )
    assert starts.node_kinds(0x1234567890, str(library)) == [0, 2, 0]
    with pytest.raises(RuntimeError, match="cuGraphGetNodes: CUDA error 400"):
        starts.node_kinds(1, str(library))


def test_starting_late_is_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from qkernels.backends.device import supports_pdl
    from qkernels.backends.triton import launch

    monkeypatch.delenv("QKERNELS_PDL", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    supports_pdl.cache_clear()
    p, gpu = qk.quantize(torch.randn(64, 128), "nf4"), torch.device("cuda")
    p.plans["a plan"] = None
    assert launch.pdl(gpu)["PDL"]
    with starts.late(p):
        assert not launch.pdl(gpu)["PDL"]
        assert not p.plans
        p.plans["a late plan"] = None
    assert launch.pdl(gpu)["PDL"]
    assert not p.plans
    supports_pdl.cache_clear()
