"""compressed-tensors' packed integers against that package's own compressor, and bad tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkernels as qk

CASES = [
    {"bits": 4, "group_size": 32, "symmetric": True},
    {"bits": 4, "group_size": 16, "symmetric": False},
    {"bits": 3, "group_size": 32, "symmetric": False},
    {"bits": 8, "group_size": -1, "symmetric": True},
    {"bits": 5, "group_size": 96, "symmetric": False},
]


def _theirs(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Any, Any, Any]:
    """(compressor, scheme, tensors) of compressed-tensors' round-to-nearest."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    args = quantization.QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    grouped = weight.unflatten(1, (-1, weight.shape[1] if group_size == -1 else group_size))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale.half().float(), "weight_zero_point": zero}
    return (
        PackedQuantizationCompressor,
        scheme,
        PackedQuantizationCompressor.compress(state, scheme),
    )


@pytest.mark.parametrize("params", CASES, ids=str)
def test_what_they_pack_we_read_and_back(params: dict[str, Any]) -> None:
    weight = torch.randn(40, 96)
    compressor, scheme, theirs = _theirs(weight, **params)
    p = qk.pack("pack_quantized", theirs, shape=(40, 96), **params)
    want = compressor.decompress(dict(theirs), scheme)["weight"]
    # Both multiply the same integers by the same float32 scales.
    assert torch.equal(p.dequantize(), want)
    ours = qk.quantize(weight, "pack_quantized", **params)
    again = compressor.decompress(dict(ours.tensors), scheme)["weight"]
    # They multiply in the scale's own dtype, float16.
    assert torch.equal(ours.dequantize(torch.float16), again)


@pytest.mark.parametrize(
    "params", [*CASES, {"bits": 4, "group_size": 24, "act_order": True}], ids=str
)
def test_kernel_layout_gives_back_the_same_bits(params: dict[str, Any]) -> None:
    p = qk.quantize(torch.randn(40, 96), "pack_quantized", **params)
    before = {k: v.clone() for k, v in p.tensors.items()}
    layout = qk.formats.get("pack_quantized").kernel_layout(p.params)
    if params["bits"] == 5:
        assert layout is None  # no fused kernel decodes 5 bits: the reference runs
        return
    after = p.prepack_(layout).tensors
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
    )


@pytest.mark.parametrize(
    ("params", "change", "message"),
    [
        ({}, {"weight_shape": torch.tensor([40, 95])},
         r"weight_shape: expected \[40, 96\], got \[40, 95\]"),
        ({}, {"weight_packed": torch.zeros(40, 13, dtype=torch.int32)},
         r"expected shape \(40, 12\), got \(40, 13\)"),
        ({}, {"weight_scale": torch.full((40, 3), torch.inf)},
         "weight_scale: expected finite values, got inf"),
        ({}, {"weight_zero_point": torch.zeros(5, 3, dtype=torch.int32)},
         "weight_zero_point: unexpected tensor"),
        ({"symmetric": False}, {"weight_zero_point": torch.zeros(40, 3, dtype=torch.int8)},
         "expected dtype int32, got int8"),
        ({"act_order": True}, {"weight_g_idx": torch.full((96,), 3, dtype=torch.int32)},
         r"weight_g_idx: expected values in \[0, 3\), got 3..3"),
        ({"bits": 5, "symmetric": False},
         {"weight_zero_point": torch.full((7, 3), -1, dtype=torch.int32)},
         "weight_zero_point: expected zero bits behind the last code"),
    ],
)  # fmt: skip
def test_bad_tensors(params: dict[str, Any], change: dict[str, torch.Tensor], message: str) -> None:
    params = {"group_size": 32, **params}
    p = qk.quantize(torch.randn(40, 96), "pack_quantized", **params)
    with pytest.raises(ValueError, match=message):
        qk.pack("pack_quantized", {**p.tensors, **change}, shape=(40, 96), **params)


@pytest.mark.parametrize("source", ["gptq", "awq", "pack_quantized"])
@pytest.mark.parametrize("target", ["gptq", "awq", "pack_quantized"])
def test_grids_carry_over_exactly(source: str, target: str) -> None:
    p = qk.quantize(torch.randn(40, 96), source, group_size=32, symmetric=False)
    grid = qk.formats.get(source).to_grid(p.tensors, p.shape, p.params)
    assert torch.equal(grid.dequantize(), p.dequantize())
    fmt = qk.formats.get(target)
    params = fmt.resolve(p.shape, {"group_size": 32, "symmetric": False})
    other = qk.pack(target, fmt.from_grid(grid, params), p.shape, **params)
    assert torch.equal(other.dequantize(), p.dequantize())
    back = fmt.to_grid(other.tensors, other.shape, other.params)
    assert all(torch.equal(a, b) for a, b in zip(grid[:3], back[:3], strict=True))


def test_grids_that_do_not_fit_are_refused() -> None:
    ordered = qk.quantize(
        torch.randn(40, 96), "gptq", group_size=32, act_order=True, symmetric=False
    )
    grid = qk.formats.get("gptq").to_grid(ordered.tensors, ordered.shape, ordered.params)
    for name, params, message in [
        ("awq", {}, "awq: groups: expected neighbouring features, got act-order"),
        ("pack_quantized", {"symmetric": False}, "act_order: expected True"),
        ("pack_quantized", {"act_order": True}, "symmetric: expected every zero point to be 8"),
    ]:
        fmt = qk.formats.get(name)
        with pytest.raises(ValueError, match=message):
            fmt.from_grid(grid, fmt.resolve((40, 96), {"group_size": 32, **params}))


def test_calibrated_quantizers_write_it() -> None:
    from ..tiny import ids, tiny_model

    data = ids(64).view(4, 16)
    for params in ({"group_size": 32, "act_order": True}, {"group_size": 16, "symmetric": False}):
        a = qk.quantize_model(tiny_model(), "pack_quantized", data, progress=False, **params)
        b = qk.quantize_model(tiny_model(), "gptq", data, progress=False, **params)
        one, other = (m.model.layers[1].mlp.up_proj.packed for m in (a, b))
        assert torch.equal(one.dequantize(), other.dequantize())
