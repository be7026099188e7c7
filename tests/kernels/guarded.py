"""Runs every format's Triton kernels in memory that ends, or begins, at a page without access.

    python -m tests.kernels.guarded [end|begin|planted] [word of a case's name]

It is a separate program, because one byte too far kills it with SIGSEGV. Its last line then names
the product.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import triton
import triton.language as tl
from torch import Tensor

import qkernels as qk
from qkernels.backends.plan import SCRATCH, ZEROS, Symbolic
from qkernels.weights.packed import Snapshot

from ..conftest import CASES, case_id, layout_of

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_EMPTY = torch.empty
#: for each format, the first shape it takes. None has whole tiles of any format; 32 * 100 weights
#: are whole blocks, so the last block ends with the last weight
SHAPES = ((32, 100), (24, 104), (24, 192), (16, 256))
EXPERTS = [
    ("awq", {"group_size": 32}),
    ("nf4", {}),
    ("q8_0", {}),
    ("fp8", {"activation": "dynamic"}),
]


def guarded(shape: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> Tensor:
    """A tensor next to a page without access: after it with `at_end`, otherwise before it."""
    size = dtype.itemsize * torch.Size(shape).numel()
    pages = max(1, -(-size // PAGE))
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + (pages + 1) * PAGE):
        if _LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    if not size:
        return _EMPTY(shape, dtype=dtype)
    offset = PAGE * (pages + 1) - size if at_end else PAGE
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)
    return flat.fill_(0xA5).view(dtype).view(shape)


def moved(t: Tensor, at_end: bool) -> Tensor:
    return guarded(tuple(t.shape), t.dtype, at_end).copy_(t)


@contextmanager
def everywhere(at_end: bool) -> Iterator[None]:
    """Every allocation is guarded, too, and each part of a plan's scratch memory by itself."""
    real = torch.empty, torch.zeros, Symbolic.within
    parts: dict[tuple[int, ...], tuple[Any, Tensor]] = {}

    def within(self: Symbolic, memory: Sequence[Tensor | None]) -> Tensor:
        if self.base not in (SCRATCH, ZEROS):
            return real[2](self, memory)
        key = (id(memory), self.base, self.offset, self.nbytes)
        if key not in parts:  # `memory` stays alive, so that no other has its id
            parts[key] = memory, guarded((self.nbytes,), torch.uint8, at_end)
            if self.base == ZEROS:
                parts[key][1].zero_()
        return parts[key][1].view(self.dtype).view(self.shape)

    def empty(*size: Any, dtype: torch.dtype | None = None, **more: Any) -> Tensor:
        shape = tuple(size[0]) if size and not isinstance(size[0], int) else size
        device = torch.device(more.get("device") or "cpu")
        if device.type != "cpu":
            return real[0](*size, dtype=dtype, **more)
        return guarded(shape, dtype or torch.get_default_dtype(), at_end)

    torch.empty, torch.zeros = empty, lambda *size, **more: empty(*size, **more).zero_()  # type: ignore
    Symbolic.within = within  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.empty, torch.zeros, Symbolic.within = real  # type: ignore[method-assign]


def quantized(name: str, params: dict[str, object]) -> qk.PackedWeight:
    for shape in SHAPES:
        try:
            return qk.quantize(torch.randn(shape) * 0.1, name, **params)
        except ValueError:
            continue
    raise AssertionError(f"{name} {params}: none of {SHAPES}")


def run(name: str, params: dict[str, object], at_end: bool) -> None:
    p = quantized(name, params)
    p.prepack_(layout_of(name, params))
    storage = {key: moved(t, at_end) for key, t in p.storage.items()}
    q = qk.PackedWeight(p.format, p.shape, p.storage, p.params, p.layout)
    q.snapshot = Snapshot(p.layout, storage)
    # From 17 rows on, a separate kernel gathers x.
    m = 3 if at_end and not params.get("act_order") else 17
    x, bias = torch.randn(m, p.shape[1]).half(), torch.randn(p.shape[0]).half()
    want = qk.matmul(x, p, bias, backend="triton")
    with everywhere(at_end):
        got = qk.matmul(moved(x, at_end), q, moved(bias, at_end), backend="triton")
    assert torch.equal(got, want), f"{name} {params}: another product"


def run_experts(name: str, params: dict[str, object], at_end: bool) -> None:
    up, down = (
        qk.quantize_experts(torch.randn(3, *shape), name, **params).prepack()
        for shape in ((64, 96), (96, 32))
    )
    x, weights = torch.randn(5, 96).half(), torch.rand(5, 2)
    ids = torch.tensor([[0, 1], [2, 2], [1, -1], [0, 1], [2, 0]])
    want = qk.fused_moe(x, up, down, weights, ids, backend="triton")
    for stack in (up, down):
        layout, storage, sizes, spec = stack.snapshot
        lain = {key: moved(t, at_end) for key, t in storage.items()}
        stack.snapshot = type(stack.snapshot)(layout, lain, sizes, spec)
    with everywhere(at_end):
        got = qk.fused_moe(
            *(moved(x, at_end), up, down, moved(weights, at_end), moved(ids, at_end)),
            backend="triton",
        )
    assert torch.equal(got, want), f"experts of {name} {params}: another product"


@triton.jit
def _reads(ptr, out, N, BEYOND: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.load(ptr + i, mask=i < N + BEYOND, other=0), mask=i < N)


def planted(beyond: int) -> None:
    """Run a kernel that reads `beyond` elements beyond its tensor."""
    given, out = guarded((5,), torch.float16, True).fill_(1), torch.zeros(16).half()
    _reads[(1,)](given, out, 5, beyond)
    assert out.sum() == 5


def main() -> None:
    given = sys.argv[1:]
    where, word = given[0] if given else "end", given[1] if len(given) > 1 else ""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if where == "planted":
        for beyond in (0, 1):
            print(f"planted: {beyond} beyond", flush=True)
            planted(beyond)
        return
    at_end, count = where == "end", 0
    for kind, cases, function in (("", CASES, run), ("experts-", EXPERTS, run_experts)):
        for name, params in cases:
            label = kind + case_id((name, params))
            if word in label and layout_of(name, params) is not None:
                print(label, flush=True)
                function(name, params, at_end)
                count += 1
    print(f"{count} products", flush=True)


if __name__ == "__main__":
    main()
