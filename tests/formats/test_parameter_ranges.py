"""Parameters that no kernel takes are refused by name; numbers of other types are accepted."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk
from qkernels import formats

from ..conftest import layout_of

PARAMETERS = [
    (name, key, default)
    for name in formats.names()
    for key, default in {**formats.get(name).defaults, **formats.get(name).quantize_only}.items()
    if default is not None
]
BAD = {
    int: (10**30, -(10**30), 2**63, 2**31, -(2**31) - 1, 1.0, True, None, "4", [4], float("nan")),
    float: (10**400, -(10**400), 1e39, -1e39, float("inf"), float("nan"), True, None, "1", [1.0]),
    bool: (0, 1, None, "yes", 1.0),
    str: (0, None, b"auto", True, 10**30),
}


@pytest.mark.parametrize(("name", "key", "default"), PARAMETERS)
def test_values_of_no_use(name: str, key: str, default: object) -> None:
    weight = torch.randn(16, 256)
    tensors = qk.quantize(weight, name).tensors
    for value in BAD[type(default)]:
        with pytest.raises(ValueError, match=f"{name}: .*{key}: expected"):
            qk.quantize(weight, name, **{key: value})
        if key in formats.get(name).defaults:
            with pytest.raises(ValueError, match=f"{key}.*: expected"):
                qk.pack(name, tensors, (16, 256), **{key: value})


@pytest.mark.parametrize("threshold", [10**30, 2**63, 10**9, 0, 6, 3e38])
def test_thresholds_are_floats(threshold: float) -> None:
    p = qk.quantize(torch.randn(16, 64), "int8", threshold=threshold)
    assert type(p.params["threshold"]) is float
    x = torch.randn(3, 64).half() * 10
    want = qk.matmul(
        x, qk.quantize(p.dequantize(), "int8", threshold=float(threshold)), backend="reference"
    )
    if threshold > 1e5:  # nothing reaches it: as none at all
        want = qk.matmul(x, qk.pack("int8", p.tensors, p.shape, threshold=0), backend="reference")
        assert torch.equal(qk.matmul(x, p, backend="reference"), want)
    got = qk.matmul(x, p, backend="triton")
    torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=0.1)


def test_negative_thresholds() -> None:
    """LLM.int8() refuses them; for SpQR they mean that no weight is an outlier."""
    with pytest.raises(ValueError, match=r"int8: threshold: expected a number >= 0, got -0.5"):
        qk.quantize(torch.randn(16, 64), "int8", threshold=-0.5)
    assert qk.quantize(torch.randn(16, 64), "spqr", threshold=-1).tensors["col_vals"].numel() == 0


LARGE = 2**31 - 1
BLOCKS = [
    ("spqr", {}, {"row_group": 16}, {"row_group": LARGE}),
    *(
        (
            "fp8",
            {"granularity": "block", "activation": activation},
            {"block_rows": 16, "block_columns": 64},
            {"block_rows": LARGE, "block_columns": columns},
        )
        for activation, columns in (("none", LARGE - 15), ("none", LARGE), ("dynamic", LARGE))
    ),
]


@pytest.mark.parametrize(("name", "params", "same", "large"), BLOCKS)
def test_blocks_larger_than_the_weight(
    name: str, params: dict[str, object], same: dict[str, object], large: dict[str, object]
) -> None:
    """They take no memory for missing columns, and no integer of a kernel overflows."""
    weight, x = torch.randn(16, 64), torch.randn(3, 64).half()
    want, p = (qk.quantize(weight, name, **params, **more) for more in (same, large))
    for a, b in zip(p.tensors.values(), want.tensors.values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(p.dequantize(), want.dequantize())
    for backend in ("reference", "triton") if layout_of(name, p.params) else ("reference",):
        assert torch.equal(qk.matmul(x, p, backend=backend), qk.matmul(x, want, backend=backend))


@pytest.mark.parametrize(
    "shape", [(10**30, 256), (16, 2**63), (True, 256), (16, 0), (16,), (16, 256.0), (-1, 256)]
)
def test_shapes(shape: tuple[object, ...]) -> None:
    for name in formats.names():
        tensors = qk.quantize(torch.randn(16, 256), name).tensors
        with pytest.raises(ValueError, match=rf"{name}: .*expected"):
            qk.pack(name, tensors, shape)  # type: ignore[arg-type]
