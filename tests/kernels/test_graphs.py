"""torch.compile without a graph break; no allocation that depends on the data. CUDA graphs:
tests/gpu.
"""

from __future__ import annotations

import copy

import pytest
import torch

import qkernels as qk

from ..conftest import DEVICE, k_of

pytest.importorskip("triton")
from .instances import cases_by_launch


def layer_of(name: str, params: dict[str, object], k: int = 192) -> qk.QuantLinear:
    p = qk.quantize(torch.randn(40, k_of(name, k)), name, **params)
    return qk.QuantLinear(p, torch.randn(40), backend="triton").to(DEVICE)


@cases_by_launch
def test_compiles_whole_and_equals_eager(name: str, params: dict[str, object]) -> None:
    x = torch.randn(3, k_of(name, 192)).half().to(DEVICE)
    layer = layer_of(name, params).prepack(x)
    torch._dynamo.reset()  # every case is another specialization of the same forward
    compiled = torch.compile(
        copy.deepcopy(layer), fullgraph=True, backend="aot_eager", dynamic=True
    )
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x[:2]), layer(x[:2]))


@cases_by_launch
def test_allocations_do_not_depend_on_the_data(
    name: str, params: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(name, params, k=576)
    calm = torch.randn(5, k_of(name, 576)).half().to(DEVICE)
    wild = calm.clone()
    wild[:, ::3] *= 20  # outliers, for LLM.int8()
    for _ in range(3):  # the plan is kept
        layer(calm)
    sizes: list[tuple[object, ...]] = []
    real = torch.empty

    def record(*args: object, **kwargs: object) -> torch.Tensor:
        made = real(*args, **kwargs)
        sizes.append((tuple(made.shape), made.dtype))
        return made

    monkeypatch.setattr(torch, "empty", record)
    layer(calm)
    first = list(sizes)
    sizes.clear()
    layer(wild)
    assert first == sizes
    assert first, "nothing was allocated, not even the output: the recorder is blind"
    weight = layer.packed.shape[0] * layer.packed.shape[1]
    assert all(torch.Size(shape).numel() < weight for shape, _ in first), (
        "an allocation of weight size"
    )
