"""The same row gives bitwise the same output whatever M it comes with, in batch-invariant mode."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk
from qkernels import dispatch

from ..conftest import CASES, DEVICE, case_id, k_of, layout_of

pytest.importorskip("triton")

QUANTIZED = [case for case in CASES if layout_of(*case) is not None]
#: where block size and shape class change, and odd ones between
ROWS = [1, 3, 16, 17, 33, 65, 129, 257]
if DEVICE == "cuda":
    ROWS = list(range(1, 301))  # the interpreter would take an hour over all of them


@pytest.mark.parametrize(("name", "params"), QUANTIZED, ids=map(case_id, QUANTIZED))
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rows_do_not_depend_on_m(name: str, params: dict[str, object], backend: str) -> None:
    n, k = 24, k_of(name, 576)
    p = qk.quantize(torch.randn(n, k), name, **params).to(DEVICE)
    x = torch.randn(300, k, dtype=torch.float32)
    x[::7, ::50] *= 8  # outliers, for LLM.int8(): in some rows only
    x = x.to(torch.float16 if backend == "triton" else torch.float32).to(DEVICE)
    full = qk.matmul(x, p, backend=backend, batch_invariant=True)
    for m in ROWS:
        part = qk.matmul(x[:m], p, backend=backend, batch_invariant=True)
        assert torch.equal(part, full[:m]), f"M={m}"
    one = qk.matmul(x[299:], p, backend=backend, batch_invariant=True)
    assert torch.equal(one, full[299:])


def test_split_and_sequential_shares_sum_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the workspace would be too large, one program does all shares, in the same order."""
    from qkernels.backends.triton import weight_only

    p = qk.quantize(torch.randn(40, 1000), "gptq", group_size=-1).to(DEVICE)
    x = torch.randn(20, 1000).half().to(DEVICE)
    split = qk.matmul(x, p, backend="triton", batch_invariant=True)
    calls = []
    real = weight_only.split_of
    monkeypatch.setattr(weight_only, "split_of", lambda *a: calls.append(real(*a)) or 1)
    assert torch.equal(qk.matmul(x, p, backend="triton", batch_invariant=True), split)
    assert calls[0] > 1, "the first call did not split K, so this test compared nothing"


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    p = qk.quantize(torch.randn(16, 64), "nf4")
    seen = []
    real = dispatch.select

    def spy(problem: dispatch.Problem, backend: str = "auto") -> dispatch.Kernel:
        seen.append(problem.batch_invariant)
        return real(problem, backend)

    monkeypatch.setattr(dispatch, "select", spy)
    x = torch.randn(2, 64)
    qk.matmul(x, p)
    monkeypatch.setenv("QKERNELS_BATCH_INVARIANT", "1")
    qk.matmul(x, p)
    qk.matmul(x, p, batch_invariant=False)
    monkeypatch.setenv("QKERNELS_BATCH_INVARIANT", "0")
    qk.QuantLinear(p, batch_invariant=True)(x)
    assert [seen[0], any(seen[1:3]), seen[-1]] == [False, True, True]
    monkeypatch.setenv("QKERNELS_BATCH_INVARIANT", "yes")
    with pytest.raises(ValueError, match="QKERNELS_BATCH_INVARIANT: expected 0 or 1, got 'yes'"):
        qk.matmul(x, p)


def test_dense_baseline_takes_the_invariant_path_too() -> None:
    p = qk.quantize(torch.randn(16, 64), "bf16").to(DEVICE)
    x = torch.randn(70, 64).bfloat16().to(DEVICE)
    full = qk.matmul(x, p, batch_invariant=True)
    assert torch.equal(qk.matmul(x[:1], p, batch_invariant=True), full[:1])
    assert qk.explain(p, 1, torch.bfloat16).kernel == "torch.linear"
    assert qk.explain(p, 1, torch.bfloat16, batch_invariant=True).kernel == "reference.dequantize"
