"""A product allocates at most 32 MB besides its output. It computes the rows in slices for that,
with the same bits.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels as qk

from ..conftest import DEVICE, case_id, k_of

pytest.importorskip("triton")

from qkernels.backends import cuda, workspace
from qkernels.backends.cuda import eight_bit as cuda_eight_bit
from qkernels.backends.cuda import gemm as cuda_gemm
from qkernels.backends.cuda import hopper
from qkernels.backends.cuda import weight_only as cuda_decode
from qkernels.backends.problem import problem_of
from qkernels.backends.triton import eight_bit, weight_only

from .launches import Launches

#: every reason to copy x: gathers, transposed outliers, both, transforms of both kinds, 8-bit codes
COPYING: list[tuple[str, dict[str, object]]] = [
    ("gptq", {"group_size": 64, "act_order": True}),
    ("spqr", {}),
    ("spqr", {"checkpoint_format": "spqr_quant", "act_order": True}),
    ("quip", {"bits": 4}),
    ("quip_sharp", {"bits": 2}),
    ("w8a8", {}),
    ("int8", {}),
    ("fp8", {"granularity": "block", "activation": "dynamic"}),
]
copying = pytest.mark.parametrize(("name", "params"), COPYING, ids=map(case_id, COPYING))


class Peak(TorchDispatchMode):
    """Counts the bytes of living storages of tensors created under it; `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}  # address -> [bytes, tensors that use them]
        self.given: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.live:
                self.given.add(t.untyped_storage().data_ptr())
        made = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(made):
            if isinstance(t, Tensor) and t.numel():
                self._count(t)
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))
        return made

    def _count(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        at = storage.data_ptr()
        if at in self.given and at not in self.live:
            return
        self.live.setdefault(at, [storage.nbytes(), 0])[1] += 1
        weakref.finalize(t, self._drop, at)

    def _drop(self, at: int) -> None:
        self.live[at][1] -= 1
        if not self.live[at][1]:
            del self.live[at]


class NoKernels:
    """Stand-ins for the kernels of both backends: they count launches and compute nothing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.triton = Launches(patch)
        self.cuda: list[str] = []
        patch.setattr(cuda, "emulator", lambda name, *call: self.cuda.append(name) or "")

    def clear(self) -> None:
        self.triton.calls.clear()
        self.cuda.clear()

    def products(self) -> int:
        return self.triton.products() + sum(name != "quantize_rows" for name in self.cuda)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> NoKernels:
    return NoKernels(monkeypatch)


def extra_bytes(run: Any, p: qk.PackedWeight, m: int, invariant: bool) -> int:
    """The most bytes that `run` allocates at a time for M = m, without its output."""
    # It is never touched, so it takes no memory.
    x = torch.empty(m, p.shape[1], dtype=torch.float16, device=DEVICE)
    problem = problem_of(p, m, x.dtype, x.device, invariant)
    with Peak() as counted:
        y = run(x, p, None, problem)
    assert y.shape == (m, p.shape[0])
    assert counted.peak >= y.numel() * y.element_size()
    return counted.peak - y.numel() * y.element_size()


@pytest.fixture(scope="module")
def weights() -> dict[str, qk.PackedWeight]:
    made = {}
    for name, params in COPYING:
        p = qk.quantize(torch.randn(128, k_of(name, 512)), name, **params).to(DEVICE)
        made[case_id((name, params))] = p.prepack_(qk.formats.get(name).kernel_layout(p.params))
    return made


@copying
@pytest.mark.parametrize("invariant", [False, True])
def test_triton_stays_within_32_mb(
    name: str,
    params: dict[str, object],
    invariant: bool,
    weights: dict[str, qk.PackedWeight],
    no_kernels: NoKernels,
) -> None:
    p = weights[case_id((name, params))]
    run = eight_bit.run if p.layout == "eight_bit" else weight_only.run
    for m in (60, 1000, 70_000):
        no_kernels.clear()
        extra = extra_bytes(run, p, m, invariant)
        assert extra <= 32 * 2**20, f"M={m}: {extra / 2**20:.1f} MB"
    # The last x has 72 MB, so it cannot have been copied whole, and slices must have been copied.
    assert no_kernels.products() > 1
    assert extra >= 16 * 2**20


def cuda_kernels(name: str) -> list[str]:
    """The CUDA kernels that may copy x. The decode kernel takes many rows only in
    batch-invariant mode, and
    copies in its own loop.
    """
    if name in ("w8a8", "fp8", "int8"):
        return ["eight_bit"]
    return ["decode", "gemm", "hopper"] if name.startswith("quip") else ["gemm", "hopper"]


CUDA = [(*case, kernel) for case in COPYING for kernel in cuda_kernels(case[0])]
CUDA_RUN = {
    "eight_bit": cuda_eight_bit.run, "decode": cuda_decode.run, "gemm": cuda_gemm.run,
    "hopper": hopper.run,
}  # fmt: skip


@pytest.mark.parametrize(("name", "params", "kernel"), CUDA, ids=lambda part: str(part))
def test_cuda_stays_within_32_mb(
    name: str,
    params: dict[str, object],
    kernel: str,
    weights: dict[str, qk.PackedWeight],
    no_kernels: NoKernels,
) -> None:
    p = weights[case_id((name, params))]
    for m in (60, 1000, 70_000):
        no_kernels.clear()
        extra = extra_bytes(CUDA_RUN[kernel], p, m, kernel == "decode")
        assert extra <= 32 * 2**20, f"M={m}: {extra / 2**20:.1f} MB"
    assert no_kernels.products() > 1
    assert extra >= 16 * 2**20


@pytest.mark.parametrize("k", [1021, 1024])
def test_cuda_rows_that_are_no_whole_chunks(k: int, no_kernels: NoKernels) -> None:
    """Rows that need padding, and x at an odd address: the decode kernel's loop copies, too."""
    p = qk.quantize(torch.randn(64, k), "gptq", group_size=-1).prepack_("weight_only")
    m = 40_000
    x = torch.empty(m * k + 1, dtype=torch.float16)[1:].view(m, k)
    for run, invariant in ((cuda_gemm.run, False), (cuda_decode.run, True)):
        problem = problem_of(p, m, x.dtype, x.device, invariant)
        with Peak() as counted:
            y = run(x, p, None, problem)
        assert counted.peak - y.numel() * 2 <= 32 * 2**20


def test_the_count_sees_copies_and_their_end() -> None:
    x = torch.empty(1 << 20, dtype=torch.uint8)
    with Peak() as counted:
        x[:5].add_(1)
        assert counted.peak == 0
        a = x.clone()
        b = a[10:]
        del a
        c = torch.empty(1 << 20, dtype=torch.uint8)
        assert counted.peak == 2 << 20
        del b, c
        d = x.clone()
    assert counted.peak == 2 << 20
    assert sum(size for size, _ in counted.live.values()) == d.numel()


# ---------------------------------------------------------------------- the same bits
@copying
@pytest.mark.usefixtures("dots_in_one_order")
def test_slices_change_no_bit(
    name: str, params: dict[str, object], monkeypatch: pytest.MonkeyPatch, poisoned_outputs: None
) -> None:
    p = qk.quantize(torch.randn(24, k_of(name, 320)), name, **params).to(DEVICE)
    x = torch.randn(70, p.shape[1]).half().to(DEVICE)  # its last slice is of few rows
    bias = torch.randn(24).half().to(DEVICE)
    for invariant in (False, True):
        whole = qk.matmul(x, p, bias, backend="triton", batch_invariant=invariant)
        seen: list[int] = []
        real = workspace.slices

        def few(
            rows: int, row_bytes: int, fixed: int = 0, seen: Any = seen, real: Any = real
        ) -> list[slice]:
            parts = list(real(rows, row_bytes, fixed))
            seen.append(len(parts))
            return parts

        with monkeypatch.context() as patch:
            patch.setattr(workspace, "slices", few)
            patch.setattr(workspace, "BYTES", 33 * max(1, 32 * p.shape[1] // 16))
            p.plans.clear()  # kept plans have all rows at once
            for call in range(1 if invariant else 3):
                sliced = qk.matmul(x, p, bias, backend="triton", batch_invariant=invariant)
                assert max(seen, default=1) > 1, "one slice: this test compared nothing"
                assert torch.equal(sliced, whole), f"call {call}"
        p.plans.clear()


def test_k_slices_depend_on_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU so small that a slice of rows alone would get other K slices. The sums cancel, so
    that only their rounding is left.
    """
    weight, half = torch.randn(24, 512), torch.randn(70, 512)
    p = qk.quantize(torch.cat([weight, weight], 1), "spqr").to(DEVICE)
    x = torch.cat([half, -half], 1).bfloat16().to(DEVICE)
    monkeypatch.setattr(weight_only, "sm_count", lambda device: 1)
    whole = qk.matmul(x, p, backend="triton")
    assert bool(whole.any())
    monkeypatch.setattr(workspace, "BYTES", 33 * 2 * 1024)
    assert len(list(workspace.slices(70, 2 * 1024))) > 1
    assert torch.equal(qk.matmul(x, p, backend="triton"), whole)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 1000, 4096])
@pytest.mark.parametrize("size", [0, 1, 4096, 60_000, 300_000, 2**21, 2**30])
def test_slices_cover_all_rows_once(rows: int, size: int) -> None:
    found = list(workspace.slices(rows, size))
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(rows))
    assert all((s.stop - s.start) * size <= workspace.BYTES or s.stop - s.start == 1 for s in found)
    if len(found) > 1 and size < 100_000:
        assert all(s.start % 128 == 0 for s in found)
