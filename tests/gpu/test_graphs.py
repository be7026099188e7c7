"""CUDA graphs: no host sync, and a replay with new data equals an eager call."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk

from ..conftest import DEVICE
from ..kernels.test_graphs import fused_cases, layer_of


@fused_cases
@pytest.mark.parametrize("m", [1, 40])
def test_cuda_graph_replay(name: str, params: dict[str, object], m: int) -> None:
    group = int(params.get("group_size", 1))  # type: ignore[call-overload]
    k = 2048 - 2048 % max(group, 1)  # several shares of K, and whole groups
    layer = layer_of(name, params, k=k)
    x = torch.randn(m, layer.in_features, device=DEVICE).half()
    layer(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize(
    "case", [("awq", {}), ("q4_k", {}), ("fp8", {"activation": "dynamic"})], ids=str
)
@pytest.mark.parametrize("tokens", [1, 40])
def test_cuda_graph_of_experts(case: tuple[str, dict[str, object]], tokens: int) -> None:
    """The graph is captured with one routing and replayed with others."""
    gate_up, down = (
        qk.quantize_experts(torch.randn(8, *shape), case[0], **case[1]).to(DEVICE)
        for shape in ((1024, 512), (512, 512))
    )
    x = torch.randn(tokens, 512, device=DEVICE).half()
    ids = torch.zeros(tokens, 2, dtype=torch.int64, device=DEVICE)
    weights = torch.rand(tokens, 2, device=DEVICE)

    def layer() -> torch.Tensor:
        return qk.fused_moe(x, gate_up, down, weights, ids)

    layer()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        ids.copy_(torch.randint(-1, 8, ids.shape))
        graph.replay()
        assert torch.equal(y, layer())
