"""Split-K in CUDA graphs: kernels alone, and counters that no other graph uses."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import qkernels as qk
from qkernels import counters
from qkernels.backends import cuda

from ..conftest import DEVICE

K = 8192  # of a weight of few rows, so that K is cut into many slices
cases = pytest.mark.parametrize(
    ("name", "params"), [("gptq", {"bits": 4, "group_size": 128}), ("w8a8", {})], ids=str
)
backends = pytest.mark.parametrize("backend", ["triton", "cuda"])
#: CUgraphNodeType
KERNEL = 0


def layer_of(name: str, params: dict[str, Any], backend: str) -> qk.QuantLinear:
    if backend == "cuda" and (why := cuda.unavailable()):
        pytest.skip(why)
    p = qk.quantize(torch.randn(256, K), name, **params)
    return qk.QuantLinear(p, backend=backend).to(DEVICE)


def node_types(graph: torch.cuda.CUDAGraph) -> list[int]:
    """The CUgraphNodeType of each node."""
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_size_t()
    driver.cuGraphGetNodes.argtypes = [ctypes.c_void_p] * 3
    driver.cuGraphNodeGetType.argtypes = [ctypes.c_void_p] * 2
    raw = graph.raw_cuda_graph()
    assert driver.cuGraphGetNodes(raw, None, ctypes.addressof(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert driver.cuGraphGetNodes(raw, ctypes.addressof(nodes), ctypes.addressof(count)) == 0
    found = []
    for node in nodes:
        kind = ctypes.c_int(-1)
        assert driver.cuGraphNodeGetType(node, ctypes.addressof(kind)) == 0
        found.append(kind.value)
    return found


@backends
@cases
def test_a_captured_product_is_kernels_alone(
    name: str, params: dict[str, Any], backend: str
) -> None:
    layer, x = layer_of(name, params, backend), torch.randn(1, K, device=DEVICE).half()
    layer(x)
    torch.cuda.synchronize()
    used = counters._arenas[x.device].used
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        y = layer(x)
    assert counters._arenas[x.device].used > used, "no split-K, or counters of eager calls"
    kinds = node_types(graph)
    assert kinds
    assert set(kinds) == {KERNEL}
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, layer(x))


@backends
@cases
def test_graphs_of_one_weight_on_two_streams(
    name: str, params: dict[str, Any], backend: str
) -> None:
    """Both are captured on torch's one stream for captures, and run at the same time."""
    layer = layer_of(name, params, backend)
    inputs = [torch.randn(1, K, device=DEVICE).half() for _ in range(2)]
    want = [layer(x) for x in inputs]
    graphs, results = [], []
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([layer(x) for _ in range(50)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for ys in results:
            for y in ys:
                y.zero_()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = [layer(x) for x in inputs]  # at the same time, on the default stream
        torch.cuda.synchronize()
        for x_want, ys, now in zip(want, results, eager, strict=True):
            assert all(torch.equal(y, x_want) for y in [*ys, now])
    assert not any(bool(region.any()) for region, _ in counters._regions.values())


@cases
@pytest.mark.parametrize("reserved", [False, True])
def test_reduce_overhead(
    name: str, params: dict[str, Any], reserved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of ours stays in the memory pool of torch.compile's graphs, which it refuses."""
    layer, x = layer_of(name, params, "triton"), torch.randn(1, K, device=DEVICE).half()
    layer.prepack(x)
    if not reserved:  # as if the weight had come to the GPU in a way that we do not see
        monkeypatch.setattr(counters, "_arenas", {})
        monkeypatch.setattr(counters, "_regions", {})
    torch._dynamo.reset()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(5):
            x.copy_(torch.randn_like(x))
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x).clone()
            assert torch.equal(y, layer(x))


def test_which_capture() -> None:
    """The driver tells a capture from another, and from none."""
    stream, numbers = torch.cuda.Stream(), []
    for _ in range(2):
        assert counters.capture_of(stream.cuda_stream) == 0
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            ones = torch.ones(1, device=DEVICE)
            assert counters.stream_of(ones.device) == stream.cuda_stream
            numbers.append(counters.capture_of(stream.cuda_stream))
    assert numbers[0] != numbers[1]
    assert all(number > 0 for number in numbers)
