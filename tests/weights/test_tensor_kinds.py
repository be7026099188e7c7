"""Tensors that are not plain dense ones: refused by name, or taken for their numbers."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk

DENSE = torch.randn(16, 256)
ODD = {
    "sparse": DENSE.to_sparse(),
    "csr": DENSE.to_sparse_csr(),
    "nested": torch.nested.nested_tensor([DENSE[:2], DENSE[:3]]),
    "jagged": torch.nested.nested_tensor([DENSE[:2], DENSE[:3]], layout=torch.jagged),
    "quantized": torch.quantize_per_tensor(DENSE, 0.1, 0, torch.quint8),
    "complex": DENSE.to(torch.complex64),
    "list": DENSE.tolist(),
    "none": None,
}


@pytest.mark.parametrize("kind", [k for k in ODD if k != "none"])
def test_odd_tensors_are_refused(kind: str) -> None:
    odd, p = ODD[kind], qk.quantize(DENSE, "awq", group_size=32)
    for make, where in (
        (
            lambda: qk.pack("awq", {**p.tensors, "scales": odd}, p.shape, group_size=32),
            "awq: scales: expected",
        ),
        (lambda: qk.quantize(odd, "awq", group_size=32), "awq: weight: expected"),
        (lambda: qk.matmul(odd, p), "x: expected"),
        (lambda: qk.matmul(DENSE, p, odd), "bias: expected"),
        (lambda: qk.QuantLinear(p, odd), "bias: expected"),
    ):
        with pytest.raises(ValueError, match=where):
            make()


def test_a_plan_for_dense_operands_does_not_take_sparse_ones() -> None:
    p = qk.quantize(DENSE, "awq", group_size=32)
    x, bias = torch.randn(3, 256), torch.randn(16)
    qk.matmul(x, p, bias)
    for bad in ((x.to_sparse(), bias), (x, bias.to_sparse()), (x, 1.0)):
        with pytest.raises(ValueError, match="(x|bias): expected a (dense|floating) tensor"):
            qk.matmul(bad[0], p, bad[1])


@pytest.mark.parametrize("name", ["awq", "spqr", "quip", "int8", "q4_k"])
def test_meta(name: str) -> None:
    p = qk.quantize(DENSE, name)
    q = qk.pack(name, {k: t.to("meta") for k, t in p.tensors.items()}, p.shape, **p.params)
    assert (q.dequantize().shape, q.dequantize().device.type) == ((16, 256), "meta")
    y = qk.matmul(torch.empty(3, 256, device="meta"), q)
    assert (tuple(y.shape), y.device.type) == ((3, 16), "meta")
    with pytest.raises(ValueError, match=f"{name}: expected data to move to cpu"):
        q.to("cpu")
    with pytest.raises(ValueError, match="x: expected device meta"):
        qk.matmul(torch.randn(3, 256), q)


def test_subclasses_and_gradients_do_not_matter() -> None:
    class Lying(torch.Tensor):
        @property
        def shape(self) -> torch.Size:  # type: ignore[override]
            return torch.Size((8, 16))

    p = qk.quantize(DENSE, "awq", group_size=32)
    short = p.tensors["scales"][:4].clone()
    with pytest.raises(ValueError, match=r"awq: scales: expected shape \(8, 16\), got \(4, 16\)"):
        qk.pack("awq", {**p.tensors, "scales": short.as_subclass(Lying)}, p.shape, group_size=32)
    trained = torch.nn.Parameter(p.tensors["scales"])
    q = qk.pack("awq", {**p.tensors, "scales": trained}, p.shape, group_size=32)
    x = torch.randn(3, 256)
    y = qk.matmul(x, q)
    assert not y.requires_grad
    assert torch.equal(y, qk.matmul(x, p))
