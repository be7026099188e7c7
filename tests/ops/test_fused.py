"""Norms and gates fused with 8-bit products: the float64 reference, every backend, whole models."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.backends import cuda, registry
from qkernels.backends.problem import Problem, problem_of
from qkernels.nn import fused

from ..conftest import DEVICE, case_id
from ..cuda.conftest import emulated  # noqa: F401  # a fixture
from ..kernels import eight_bit_halves
from ..kernels.test_eight_bit import EIGHT_BIT, assert_close

pytest.importorskip("triton")
eight_bit_cases = pytest.mark.parametrize(
    ("name", "params"), EIGHT_BIT, ids=map(case_id, EIGHT_BIT)
)
BACKENDS = ["reference", "triton", "cuda"]
K = 200


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    return str(request.param)


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels whose `Quantized.quantize` is called, call by call."""
    seen: list[str] = []
    for kernel in registry.kernels():
        if kernel.quantized is None:
            continue

        def quantize(*args: object, kernel: registry.Kernel = kernel, **kwargs: object) -> object:
            seen.append(kernel.name)
            return kernel.quantized.quantize(*args, **kwargs)

        halves = dataclasses.replace(kernel.quantized, quantize=quantize)
        changed = {**kernel.__dict__, "quantized": halves}
        monkeypatch.setitem(registry._KERNELS, kernel.name, registry.Kernel(**changed))
    registry.choose.cache_clear()
    yield seen
    registry.choose.cache_clear()


def weights(name: str, params: dict[str, object], *sizes: int) -> list[qk.PackedWeight]:
    return [qk.quantize(torch.randn(n, K), name, **params).to(DEVICE) for n in sizes]


def close_to(result: Tensor, exact: Tensor, factor: Tensor) -> None:
    """The result of float32 arithmetic, rounded twice to its dtype.

    2^-24, times |factor|, is the rounding of float16 below its normal range.
    """
    u = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[result.dtype]
    error = (result.double() - exact).abs()
    assert bool((error <= 2.01 * u * exact.abs() + 2.0**-24 * (1 + factor.abs())).all())


def normed(x: Tensor, norm: Tensor, eps: float, backend: str) -> Tensor:
    """RMSNorm as `backend` computes it before it quantizes, checked against float64."""
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    result = (
        fused.rms_norm(x, norm, eps)
        if backend == "reference"
        else before_quantization(x, backend, norm=norm, eps=eps)
    )
    close_to(result, exact, norm)
    return result


def gated(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    """silu(gate) * up as `backend` computes it, checked against float64."""
    result = (
        fused.silu_mul(gate, up)
        if backend == "reference"
        else before_quantization(gate, backend, up=up)
    )
    close_to(result, nn.functional.silu(gate.double()) * up.double(), up)
    return result


def before_quantization(x: Tensor, backend: str, **prologue: Any) -> Tensor:
    """The values that the kernel quantizes, which LLM.int8() keeps in 16 bits."""
    p = (
        qk.quantize(torch.randn(4, x.shape[1]), "int8", threshold=2.0)
        .to(DEVICE)
        .prepack_("eight_bit")
    )
    problem = problem_of(p, x.shape[0], x.dtype, x.device)
    module = importlib.import_module(f"qkernels.backends.{backend}.eight_bit")
    values: Tensor = eight_bit_halves.quantize(module, x, p, problem, **prologue).x
    assert values.data_ptr() != x.data_ptr()
    return values


@eight_bit_cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_norm_and_products(
    name: str, params: dict[str, object], dtype: torch.dtype, backend: str
) -> None:
    """The same bits as products with the norm's result, which is float64's but for rounding."""
    q, k = weights(name, params, 24, 17)
    x = (torch.randn(3, K) * torch.tensor([[1.0], [1e-2], [50.0]])).to(dtype).to(DEVICE)
    norm, bias = ((1 + 0.1 * torch.randn(n)).to(dtype).to(DEVICE) for n in (K, 17))
    found = fused.rms_norm_matmul(x, norm, 1e-5, [q, k], [None, bias], backend)
    before = normed(x, norm, 1e-5, backend)
    for y, p, b in zip(found, (q, k), (None, bias), strict=True):
        assert torch.equal(y, qk.matmul(before, p, b, backend))
        if backend != "reference":
            assert_close(y, before, p, b)


@eight_bit_cases
def test_gates_and_product(name: str, params: dict[str, object], backend: str) -> None:
    (p,) = weights(name, params, 24)
    for dtype in (torch.float16, torch.bfloat16):
        gate, up = (2 * torch.randn(2, 4, K)).to(dtype).to(DEVICE)
        bias = torch.randn(24).to(dtype).to(DEVICE)
        y = fused.silu_mul_matmul(gate.view(2, 2, K), up.view(2, 2, K), p, bias, backend)
        assert y.shape == (2, 2, 24)
        before = gated(gate, up, backend)
        assert torch.equal(y.view(4, 24), qk.matmul(before, p, bias, backend))
        if backend != "reference":
            assert_close(y.view(4, 24), before, p, bias)


def test_triton_gates_in_rows_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkernels.backends.triton import outlier_columns

    monkeypatch.setattr(outlier_columns, "ROW_BLOCK", 128)
    gate, up = (4 * torch.randn(2, 3, 300)).half().to(DEVICE)
    before = gated(gate, up, "triton")
    for name, params in EIGHT_BIT:
        p = qk.quantize(torch.randn(8, 300), name, **params).to(DEVICE)
        y = fused.silu_mul_matmul(gate, up, p, backend="triton")
        assert torch.equal(y, qk.matmul(before, p, backend="triton"))


def test_codes_are_made_once_for_weights_that_take_the_same(quantizations: list[str]) -> None:
    x, norm = torch.randn(4, K).half().to(DEVICE), torch.ones(K).half().to(DEVICE)
    q, k, v = weights("w8a8", {}, 8, 8, 16)
    other = weights("w8a8", {"activation": "static", "input_scale": 0.03}, 8)
    same = weights("w8a8", {"activation": "static", "input_scale": 0.03}, 8)
    apart = weights("w8a8", {"activation": "static", "input_scale": 0.04}, 8)
    wide = weights("nf4", {}, 8)
    ps = [q, *other, k, *apart, *wide, v, *same]
    found = fused.rms_norm_matmul(x, norm, 1e-6, ps, backend="triton")
    assert quantizations == ["triton.eight_bit_gemm"] * 3
    before = normed(x, norm, 1e-6, "triton")
    plain = fused.rms_norm(x, norm, 1e-6)
    for y, p in zip(found, ps, strict=True):
        assert torch.equal(
            y, qk.matmul(plain if p.format == "nf4" else before, p, backend="triton")
        )
    said = fused.explain(ps, 4, backend="triton").splitlines()
    assert "norm and quantization in one kernel" in said[0]
    assert "takes the codes of weights[0]" in said[2]
    assert "takes the codes of weights[1]" in said[6]
    assert "takes the codes" not in said[3]
    assert "weights[4], nf4 (8, 200): not fused" in said[4]
    assert "weight-only, so no activations are quantized" in said[4]


def test_launches_are_planned_once(quantizations: list[str]) -> None:
    """For the same weights: a plan has the addresses of their tensors."""
    q, k, v, other = weights("w8a8", {}, 8, 16, 8, 8)
    norm = torch.randn(K).half().to(DEVICE)
    for ps, planned in (((q, k, v), 1), ((q, k, v), 1), ((q, k, other), 2), ((q, k, v), 2)):
        x, bias = torch.randn(3, K).half().to(DEVICE), torch.randn(16).to(DEVICE)
        found = fused.rms_norm_matmul(x, norm, 1e-6, ps, [None, bias, None], backend="triton")
        assert len(quantizations) == planned
        before = normed(x, norm, 1e-6, "triton")
        for y, p, b in zip(found, ps, (None, bias, None), strict=True):
            assert torch.equal(y, qk.matmul(before, p, b, backend="triton"))


def test_any_tensor_of_a_weight_can_be_replaced(backend: str) -> None:
    """A plan has the addresses of all tensors, and a module's buffers are replaced one by one."""
    layers = [qk.QuantLinear(p, backend=backend) for p in weights("w8a8", {}, 8, 16)]
    module = fused.FusedNormLinear(torch.rand(K).half(), 1e-6, layers).to(DEVICE)
    x = torch.randn(3, K).half().to(DEVICE)
    with torch.no_grad():
        module(x)
        (name,) = (name for name in layers[1]._buffers if name.endswith("packed_weight_scale"))
        layers[1]._buffers[name] = 2 * layers[1].get_buffer(name)
        before = normed(x, module.weight, 1e-6, backend)
        for y, layer in zip(module(x), layers, strict=True):
            assert torch.equal(y, layer(before))


def test_a_static_scale_can_be_changed_in_place(backend: str) -> None:
    """Weights share codes as long as their scales are equal, which is read from their numbers."""
    params = {"activation": "static", "input_scale": 0.03}
    q, k = (weights("w8a8", params, n)[0] for n in (8, 16))
    x, norm = torch.randn(3, K).half().to(DEVICE), torch.ones(K).half().to(DEVICE)
    before = normed(x, norm, 1e-6, backend)
    for factor in (1, 2, 0.5):
        k.storage["input_scale"].mul_(factor)
        for y, p in zip(
            fused.rms_norm_matmul(x, norm, 1e-6, [q, k], backend=backend), (q, k), strict=True
        ):
            assert torch.equal(y, qk.matmul(before, p, backend=backend))
    plans = len(k.plans)
    for _ in range(3):
        k.storage["input_scale"].mul_(0.9)
        fused.rms_norm_matmul(x, norm, 1e-6, [q, k], backend=backend)
    assert len(k.plans) == plans  # nothing is kept for scales that are gone


def test_more_weights_than_a_model_has(backend: str) -> None:
    ps = weights("w8a8", {}, 8) * 62
    x, norm = torch.randn(2, K).half().to(DEVICE), torch.rand(K).half().to(DEVICE)
    found = fused.rms_norm_matmul(x, norm, 1e-6, ps, backend=backend)
    want = qk.matmul(normed(x, norm, 1e-6, backend), ps[0], backend=backend)
    assert all(torch.equal(y, want) for y in found)


@pytest.mark.parametrize("which", ["up", "norm", "bias"])
def test_negated_operands(which: str, backend: str) -> None:
    """Tensors of which torch negates the numbers as it reads them, as it does for z.conj().imag."""
    (p,) = weights("w8a8", {}, 8)
    x = torch.randn(3, K).half().to(DEVICE)

    def product(operands: dict[str, Tensor]) -> Tensor:
        up, norm, bias = (operands[name] for name in ("up", "norm", "bias"))
        if which == "up":
            return fused.silu_mul_matmul(x, up, p, bias, backend)
        return fused.rms_norm_matmul(x, norm, 1e-6, [p], [bias], backend)[0]

    shapes = {"up": (3, K), "norm": (K,), "bias": (8,)}
    operands = {name: torch.randn(shape).half().to(DEVICE) for name, shape in shapes.items()}
    before = dict(operands)
    operands[which] = torch._neg_view(-before[which])
    # The gate or the norm runs in plain torch then, which rounds like the kernel but for a bit.
    torch.testing.assert_close(product(operands), product(before), rtol=0.02, atol=0.1)


def test_products_are_tuned_before_they_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkernels.backends.triton import autotune

    q, k = weights("w8a8", {}, 8, 16)
    x, norm = torch.randn(3, K).half().to(DEVICE), torch.ones(K).half().to(DEVICE)
    tuned: list[tuple[int, int]] = []

    def tune(family: str, problem: Problem, tabled: Any, launch: Any, seconds: Any) -> Any:
        tuned.append(problem.shape)
        return tabled

    monkeypatch.setattr(autotune, "due", lambda family, problem, device: problem.shape not in tuned)
    monkeypatch.setattr(autotune, "tune", tune)
    for _ in range(2):
        fused.rms_norm_matmul(x, norm, 1e-6, [q, k], backend="triton")
        assert tuned == [q.shape, k.shape]


def test_rows_by_slices_and_batch_invariance(
    monkeypatch: pytest.MonkeyPatch, quantizations: list[str]
) -> None:
    from qkernels.backends import workspace

    (p,) = weights("fp8", {"activation": "dynamic"}, 24)
    x, norm = torch.randn(40, K).half().to(DEVICE), torch.randn(K).half().to(DEVICE)
    (whole,) = fused.rms_norm_matmul(x, norm, 1e-6, [p], backend="triton", batch_invariant=True)
    (one,) = fused.rms_norm_matmul(x[7], norm, 1e-6, [p], backend="triton", batch_invariant=True)
    assert one.shape == (24,)
    assert torch.equal(one, whole[7])
    quantizations.clear()
    monkeypatch.setattr(workspace, "BYTES", 16 * 300)
    p.plans.clear()
    (sliced,) = fused.rms_norm_matmul(x, norm, 1e-6, [p], backend="triton", batch_invariant=True)
    assert len(quantizations) > 1
    assert torch.equal(sliced, whole)


def test_slices_know_the_outlier_columns_of_all_rows(
    monkeypatch: pytest.MonkeyPatch,
    quantizations: list[str],
    emulated: None,  # noqa: F811
) -> None:
    """LLM.int8() in the CUDA kernels: an outlier column of one slice is one in all slices."""
    from qkernels.backends import workspace

    (p,) = weights("int8", {}, 24)
    gate, up = torch.randn(2, 40, K).half().to(DEVICE)
    gate[33, 70] = up[33, 70] = 6
    norm = torch.ones(K).half().to(DEVICE)
    norm[5] = 4

    def products() -> list[Tensor]:
        (normed,) = fused.rms_norm_matmul(gate, norm, 1e-6, [p], backend="cuda")
        return [normed, fused.silu_mul_matmul(gate, up, p, backend="cuda")]

    whole = products()
    quantizations.clear()
    monkeypatch.setattr(workspace, "BYTES", 16 * 5 * K)
    p.plans.clear()
    sliced = products()
    assert len(quantizations) > 4
    assert all(torch.equal(a, b) for a, b in zip(sliced, whole, strict=True))


def test_autograd_gets_plain_operators_and_no_rows_work(quantizations: list[str]) -> None:
    (p,) = weights("w8a8", {}, 8)
    x, norm = torch.randn(4, K).half().to(DEVICE), torch.ones(K).half().to(DEVICE)
    (y,) = fused.rms_norm_matmul(x.requires_grad_(), norm, 1e-6, [p], backend="triton")
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    norm.requires_grad_()
    (y,) = fused.rms_norm_matmul(x.detach(), norm, 1e-6, [p], backend="triton")
    y.sum().backward()
    assert norm.grad is not None
    assert fused.rms_norm_matmul(x.detach()[:0], norm, 1e-6, [p], backend="triton")[0].shape == (
        0,
        8,
    )
    assert not quantizations


# ---------------------------------------------------------------------- modules and models
def test_fused_norm_linear(quantizations: list[str]) -> None:
    layers = [
        qk.QuantLinear(p, torch.randn(p.shape[0]).half(), "triton")
        for p in weights("int8", {}, 8, 16)
    ]
    module = fused.FusedNormLinear(torch.rand(K).half(), 1e-6, layers).to(DEVICE)
    x = torch.randn(2, 3, K).half().to(DEVICE)
    with torch.no_grad():
        a, b = module(x)
        assert len(quantizations) == 1
        before = normed(x.view(6, K), module.weight, 1e-6, "triton").view(x.shape)
        for y, layer in ((a, layers[0]), (b, layers[1])):
            assert torch.equal(y, layer(before))
    assert "takes the codes of weights[0]" in module.explain()
    with pytest.raises(ValueError, match=r"norm_weight: expected shape \(200,\), got \(199,\)"):
        fused.FusedNormLinear(torch.rand(199), 1e-6, layers)
    layers[1].backend = "auto"
    with pytest.raises(ValueError, match="layers: expected one backend for all, got"):
        fused.FusedNormLinear(torch.rand(K), 1e-6, layers)


@pytest.mark.parametrize("format", ["w8a8", "int8"])
def test_a_fused_llama_computes_what_it_did(
    format: str, backend: str, quantizations: list[str]
) -> None:
    from ..tiny import ids, tiny_model

    dtype = torch.float32 if backend == "reference" else torch.float16
    model = qk.quantize_model(tiny_model(num_hidden_layers=1).to(dtype), format, progress=False).to(
        DEVICE
    )
    for module in model.modules():
        if isinstance(module, qk.QuantLinear):
            module.backend = backend
    plain = copy.deepcopy(model)
    said = qk.fuse_norms(model)
    assert not said.left
    assert [name for name, _ in said.fused] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.0.mlp",
    ]
    assert "fused model.layers.0.input_layernorm with self_attn.q_proj, self_attn.k_proj" in str(
        said
    )
    tokens = ids(7)[None].to(DEVICE)
    with torch.no_grad():
        want, found = plain(tokens).logits.float(), model(tokens).logits.float()
    assert len(quantizations) == (0 if backend == "reference" else 3)
    assert (found - want).norm() <= (1e-5 if backend == "reference" else 0.03) * want.norm()
    old, new = plain.state_dict(), model.state_dict()
    assert old.keys() == new.keys()
    for name in old:
        assert torch.equal(old[name], new[name]), name
    with torch.no_grad():  # a copied norm delivers to the copied readers
        assert torch.equal(copy.deepcopy(model)(tokens).logits.float(), found)
    again = qk.fuse_norms(model)
    assert not again.fused
    assert "it is fused already" in str(again)


def test_what_is_not_fused_is_said() -> None:
    from ..tiny import ids, tiny_model

    model = tiny_model(num_hidden_layers=1)
    assert "is no quantized layer but Linear" in str(qk.fuse_norms(model))
    model = qk.quantize_model(model, "nf4", progress=False)
    want = model(ids(5)[None]).logits
    said = qk.fuse_norms(model)
    assert not said.fused
    assert [name for name, _ in said.left] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.0.mlp",
    ]
    assert (
        "self_attn.q_proj: nf4 is weight-only, so no activations are quantized: plain norm"
        in str(said)
    )
    assert torch.equal(model(ids(5)[None]).logits, want)
    model = qk.quantize_model(tiny_model(num_hidden_layers=1), "w8a8", progress=False)
    model.model.layers[0].input_layernorm = nn.LayerNorm(64)
    model.model.layers[0].mlp.act_fn = nn.GELU()
    said = qk.fuse_norms(model)
    assert "expected an RMSNorm without bias, got LayerNorm" in str(said)
    assert "expected SiLU between, got GELU" in str(said)
    with pytest.raises(RuntimeError, match="called without that norm"):
        model.model.layers[0].mlp.gate_proj(torch.randn(1, 64))
    with pytest.raises(ValueError, match="model: expected one of the types"):
        qk.fuse_norms(nn.Linear(4, 4))


def test_bad_operands() -> None:
    q, k = *weights("w8a8", {}, 8), qk.quantize(torch.randn(8, 64), "w8a8").to(DEVICE)
    x, norm = torch.randn(4, K).half().to(DEVICE), torch.ones(K).half().to(DEVICE)
    for call, message in [
        (
            lambda: fused.rms_norm_matmul(x, norm, 1e-6, []),
            "weights: expected at least one, got none",
        ),
        (
            lambda: fused.rms_norm_matmul(x, norm, 1e-6, [q, k]),
            r"weights\[1\]: expected 200 features as in",
        ),
        (
            lambda: fused.rms_norm_matmul(x, norm, 1e-6, [q], [None, None]),
            "biases: expected 1, one for each",
        ),
        (
            lambda: fused.rms_norm_matmul(x, norm[1:], 1e-6, [q]),
            r"norm_weight: expected floats of shape \(200,\)",
        ),
        (
            lambda: fused.rms_norm_matmul(x[:, 1:], norm, 1e-6, [q]),
            r"x: expected shape \(..., 200\)",
        ),
        (
            lambda: fused.silu_mul_matmul(x, x[1:], q),
            r"up: expected torch.float16 of shape \(4, 200\)",
        ),
        (lambda: fused.silu_mul_matmul(x, x.float(), q), "up: expected torch.float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert cuda.emulator is None
