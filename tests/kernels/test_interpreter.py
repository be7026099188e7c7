"""tests/interpreter.py makes triton's interpreter faster; kernels compute the same bits with it."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk

pytest.importorskip("triton")
from triton.runtime import interpreter

from ..interpreter import REPLACED

pytestmark = pytest.mark.skipif(not REPLACED, reason="triton's own interpreter, or none, runs here")


@pytest.mark.parametrize(
    ("name", "params"), [("q4_k", {}), ("int8", {}), ("quip_sharp", {"bits": 3})], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_same_bits(
    name: str, params: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = qk.quantize(torch.randn(40, 256), name, **params)
    x = torch.randn(5, 256).to(dtype)
    x[0, 3] = 20  # an outlier, for LLM.int8()
    y = qk.matmul(x, p, backend="triton")
    for attribute, theirs in REPLACED.items():
        monkeypatch.setattr(interpreter, attribute, theirs)
    p.plans.clear()
    assert torch.equal(qk.matmul(x, p, backend="triton"), y)


def test_language_is_as_before_after_a_launch() -> None:
    import triton.language as tl

    before = {name: getattr(tl, name) for name in ("load", "dot", "range", "static_range")}
    qk.matmul(torch.randn(1, 64).half(), qk.quantize(torch.randn(8, 64), "nf4"), backend="triton")
    assert {name: getattr(tl, name) for name in before} == before
