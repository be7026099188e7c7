"""8-bit products against compressed-tensors' rounding, and where fused kernels run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk

from ..reference import assert_fused_close

quantization = pytest.importorskip("compressed_tensors.quantization")

INT8: list[dict[str, Any]] = [
    {"symmetric_input": False},
    {"symmetric_weight": False, "symmetric_input": False},
    {"symmetric_weight": False, "symmetric_input": False, "granularity": "tensor"},
    {"symmetric_weight": False, "symmetric_input": False, "group_size": 16},
    {"symmetric_input": False, "group_size": 48},
    {
        "symmetric_weight": False,
        "activation": "static",
        "input_scale": 0.03,
        "input_zero_point": -7,
    },
    {"group_size": 32, "activation": "static", "input_scale": 0.03},
    {"symmetric_weight": False, "activation": "none"},
    {"symmetric_weight": False, "activation": "none", "granularity": "tensor"},
    {"group_size": 32, "activation": "none"},
    {"activation": "none"},
]
FP8: list[dict[str, Any]] = [
    {"block_rows": rows, "block_columns": columns, "activation": activation}
    for rows, columns in ((64, 64), (1, 32), (128, 1), (24, 40), (256, 128), (1, 128))
    for activation in ("none", "dynamic")
]
ONLY = [("w8a8", p) for p in INT8 if p.get("activation") == "none"] + [
    ("fp8", {"granularity": "block", **p}) for p in FP8 if p["activation"] == "none"
]
ROUNDED = [("w8a8", p) for p in INT8 if p.get("activation") != "none"] + [
    ("fp8", {"granularity": "block", **p}) for p in FP8 if p["activation"] == "dynamic"
]


def _arguments(p: qk.PackedWeight) -> tuple[Any, Any]:
    """QuantizationArgs of weights and inputs, from the config that we write."""
    from qkernels import formats

    config = formats.get(p.format).to_hf_config(p.params, [])
    assert config is not None
    scheme = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    return scheme.weights, scheme.input_activations


def _theirs(x: Tensor, p: qk.PackedWeight) -> Tensor:
    """The product in float64, after compressed-tensors' functions have rounded x and the weight."""
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    weights, inputs = _arguments(p)
    tensors = p.tensors
    scale = tensors.get("weight_scale", tensors.get("weight_scale_inv"))
    weight = quantization.dequantize(
        _padded(tensors["weight"], weights), scale, tensors.get("weight_zero_point"), weights
    )[: p.shape[0], : p.shape[1]]
    if inputs is not None:
        if inputs.dynamic:
            size = inputs.group_size or x.shape[1]
            x = torch.nn.functional.pad(x, (0, -x.shape[1] % size))
            own = compute_dynamic_scales_and_zp(x[None], inputs, torch.nn.Module())
            x = quantization.fake_quantize(x[None], *own, inputs)[0]
        else:
            zero = tensors.get("input_zero_point")
            x = quantization.fake_quantize(x, tensors["input_scale"], zero, inputs)
    return x[:, : p.shape[1]].double() @ weight.double().T


def _padded(weight: Tensor, args: Any) -> Tensor:
    return weight.float() if args.strategy == "block" else weight


@pytest.mark.parametrize(("name", "params"), ONLY + ROUNDED, ids=str)
def test_the_product_is_theirs(name: str, params: dict[str, Any]) -> None:
    """The products agree but for the order of float32 sums of K terms."""
    p = qk.quantize(
        torch.randn(80, 96),
        name,
        **{"scale_name": "weight_scale"} if name == "fp8" else {},
        **params,
    )
    x = torch.randn(7, 96) * torch.tensor([1.0, 30, 1e-3, 1, 1, 1, 1])[:, None]
    x[3] = x[3].abs()  # 0 is outside of its range
    x[4] = 0
    x[5] = -x[5].abs()
    x[6, 5] = 40.0
    if name == "w8a8" and p.params["activation"] == "dynamic" and p.params["symmetric_input"]:
        pytest.fail("theirs are of another scale then")
    want, got = _theirs(x, p), qk.matmul(x, p)
    bound = 96 * 2.0**-23 * (x.abs().double() @ p.dequantize().abs().double().T + want.abs())
    if name == "fp8" and p.params["activation"] != "none":
        # Where a group's largest is below 1e-4, ours are codes of that, of 3 bits behind the point
        # as any.
        bound = bound + 1e-4 * 2.0**-4 * p.dequantize().abs().double().sum(1)
    if p.params["activation"] != "none":
        # Zero points cancel: what is added before that is as large as the whole range.
        bound = bound + 96 * 2.0**-23 * 2 * x.abs().amax(
            1, keepdim=True
        ) * p.dequantize().abs().double().sum(1)
    assert bool(((got.double() - want).abs() <= bound).all())
    assert torch.equal(got[4], torch.zeros(80))


@pytest.mark.parametrize(("name", "params"), ONLY + ROUNDED, ids=str)
def test_rounding_keeps_within_half_a_step(name: str, params: dict[str, Any]) -> None:
    """`quantize` itself, also for ranges on one side of 0."""
    weight = torch.randn(80, 96)
    weight[3], weight[4], weight[5] = weight[3].abs() + 1, -weight[4].abs() - 1, 0
    p = qk.quantize(weight, name, **params)
    error = (p.dequantize() - weight).abs()
    # 3 bits behind the point, and steps of 2^-9 near 0, of a block's largest / 448
    if name == "fp8":
        top = float(weight.abs().max())
        assert bool((error <= weight.abs() * 2.0**-4 + 2.0**-9 * top / 448).all())
    else:
        scale = p.tensors["weight_scale"]
        step = scale.repeat_interleave(96 // scale.shape[1], 1) if scale.dim() == 2 else scale
        # The zero point is rounded, too, and may push the last code out of range by half a step
        # more.
        steps = 0.5 if p.params["symmetric_weight"] else 1.0
        assert bool((error <= step * (steps + 1e-3)).all())


FUSED = [(name, params) for name, params in ONLY if params.get("block_columns", 16) % 16 == 0]
UNFUSED = [case for case in ONLY + ROUNDED if case not in FUSED]


@pytest.mark.parametrize(("name", "params"), FUSED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_only_products_are_fused(
    name: str, params: dict[str, Any], dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    for n, k in ((72, 192), (40, 96)):
        p = qk.quantize(torch.randn(n, k), name, **params)
        before = {key: tensor.clone() for key, tensor in p.tensors.items()}
        for m in (1, 5, 17):
            x = torch.randn(m, k).to(dtype)
            assert_fused_close(qk.matmul(x, p, backend="triton"), x, p)
        assert p.layout == "weight_only"
        after = p.tensors
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype
            assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize(("name", "params"), UNFUSED, ids=str)
def test_explain_says_what_stops_the_kernels(name: str, params: dict[str, Any]) -> None:
    p = qk.quantize(
        torch.randn(256, 256),
        name,
        **{**params, **({"group_size": 32} if "group_size" in params else {})},
    )
    found = qk.explain(p)
    assert found.kernel == "reference.dequantize"
    reasons = dict(found.rejected)
    assert "kernels that" in reasons["triton.eight_bit_gemm"]
    assert reasons["triton.weight_only_gemm"] == reasons["triton.eight_bit_gemm"]
    with pytest.raises(ValueError, match="kernels that"):
        qk.matmul(torch.randn(2, 256).half(), p, backend="triton")


@pytest.mark.parametrize("index", [[0], [5, 5, 79, 64, 0], list(range(80))], ids=len)
@pytest.mark.parametrize(("name", "params"), [
    *ONLY, ("fp8", {"granularity": "block"}), ("fp8", {"granularity": "tensor"}), ("fp8", {}),
    *(("pack_quantized", {"bits": bits, "group_size": 32, "symmetric": symmetric})
      for bits in range(2, 9) for symmetric in (True, False)),
    ("pack_quantized", {"group_size": 32, "act_order": True}),
], ids=str)  # fmt: skip
def test_rows_of_an_embedding(name: str, params: dict[str, Any], index: list[int]) -> None:
    """Any rows, in any order and repeated, have the values of the whole."""
    from qkernels.weights.sharding import take_rows

    p = qk.quantize(torch.randn(80, 96), name, **params)
    taken = take_rows(p, torch.tensor(index))
    assert torch.equal(taken.dequantize(), p.dequantize()[index])
    again = qk.pack(name, taken.tensors, taken.shape, **taken.params)  # a valid weight of its own
    assert torch.equal(again.dequantize(), p.dequantize()[index])


@pytest.mark.parametrize(("name", "params", "message"), [
    ("w8a8", {"activation": "none", "symmetric_input": False},
     "symmetric_input: expected True with activation 'none'"),
    ("w8a8", {"granularity": "tensor", "group_size": 32},
     "group_size: expected -1 with granularity 'tensor', got 32"),
    ("w8a8", {"group_size": 40},
     "group_size: expected -1 or a divisor of K=96, because w8a8 .* got 40"),
    ("w8a8", {"activation": "none", "input_scale": 1.0}, "expected none with activation='none'"),
    ("fp8", {"granularity": "block", "block_rows": 0},
     "block_rows: expected a positive number, got 0"),
    ("fp8", {"block_columns": 64}, "block_columns: expected 128 without blocks, got 64"),
])  # fmt: skip
def test_bad_parameters(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk.quantize(torch.randn(80, 96), name, **params)
