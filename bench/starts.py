"""Examine how the kernels of a product start: nodes of its CUDA graph, with PDL or without."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import qkernels as qk
from qkernels.backends.device import supports_pdl

#: CU_GRAPH_NODE_TYPE_KERNEL
KERNEL = 0


def node_kinds(graph: int, driver: str = "libcuda.so.1") -> list[int]:
    """CUgraphNodeType of each node of a graph, from the driver's library. graph: its address."""
    library = ctypes.CDLL(driver)

    def call(name: str, *arguments: Any) -> None:
        if code := getattr(library, name)(*arguments):
            raise RuntimeError(f"{name}: CUDA error {code}")

    count, address = ctypes.c_size_t(), ctypes.c_void_p(graph)
    call("cuGraphGetNodes", address, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    call("cuGraphGetNodes", address, nodes, ctypes.byref(count))
    kinds = (ctypes.c_int * count.value)()
    for number, node in enumerate(nodes):
        call(
            "cuGraphNodeGetType",
            ctypes.c_void_p(node),
            ctypes.byref(kinds, number * ctypes.sizeof(ctypes.c_int)),
        )
    return list(kinds)


@contextmanager
def late(p: qk.PackedWeight) -> Iterator[None]:
    """Within the context, Triton kernels of `p` start without PDL: after the kernel before ends."""

    def forget() -> None:
        supports_pdl.cache_clear()
        p.plans.clear()

    with mock.patch.dict(os.environ, QKERNELS_PDL="0"):
        forget()
        try:
            yield
        finally:
            forget()
