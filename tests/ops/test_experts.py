"""PackedExperts, grouped_matmul and fused_moe: the reference, the operators, bad input."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk

from ..conftest import CASES, case_id, k_of, layout_of


def oracle(x: Tensor, experts: qk.PackedExperts, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """float64, slot after slot; it shares only `dequantize` with the code that it checks."""
    y = torch.zeros(*ids.shape, experts.shape[0], dtype=torch.float64)
    weights = [experts.expert(e).dequantize(torch.float64) for e in range(experts.count)]
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if 0 <= (e := int(ids[t, j])) < experts.count:
                row = x[t] if x.dim() == 2 else x[t, j]
                y[t, j] = weights[e] @ row.double() + (0 if bias is None else bias[e].double())
    return y


IDS = torch.tensor([[2, 0], [-1, 2], [2, 3], [0, 2], [2, -7]])  # expert 1 has no token


# ---------------------------------------------------------------------- stacking
def same_bits(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def reloaded(experts: qk.PackedExperts) -> qk.PackedExperts:
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


#: QuIP's codebooks are slow to search, and the number of bits does not matter to a stack
STACKED = [case for case in CASES if case[0] not in ("quip", "quip_sharp") or case[1]["bits"] == 2]


@pytest.mark.parametrize(("name", "params"), STACKED, ids=map(case_id, STACKED))
def test_stacked_experts_are_the_experts(name: str, params: dict[str, Any]) -> None:
    k = k_of(name, 192)
    alone = [qk.quantize(w, name, **params) for w in torch.randn(3, 8, k)]
    experts = qk.PackedExperts(alone)
    check_products(experts)
    assert len(experts) == experts.count == 3
    assert experts.shape == (8, k)
    assert experts.nbytes == sum(p.nbytes for p in alone)

    def check(found: qk.PackedExperts) -> None:
        assert found.params == alone[0].params
        for e, p in enumerate(alone):
            mine = found.expert(e)
            assert mine.tensors.keys() == p.tensors.keys()
            for key, tensor in p.tensors.items():
                assert same_bits(mine.tensors[key], tensor), key
        assert found.state.keys() == {f"{e}.{key}" for e in range(3) for key in alone[0].tensors}

    check(experts)
    check(reloaded(experts))
    check(experts.to("cpu"))
    irregular = layout_of(name, params) == "weight_only" and name == "spqr"
    if layout_of(name, params) is None:
        with pytest.raises(ValueError, match=f"experts: {name} has no kernel layout"):
            experts.prepack()
    elif irregular:
        with pytest.raises(ValueError, match="outlier.col_vals: expected one size in all experts"):
            experts.prepack()
    else:
        before = experts.storage
        assert experts.prepack() is experts
        assert experts.layout == layout_of(name, params)
        assert experts.storage is not before
        check(experts)
        check(reloaded(experts))
        assert experts.nbytes == sum(p.nbytes for p in alone)


def check_products(experts: qk.PackedExperts) -> None:
    """grouped_matmul is the format's own reference, row by row.

    It is also float64's product where activations are not quantized.
    """
    x = torch.randn(5, experts.shape[1], dtype=torch.float64)
    bias = torch.randn(3, 8, dtype=torch.float64)
    y = qk.grouped_matmul(x, experts, IDS, bias=bias, backend="reference")
    assert y.shape == (5, 2, 8)
    for e, p in enumerate(experts):
        rows = x[:, None].expand(-1, 2, -1)[IDS == e]
        want = qk.matmul(rows, p, bias[e], backend="reference")
        torch.testing.assert_close(y[IDS == e], want, rtol=1e-12, atol=1e-12)
    if layout_of(experts.format, experts.params) == "weight_only":
        torch.testing.assert_close(y, oracle(x, experts, IDS, bias), rtol=1e-6, atol=1e-6)
    assert not bool(y[(IDS < 0) | (IDS > 2)].any())


def test_quantize_experts_quantizes_each() -> None:
    weight = torch.randn(3, 16, 64)
    experts = qk.quantize_experts(weight, "nf4", block_size=32, double_quant=True)
    for mine, w in zip(experts, weight, strict=True):
        alone = qk.quantize(w, "nf4", block_size=32, double_quant=True)
        assert all(same_bits(mine.tensors[key], tensor) for key, tensor in alone.tensors.items())


def test_experts_are_views_and_of_one_kind() -> None:
    experts = qk.quantize_experts(torch.randn(3, 16, 64), "awq", group_size=32)
    view = experts.expert(1).storage["qweight"]
    assert view.data_ptr() == experts.storage["qweight"][1].data_ptr()
    for e in (-1, 3):
        with pytest.raises(ValueError, match=f"expert: expected 0..2, got {e}"):
            experts.expert(e)
    awq = experts.expert(0)
    with pytest.raises(ValueError, match="at least one PackedWeight, got none"):
        qk.PackedExperts([])
    with pytest.raises(ValueError, match=r"experts\[1\]: expected a PackedWeight, got Tensor"):
        qk.PackedExperts([awq, torch.randn(16, 64)])
    for other, what in (
        (qk.quantize(torch.randn(16, 64), "nf4"), "format awq, .* got nf4"),
        (
            qk.quantize(torch.randn(24, 64), "awq", group_size=32),
            r"shape \(16, 64\), .* got \(24, 64\)",
        ),
        (qk.quantize(torch.randn(16, 64), "awq", group_size=64), "params .*32.* got .*64"),
    ):
        with pytest.raises(ValueError, match=rf"experts\[1\]: expected {what}"):
            qk.PackedExperts([awq, other])


@pytest.mark.parametrize("weight", [torch.randn(16, 64), torch.randn(0, 16, 64), [1]])
def test_quantize_wants_a_stack(weight: Any) -> None:
    with pytest.raises(
        ValueError, match=r"weight: expected a tensor of shape \(E, N, K\) with E >= 1, got"
    ):
        qk.quantize_experts(weight, "nf4")


# ---------------------------------------------------------------------- products
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_shapes_dtypes_and_no_tokens(dtype: torch.dtype) -> None:
    gate_up = qk.quantize_experts(torch.randn(4, 64, 32), "nf4", block_size=32)
    down = qk.quantize_experts(torch.randn(4, 24, 32), "nf4", block_size=32)
    for tokens, top_k in ((0, 2), (1, 1), (3, 4), (2, 0)):
        ids = torch.randint(0, 4, (tokens, top_k), dtype=torch.int32)
        weights = torch.rand(tokens, top_k)
        y = qk.grouped_matmul(torch.randn(tokens, 32).to(dtype), gate_up, ids, weights)
        assert (y.shape, y.dtype) == ((tokens, top_k, 64), dtype)
        y = qk.grouped_matmul(torch.randn(tokens, top_k, 32).to(dtype), gate_up, ids)
        assert (y.shape, y.dtype) == ((tokens, top_k, 64), dtype)
        z = qk.fused_moe(torch.randn(tokens, 32).to(dtype), gate_up, down, weights, ids)
        assert (z.shape, z.dtype) == ((tokens, 24), dtype)
        assert bool(torch.isfinite(z).all())


def test_layer_is_the_textbook_one() -> None:
    gate_up = qk.quantize_experts(torch.randn(3, 64, 32), "awq", group_size=32)
    down = qk.quantize_experts(torch.randn(3, 24, 32), "awq", group_size=32)
    x, weights = torch.randn(5, 32, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    for activation in ("silu", "gelu"):
        y = qk.fused_moe(x, gate_up, down, weights, IDS, activation)
        want = torch.zeros(5, 24, dtype=torch.float64)
        for t in range(5):
            for j in range(2):
                if 0 <= (e := int(IDS[t, j])) < 3:
                    gate, up = (gate_up.expert(e).dequantize(torch.float64) @ x[t]).chunk(2)
                    inner = getattr(torch.nn.functional, activation)(gate) * up
                    want[t] += weights[t, j] * (down.expert(e).dequantize(torch.float64) @ inner)
        torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)


def test_a_row_for_each_slot_and_weights() -> None:
    experts = qk.quantize_experts(torch.randn(3, 16, 32), "nf4")
    x = torch.randn(5, 2, 32, dtype=torch.float64)
    weights, bias = torch.rand(5, 2, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    y = qk.grouped_matmul(x, experts, IDS, weights, bias)
    want = oracle(x, experts, IDS, bias) * weights[..., None]
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    weights[IDS < 0] = float("nan")  # weights of experts of other processes
    assert bool(torch.isfinite(qk.grouped_matmul(x, experts, IDS, weights, bias)[IDS != 3]).all())


# ---------------------------------------------------------------------- operators
@pytest.mark.parametrize(
    ("name", "backend"), [("gptq", "reference"), ("nf4", "triton"), ("w8a8", "triton")]
)
def test_opcheck(name: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    params = {"group_size": 16} if name == "gptq" else {}
    gate_up = qk.quantize_experts(torch.randn(3, 64, 32), name, **params)
    down = qk.quantize_experts(torch.randn(3, 24, 32), name, **params)
    if backend == "triton":
        gate_up, down = gate_up.prepack(), down.prepack()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate_up, down = gate_up.to(device), down.to(device)
    x = torch.randn(5, 32, device=device).half()
    ids, weights = IDS.to(device), torch.rand(5, 2, device=device)
    first, second = (list(e.storage.values()) for e in (gate_up, down))
    bias = torch.randn(3, 64, device=device)
    checks = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    arguments = (x, first, ids, weights, bias, gate_up.spec, backend, False)
    torch.library.opcheck(torch.ops.qkernels.grouped_matmul.default, arguments, test_utils=checks)
    layer = (x, first, second, weights, ids, gate_up.spec, down.spec, "silu", backend, True)
    torch.library.opcheck(torch.ops.qkernels.fused_moe.default, layer, test_utils=checks)


# ---------------------------------------------------------------------- bad input
ONE_MATRIX = qk.quantize(torch.randn(16, 64), "nf4")


def _bad(**changed: Any) -> dict[str, Any]:
    good = {
        "x": torch.randn(5, 64),
        "experts": qk.quantize_experts(torch.randn(3, 16, 64), "nf4"),
        "expert_ids": IDS,
    }
    return {**good, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(5, 63)}, r"x: expected shape \(5, 64\) or \(5, 2, 64\) .* \(5, 63\)"),
        ({"x": torch.randn(4, 64)}, r"x: expected shape .* got \(4, 64\)"),
        ({"x": torch.randn(5, 3, 64)}, r"x: expected shape .* got \(5, 3, 64\)"),
        ({"x": torch.randn(64)}, r"x: expected shape .* got \(64,\)"),
        ({"x": torch.ones(5, 64, dtype=torch.int32)}, "x: expected a float16, .* got torch.int32"),
        ({"x": "x"}, "x: expected .* got str"),
        ({"x": torch.randn(5, 64, device="meta")}, "x: expected device cpu, .* got meta"),
        ({"experts": ONE_MATRIX}, "experts: expected PackedExperts, got PackedWeight"),
        ({"expert_ids": IDS.float()}, "expert_ids: expected an int32 or int64 .* torch.float32"),
        ({"expert_ids": IDS[:, 0]}, r"expert_ids: .* \(T, top_k\), got torch.int64 \(5,\)"),
        ({"expert_ids": IDS.to("meta")}, "expert_ids: expected device cpu, .* got meta"),
        ({"weights": torch.rand(5)}, r"weights: expected a .* \(T, top_k\) = \(5, 2\), got"),
        ({"weights": torch.ones(5, 2, dtype=torch.int32)}, "weights: expected a floating tensor"),
        ({"bias": torch.randn(16)}, r"bias: expected a floating .* \(E, N\) = \(3, 16\), got"),
        ({"backend": "tpu"}, "backend: expected one of auto, reference, triton, cuda; got 'tpu'"),
        ({"backend": "cuda"}, "backend: expected one that runs nf4"),
    ],
)  # fmt: skip
def test_bad_products(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk.grouped_matmul(**_bad(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"down": qk.quantize_experts(torch.randn(3, 24, 64), "nf4")},
            "gate_up: expected 128 rows, .* got 64",
        ),
        (
            {"down": qk.quantize_experts(torch.randn(2, 24, 32), "nf4")},
            "down: expected count 3, .* got 2",
        ),
        ({"activation": "relu"}, "activation: expected one of silu, gelu; got 'relu'"),
        ({"topk_weights": None}, "topk_weights: expected a tensor"),
        ({"topk_weights": torch.rand(5, 1)}, "topk_weights: expected a floating tensor"),
        ({"topk_ids": IDS.bool()}, "topk_ids: expected an int32 or int64"),
        ({"x": torch.randn(5, 2, 32)}, r"x: expected shape \(5, 32\) for topk_ids"),
        ({"gate_up": None}, "gate_up: expected PackedExperts, got NoneType"),
    ],
)
def test_bad_layers(changed: dict[str, Any], message: str) -> None:
    good = {
        "x": torch.randn(5, 32),
        "gate_up": qk.quantize_experts(torch.randn(3, 64, 32), "nf4"),
        "down": qk.quantize_experts(torch.randn(3, 24, 32), "nf4"),
        "topk_weights": torch.rand(5, 2),
        "topk_ids": IDS,
    }
    with pytest.raises(ValueError, match=message):
        qk.fused_moe(**{**good, **changed})
