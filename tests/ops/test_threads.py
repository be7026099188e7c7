"""Layers shared by threads: one thread moves the weight to a kernel's layout, others compute."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels import layouts
from qkernels.backends import registry
from qkernels.backends.problem import Problem
from qkernels.backends.reference import run_reference
from qkernels.weights.experts import PackedExperts

from ..conftest import CASES, case_id, k_of, layout_of
from ..tiny import ids, tiny_model

THREADS = 8
#: one case of each way of storing weights that has a kernel layout
MOVING = list({name: (name, params) for name, params in CASES if layout_of(name, params)}.values())
moving = pytest.mark.parametrize(("name", "params"), MOVING, ids=map(case_id, MOVING))


def _together(work: Callable[[int], Any]) -> list[Any]:
    """work(0), work(1), ... in threads that start at the same moment; raises the first error."""
    start, results = threading.Barrier(THREADS), [None] * THREADS
    errors: list[BaseException] = []

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Threads switch after every few instructions, so that races happen."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def _any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel for each layout, instead of the real kernels.

    The real ones would need Triton's interpreter, which runs one kernel at a time.
    """

    def kernel(layout: str) -> registry.Kernel:
        def rejects(problem: Problem) -> str | None:
            expected = qk.formats.get(problem.format).kernel_layout(dict(problem.params))
            return None if expected == layout else "another layout"

        def run(x: Tensor, p: qk.PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
            assert p.layout == layout
            return run_reference(x, p, bias, problem)

        return registry.Kernel(f"cuda.{layout}", "cuda", layout, lambda: None, rejects, run)

    kinds = [kernel(layouts.WEIGHT_ONLY), kernel(layouts.EIGHT_BIT)]
    kinds.append(registry._KERNELS["reference.dequantize"])
    monkeypatch.setattr(registry, "_KERNELS", {kind.name: kind for kind in kinds})
    registry.choose.cache_clear()
    monkeypatch.setattr(registry.measured, "faster", lambda problem: None)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    registry.choose.cache_clear()


@moving
@pytest.mark.usefixtures("_any_kernel")
def test_the_first_calls_of_a_layer(name: str, params: dict[str, Any]) -> None:
    """All threads go through the same fresh layers, with and without autograd: equal results."""
    k = k_of(name, 64)
    p = qk.quantize(torch.randn(16, k), name, **params)
    x, bias = torch.randn(3, k), torch.randn(16)
    want = qk.matmul(x, p, bias, backend="reference")
    layers = [
        qk.QuantLinear(qk.pack(name, dict(p.tensors), p.shape, **p.params), bias) for _ in range(20)
    ]

    def work(i: int) -> list[Tensor]:
        outputs = []
        for layer in layers if i % 2 else reversed(layers):
            outputs.append(layer(x.clone().requires_grad_(i % 4 == 0)).detach())
            assert set(layer.state_dict()) == {*p.tensors, "bias"}
            layer.qweight  # noqa: B018  (PEFT reads it)
        return outputs

    for outputs in _together(work):
        for y in outputs:
            torch.testing.assert_close(y, want)
    for layer in layers:
        assert layer.packed.layout == layout_of(name, params)
        for key, tensor in layer.packed.tensors.items():
            assert torch.equal(
                tensor.reshape(-1).view(torch.uint8), p.tensors[key].reshape(-1).view(torch.uint8)
            )


def test_a_models_prepack() -> None:
    """Only the move to the layout of the real kernels; nothing is computed."""
    pytest.importorskip("triton")
    base = qk.quantize(torch.randn(32, 64), "gptq", group_size=32)
    want = base.dequantize()
    weights = [qk.pack("gptq", dict(base.tensors), base.shape, **base.params) for _ in range(100)]
    model = nn.ModuleList([qk.QuantLinear(p, backend="triton") for p in weights])
    x = torch.randn(4, 64).half()
    _together(lambda i: [layer.prepack(x) for layer in model])
    for layer in model:
        assert layer.packed.layout == layouts.WEIGHT_ONLY
        assert torch.equal(layer.packed.dequantize(), want)


@pytest.mark.usefixtures("_any_kernel")
def test_one_weight_of_several_layers() -> None:
    p = qk.quantize(torch.randn(16, 64), "nf4")
    x = torch.randn(3, 64)
    want = qk.matmul(x, p, backend="reference")
    layers = [qk.QuantLinear(p) for _ in range(THREADS)]
    for y in _together(lambda i: (layers[i](x), qk.matmul(x, p))):
        torch.testing.assert_close(y[0], want)
        torch.testing.assert_close(y[1], want)


def test_experts() -> None:
    weight = torch.randn(3, 16, 64)
    want = [p.dequantize() for p in qk.quantize_experts(weight, "gptq", group_size=32)]
    for _ in range(10):
        experts = qk.quantize_experts(weight, "gptq", group_size=32)

        def work(i: int, experts: PackedExperts = experts) -> list[Tensor]:
            if i % 2:
                experts.prepack()
            return [p.dequantize() for p in experts]

        for found in _together(work):
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert experts.layout == layouts.WEIGHT_ONLY


@pytest.mark.usefixtures("_any_kernel")
def test_a_model_with_fused_norms() -> None:
    """A norm delivers its products to the readers of the same thread."""
    model = tiny_model()
    qk.quantize_model(model, "w8a8", progress=False)
    tokens = [ids(9, seed)[None] for seed in range(THREADS)]
    assert qk.fuse_norms(model).fused
    with torch.no_grad():
        want = [model(t).logits for t in tokens]

    def work(i: int) -> list[Tensor]:
        with torch.no_grad():
            return [model(tokens[i]).logits for _ in range(5)]

    for outputs, expected in zip(_together(work), want, strict=True):
        assert all(torch.equal(y, expected) for y in outputs)
