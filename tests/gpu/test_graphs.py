"""CUDA graphs: no host sync, and a replay with new data equals an eager call."""

from __future__ import annotations

import pytest
import torch

from ..conftest import DEVICE
from ..kernels.test_graphs import fused_cases, layer_of


@fused_cases
@pytest.mark.parametrize("m", [1, 40])
def test_cuda_graph_replay(name: str, params: dict[str, object], m: int) -> None:
    layer = layer_of(name, params, k=2048)
    x = torch.randn(m, 2048, device=DEVICE).half()
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
