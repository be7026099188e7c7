"""qk.matmul as an operator: opcheck, gradients, compile, operand checks, dispatch."""

from __future__ import annotations

import copy

import pytest
import torch

import qkernels as qk
from qkernels.backends import registry
from qkernels.ops import matmul as ops

from ..conftest import CASES, all_cases, k_of
from ..reference import ROUNDOFF, assert_fused_close, oracle

WEIGHT_ONLY = [
    c for c in CASES if c[0] not in ("int8", "w8a8") and c[1].get("activation", "none") == "none"
]


@all_cases
def test_opcheck(name: str, params: dict[str, object]) -> None:
    k = k_of(name, 192)
    p = qk.quantize(torch.randn(16, k), name, **params)
    x = torch.randn(3, k, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    args = (x, list(p.storage.values()), bias, ops.spec_of(p), "reference", False)
    checks = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    if name == "fp8":
        checks.remove("test_schema")  # compares inputs with allclose, which torch lacks for float8
    grad_args = (torch.randn(3, 16), args[1], args[3])
    torch.library.opcheck(torch.ops.qkernels.matmul.default, args, test_utils=checks)
    torch.library.opcheck(torch.ops.qkernels.grad_input.default, grad_args, test_utils=checks)


@all_cases
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_reference_shapes_dtypes_and_m_zero(
    name: str, params: dict[str, object], dtype: torch.dtype
) -> None:
    k = k_of(name, 192)
    p = qk.quantize(torch.randn(16, k), name, **params)
    bias = torch.randn(16).to(dtype)
    for lead in ((), (0,), (2, 0), (1,), (2, 3)):
        y = qk.matmul(torch.randn(*lead, k).to(dtype), p, bias)
        assert y.shape == (*lead, 16)
        assert y.dtype == dtype
        assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize(("name", "params"), WEIGHT_ONLY, ids=str)
def test_reference_is_the_oracle(name: str, params: dict[str, object]) -> None:
    k = k_of(name, 192)
    p = qk.quantize(torch.randn(24, k), name, **params)
    x, bias = torch.randn(5, k), torch.randn(24)
    want = oracle(x, p, bias)
    magnitude = x.double().abs() @ p.dequantize(torch.float64).abs().T + bias.double().abs()
    error = (qk.matmul(x, p, bias).double() - want).abs()
    # the rounding of a sum of K products in float32
    assert bool((error <= 200 * ROUNDOFF[torch.float32] * magnitude).all())
    exact = qk.matmul(x.double(), p, bias.double(), backend="reference")
    torch.testing.assert_close(exact, want, rtol=1e-12, atol=1e-12)


@all_cases
def test_gradients(name: str, params: dict[str, object]) -> None:
    k = k_of(name, 192)
    p = qk.quantize(torch.randn(16, k), name, **params)
    x = torch.randn(2, 3, k, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 16, dtype=torch.float64)
    qk.matmul(x, p, bias).backward(grad)
    torch.testing.assert_close(x.grad, grad @ p.dequantize(torch.float64))
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


def test_compiles_without_a_graph_break() -> None:
    layer = qk.QuantLinear(qk.quantize(torch.randn(16, 64), "nf4"), torch.randn(16))
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for m in (3, 7):
        x = torch.randn(m, 64)
        torch.testing.assert_close(compiled(x), layer(x))
    x = torch.randn(2, 64, requires_grad=True)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.packed.dequantize().sum(0).expand(2, 64))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.randn(3, 63), None, r"x: expected shape \(\.\.\., 64\) .* got \(3, 63\)"),
        (torch.tensor(1.0), None, r"x: expected shape"),
        (torch.ones(3, 64, dtype=torch.int32), None, "x: expected float16, .* got torch.int32"),
        (torch.randn(3, 64, device="meta"), None, "x: expected device cpu, the weight's, got meta"),
        ("x", None, "x: expected a torch.Tensor, got str"),
        (
            torch.randn(3, 64),
            torch.randn(15),
            r"bias: expected a floating tensor of shape \(16,\), got",
        ),
        (
            torch.randn(3, 64),
            torch.ones(16, dtype=torch.int32),
            r"bias: expected a floating tensor",
        ),
    ],
)
def test_bad_operands(x: torch.Tensor, bias: torch.Tensor | None, message: str) -> None:
    p = qk.quantize(torch.randn(16, 64), "nf4")
    with pytest.raises(ValueError, match=message):
        qk.matmul(x, p, bias)


# ---------------------------------------------------------------------- dispatch
def test_explain_says_what_runs_and_why_not_the_rest() -> None:
    p = qk.quantize(torch.randn(16, 64), "nf4")
    found = qk.explain(p, m=4)
    assert found.kernel == "reference.dequantize"
    text = str(found)
    assert "nf4 (16, 64), M=4, float16 on cpu" in text
    assert {name for name, _ in found.rejected} == {k.name for k in registry.kernels()} - {
        found.kernel
    }
    assert all(why for _, why in found.rejected)


def test_dense_runs_torch_linear_in_its_own_dtype_only() -> None:
    p = qk.quantize(torch.randn(16, 64), "bf16")
    assert qk.explain(p, dtype=torch.bfloat16).kernel == "torch.linear"
    assert qk.explain(p, dtype=torch.float16).kernel == "reference.dequantize"
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(qk.matmul(x, p), torch.nn.functional.linear(x, p.tensors["weight"]))


def test_asking_for_a_backend_without_a_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    p = qk.quantize(torch.randn(16, 64), "bf16")
    with pytest.raises(
        ValueError, match="triton.weight_only_gemm: bf16 .* is not in the weight-only family"
    ):
        qk.matmul(torch.randn(2, 64).half(), p, backend="triton")
    with pytest.raises(
        ValueError, match="backend: expected one of auto, reference, triton, cuda; got 'tpu'"
    ):
        qk.matmul(torch.randn(2, 64), p, backend="tpu")
    monkeypatch.setenv("QKERNELS_BACKEND", "triton")
    with pytest.raises(ValueError, match="bf16 .* is not in the eight-bit family"):
        qk.matmul(torch.randn(2, 64).half(), p)
    monkeypatch.setenv("QKERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="QKERNELS_BACKEND: expected one of"):
        qk.matmul(torch.randn(2, 64), p)


def test_backends_agree_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    p = qk.quantize(torch.randn(16, 64), "awq", group_size=32)
    x = torch.randn(2, 64).half()
    want = qk.matmul(x, p)
    assert p.layout == "checkpoint"
    monkeypatch.setenv("QKERNELS_BACKEND", "triton")
    assert_fused_close(qk.matmul(x, p), x, p)
    assert p.layout == "weight_only"
    monkeypatch.delenv("QKERNELS_BACKEND")
    assert torch.equal(qk.matmul(x, p), want)  # the reference reads the kernel layout too
