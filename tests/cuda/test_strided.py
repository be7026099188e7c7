"""Stored tensors and operands with other memory layouts in the CUDA backend.

The emulator checks alignment.
"""

from __future__ import annotations

import pytest
import torch

import qkernels as qk

from ..conftest import case_id
from ..weights.test_strided import LAYS, again, behind, sliced, transposed

CASES = [
    ("gptq", {"group_size": 32, "act_order": True}),
    ("spqr", {"threshold": 0.02}),
    ("quip_sharp", {}),
    ("int8", {}),
    ("fp8", {"activation": "dynamic"}),
]


@pytest.mark.usefixtures("without_wgmma")
@pytest.mark.parametrize(("name", "params"), CASES, ids=map(case_id, CASES))
def test_the_product_is_that_of_the_numbers(name: str, params: dict[str, object]) -> None:
    p = qk.quantize(torch.randn(16, 256) * 0.1, name, **params)
    for m in (1, 20):
        x, bias = torch.randn(m, 256).half(), torch.randn(16)
        want = qk.matmul(x, p, bias, backend="cuda")
        for lay in (sliced, transposed, behind):
            assert torch.equal(qk.matmul(x, again(p, lay), bias, backend="cuda"), want)
            assert torch.equal(qk.matmul(lay(x), p, lay(bias), backend="cuda"), want)
        x = LAYS["expanded"](x)
        assert torch.equal(
            qk.matmul(x, p, bias, backend="cuda"), qk.matmul(x.clone(), p, bias, backend="cuda")
        )
