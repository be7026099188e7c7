"""Tensors that are not contiguous in memory: products depend on their numbers alone."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels.weights.experts import PackedExperts

from ..conftest import CASES, all_cases, case_id, k_of, layout_of

FUSED = [case for case in CASES if layout_of(*case) is not None]


def sliced(t: Tensor) -> Tensor:
    """A view of every second number in each dimension of a larger tensor."""
    between = torch.full(
        [2 * size + 1 for size in t.shape], 77, dtype=torch.float32, device=t.device
    )
    return between.to(t.dtype)[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def transposed(t: Tensor) -> Tensor:
    backwards = tuple(reversed(range(t.dim())))
    return t.permute(backwards).contiguous().permute(backwards)


def behind(t: Tensor) -> Tensor:
    """A copy whose address is a multiple of its element's size and of nothing larger."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """A tensor of equal numbers as one number in memory, expanded."""
    return t.reshape(-1)[:1].clone().view([1] * t.dim()).expand(t.shape)


def again(p: qk.PackedWeight, lay: Callable[[Tensor], Tensor]) -> qk.PackedWeight:
    return qk.pack(p.format, {k: lay(v) for k, v in p.tensors.items()}, p.shape, **p.params)


def bits_of(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {k: t.contiguous().reshape(-1).view(torch.uint8).tolist() for k, t in tensors.items()}


def check(p: qk.PackedWeight, *others: qk.PackedWeight) -> None:
    """`others` are p with other strides: products, storage and tensors have the same bits.

    Kernels are slow here, so only the tensors that they would read are compared; `test_kernels`
    runs some.
    """
    x = torch.randn(5, p.shape[1]).half()
    want = qk.matmul(x, p, backend="reference")
    assert torch.isfinite(want).all()
    for q in others:
        assert torch.equal(qk.matmul(x, q, backend="reference"), want)
        assert torch.equal(q.dequantize(), p.dequantize())
    stored = bits_of(p.tensors)
    if (layout := layout_of(p.format, p.params)) is not None:
        for weight in (p, *others):
            weight.prepack_(layout)
    for q in others:
        assert bits_of(q.storage) == bits_of(p.storage)
        assert bits_of(q.tensors) == stored
        for name, tensor in q.storage.items():
            assert tensor.is_contiguous(), name
            assert layout is None or tensor.data_ptr() % 16 == 0, name
            assert tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size(), name


@all_cases
def test_stored_tensors(name: str, params: dict[str, object]) -> None:
    p = qk.quantize(torch.randn(16, k_of(name, 256)) * 0.1, name, **params)
    file = io.BytesIO()
    torch.save(again(p, sliced), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False).to("cpu")
    check(p, loaded, again(p, transposed), again(p, behind), again(p, sliced))


@all_cases
def test_expanded_stored_tensors(name: str, params: dict[str, object]) -> None:
    """Each tensor that a valid weight can have of equal numbers, all of them at once."""
    p = qk.quantize(torch.randn(16, k_of(name, 256)) * 0.1, name, **params)
    tensors, once = dict(p.tensors), {}
    for key, tensor in p.tensors.items():
        if tensor.numel() < 2:
            continue
        # 0x1a bytes are a small number as float16; 1 and 0 are for tensors where those would be an
        # invalid sparse weight or order of columns
        alike = int.from_bytes(b"\x1a" * tensor.element_size(), "little")
        for value in [0.01] if tensor.is_floating_point() else [alike, 1, 0]:
            filled = {
                **tensors,
                key: torch.full_like(tensor, value, memory_format=torch.contiguous_format),
            }
            try:
                weight = qk.pack(name, filled, p.shape, **p.params).dequantize()
            except ValueError:
                continue
            if weight.abs().max() < 100:
                tensors, once[key] = filled, expanded(filled[key])
                break
    assert once
    want = qk.pack(name, tensors, p.shape, **p.params)
    check(want, qk.pack(name, {**tensors, **once}, p.shape, **p.params))


KERNELS = [
    ("gptq", {"group_size": 32, "act_order": True}),
    ("nf4", {"block_size": 32, "double_quant": True}),
    ("spqr", {"threshold": 0.01}),
    ("quip", {}),
    ("quip_sharp", {}),
    ("w8a8", {"activation": "static", "input_scale": 0.03, "input_zero_point": -7}),
    ("fp8", {"granularity": "block", "activation": "dynamic"}),
    ("q4_k", {}),
]


@pytest.mark.parametrize(("name", "params"), KERNELS, ids=map(case_id, KERNELS))
def test_kernels(name: str, params: dict[str, object]) -> None:
    """Each tensor by itself, sliced."""
    p = qk.quantize(torch.randn(16, 256) * 0.1, name, **params)
    tensors, x = p.tensors, torch.randn(2, 256).half()
    want = qk.matmul(x, p, backend="triton")
    for key, tensor in tensors.items():
        q = qk.pack(name, {**tensors, key: sliced(tensor)}, p.shape, **p.params)
        assert torch.equal(qk.matmul(x, q, backend="triton"), want), key


@pytest.mark.parametrize("key", ["SU", "SV"])
def test_an_expanded_scale_is_not_read_beyond_its_memory(key: str) -> None:
    p = qk.quantize(torch.randn(16, 256) * 0.1, "quip_sharp")
    alike = torch.ones_like(p.tensors[key])
    want, got = (
        qk.pack("quip_sharp", {**p.tensors, key: scale}, p.shape, **p.params)
        for scale in (alike, expanded(alike))
    )
    x = torch.randn(3, 256).half()
    assert torch.equal(qk.matmul(x, got, backend="triton"), qk.matmul(x, want, backend="triton"))


# ---------------------------------------------------------------------- operands
LAYS = {
    "sliced": sliced,
    "transposed": transposed,
    "behind": behind,
    "expanded": lambda t: t[:1].clone().expand(t.shape),
    "negated when it is read": lambda t: torch._neg_view(-t),
}
OPERANDS = [
    ("bf16", {}),
    ("gptq", {"group_size": 32, "act_order": True}),
    ("spqr", {}),
    ("int8", {}),
    ("fp8", {"activation": "dynamic"}),
]


@pytest.mark.parametrize("lay", LAYS)
@pytest.mark.parametrize(("name", "params"), OPERANDS, ids=map(case_id, OPERANDS))
def test_x_and_bias(name: str, params: dict[str, object], lay: str) -> None:
    p = qk.quantize(torch.randn(16, 256) * 0.1, name, **params)
    for backend, dtype, invariant in (
        ("reference", torch.float32, False),
        ("reference", torch.float64, True),
        *(
            [("triton", torch.bfloat16, False), ("triton", torch.float16, True)]
            if name != "bf16"
            else []
        ),
    ):
        x, bias = LAYS[lay](torch.randn(3, 256, dtype=dtype)), LAYS[lay](torch.randn(16))
        more = {"backend": backend, "batch_invariant": invariant}
        plain_x, plain_bias = (
            t.resolve_neg().clone(memory_format=torch.contiguous_format) for t in (x, bias)
        )
        want = qk.matmul(plain_x, p, plain_bias, **more)
        assert torch.equal(qk.matmul(x, p, bias, **more), want)
        assert torch.equal(qk.matmul(x[None, :, None], p, bias, **more)[0, :, 0], want)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("lay", [*LAYS])
def test_experts(backend: str, lay: str) -> None:
    """Operands, each expert's tensors, and the tensors of a stack."""
    parts = [qk.quantize(torch.randn(32, 64) * 0.1, "awq", group_size=32) for _ in range(3)]
    experts = PackedExperts(parts)
    down = qk.quantize_experts(torch.randn(3, 64, 16), "gptq", group_size=16)
    x, ids = torch.randn(4, 64).half(), torch.tensor([[0, 1], [2, 2], [1, 2], [0, 1]])
    weights = torch.rand(4, 2)
    x, weights = (LAYS[lay](t).resolve_neg() for t in (x, weights))  # as plain tensors would be
    ids = ids if lay.startswith("neg") else LAYS[lay](ids)
    plain = [t.clone(memory_format=torch.contiguous_format) for t in (x, weights, ids)]
    want = qk.fused_moe(plain[0], experts, down, *plain[1:], backend=backend)
    assert torch.isfinite(want).all()
    assert torch.equal(qk.fused_moe(x, experts, down, weights, ids, backend=backend), want)
    again_experts = PackedExperts([again(p, sliced) for p in parts])
    assert torch.equal(qk.fused_moe(x, again_experts, down, weights, ids, backend=backend), want)
    for stack in (experts, down):  # in their current layout
        lain = [sliced(t) for t in stack.storage.values()]
        stack = PackedExperts._restored(stack.spec, lain, 0)
        assert all(t.is_contiguous() for t in stack.storage.values())
    spec, storage = down.spec, [sliced(t) for t in down.storage.values()]
    for _ in range(3):  # a kept plan must not have the addresses of a call's copies
        y = torch.ops.qkernels.fused_moe(
            x,
            list(experts.storage.values()),
            storage,
            weights,
            ids,
            experts.spec,
            spec,
            "silu",
            backend,
            False,
        )
        assert torch.equal(y, want)


def test_operators_keep_nothing_of_copies() -> None:
    """An operator given strided tensors computes with copies, which are gone after the call."""
    from qkernels.ops import matmul as ops
    from qkernels.ops import operator_plans

    p = qk.quantize(torch.randn(16, 256) * 0.1, "quip_sharp").prepack_("weight_only")
    x = torch.randn(5, 256).half()
    want = qk.matmul(x, p, backend="triton")
    storage = [sliced(t) for t in p.storage.values()]
    before = len(operator_plans._PLANS)
    for _ in range(3):
        y = torch.ops.qkernels.matmul(x, storage, None, ops.spec_of(p), "triton", False)
        assert torch.equal(y, want)
    assert len(operator_plans._PLANS) == before


def test_layers_whose_buffers_are_replaced() -> None:
    layer = qk.QuantLinear(qk.quantize(torch.randn(16, 256), "spqr"), backend="triton")
    x = torch.randn(3, 256).half()
    want = layer(x)
    for key, buffer in list(layer._buffers.items()):
        layer._buffers[key] = sliced(buffer)
    assert torch.equal(layer(x), want)


def test_memory_smaller_than_the_shape_says() -> None:
    tensors = dict(qk.quantize(torch.randn(16, 256), "awq", group_size=32).tensors)
    tensors["scales"].untyped_storage().resize_(2)
    with pytest.raises(ValueError, match=r"awq: scales: expected memory of 256 bytes, got 2"):
        qk.pack("awq", tensors, (16, 256), group_size=32)
