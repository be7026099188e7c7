"""MXFP4 against compressed-tensors' own compressor, against its definition, and bad tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels.formats import compressed_tensors, e2m1
from qkernels.formats.mxfp4 import Mxfp4

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def theirs(weight: Tensor) -> tuple[Any, Any, dict[str, Tensor]]:
    """(compressor, scheme, tensors) of compressed-tensors' round-to-nearest."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization.quant_scheme import MXFP4A16
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = quantization.QuantizationScheme(targets=["Linear"], **MXFP4A16)
    blocks = weight.unflatten(1, (-1, 32))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
    state = {"weight": weight, "weight_scale": scale}
    return MXFP4PackedCompressor, scheme, MXFP4PackedCompressor.compress(state, scheme)


def weights() -> Tensor:
    """Weights of all sizes, values in the middle between two codes, zeros, powers of two."""
    weight = torch.randn(96, 128) * 2.0 ** torch.randint(-110, 110, (96, 4)).repeat_interleave(
        32, dim=1
    )
    weight[:8] = torch.arange(-64, 64) / 8 * 2.0 ** torch.randint(-100, 100, (8, 1))
    weight[8:16] = 2.0 ** torch.randint(-100, 100, (8, 1)) * torch.randint(-1, 2, (8, 128))
    # largest weights at and next to 1.75 times a power of two, where the scale changes
    edges = torch.tensor([1.75, 3.5, 7, 1.75])
    edges[:2] = edges[:2].nextafter(torch.tensor([0.0, 9.0]))
    largest = weight[16:24].view(8, 4, 32).abs().amax(-1)
    weight[16:24, ::32] = edges * largest.log2().ceil().exp2()
    weight[24], weight[25] = 0, -0.0
    return weight


def test_what_they_pack_we_pack_and_read() -> None:
    weight = weights()
    compressor, scheme, packed = theirs(weight)
    ours = qk.quantize(weight, "mxfp4")
    for name in ("weight_scale", "weight_packed"):
        assert torch.equal(ours.tensors[name], packed[name]), name
    want = compressor.decompress(dict(packed), scheme)["weight"]
    read = qk.pack("mxfp4", packed, tuple(weight.shape)).dequantize()
    assert torch.equal(read.bfloat16().view(torch.int16), want.view(torch.int16))
    assert torch.equal(read, want.float())  # bfloat16 holds each value exactly


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_round_as_theirs(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 256).to(dtype)
    _, _, packed = theirs(weight)
    ours = qk.quantize(weight, "mxfp4").tensors
    assert all(torch.equal(ours[name], packed[name]) for name in ours)


def every_scale_and_code() -> dict[str, Tensor]:
    """A row of all codes, twice, for each scale."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(255, 2)
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    return {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scales}


def test_every_scale_and_code_is_as_ocp_defines_it() -> None:
    tensors = every_scale_and_code()
    p = qk.pack("mxfp4", tensors, (255, 32))
    exact = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.float64)
    powers = 2.0 ** (torch.arange(255, dtype=torch.float64) - 127)
    want = (exact * powers[:, None]).repeat(1, 2)
    # Finite in float32, except 2^128 and more, which only scales of 253 and 254 have.
    overflows = want.abs() >= 2.0**128
    assert not overflows[:253].any()
    assert overflows[253:].any()
    assert torch.equal(p.dequantize().double()[~overflows], want[~overflows])
    assert torch.equal(p.dequantize()[overflows], want[overflows].float())  # infinite
    assert bool(p.dequantize()[:, 8].signbit().all())
    assert all(
        torch.equal(p.prepack_("weight_only").tensors[name], tensors[name]) for name in tensors
    )


def test_the_kernels_parts() -> None:
    fmt = qk.formats.get("mxfp4")
    p = qk.quantize(torch.randn(40, 96), "mxfp4")
    parts = fmt.weight_only(p.tensors, p.shape, p.params)
    assert fmt.weight_only_traits(p.shape, p.params) == (4, "lut16", "e8m0", 32, 1, False, None)
    assert fmt.cuts(p.shape, p.params) == (1, 32)
    assert parts.table is not None
    scales = parts.scaler_tensors["scales"]
    assert (scales.dtype, scales.shape) == (torch.uint8, (3, 40))
    powers = 2.0 ** (scales.T.double() - 127)
    want = parts.table[parts.codes.int()] * powers.repeat_interleave(32, dim=1)
    assert torch.equal(want.float(), p.dequantize())
    assert p.prepack_("weight_only").storage["scaler.scales"].is_contiguous()


def test_rounding_is_to_the_nearest_value() -> None:
    """No other code of the block's scale is nearer; the largest weights keep within an eighth."""
    weight = torch.randn(64, 256)
    p = qk.quantize(weight, "mxfp4")
    blocks = weight.view(64, 8, 32).double()
    scale = 2.0 ** (p.tensors["weight_scale"].double() - 127)[..., None]
    table = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.float64)
    least = (blocks[..., None] - table * scale[..., None]).abs().amin(-1)
    error = (p.dequantize().view(64, 8, 32).double() - blocks).abs()
    assert torch.equal(error, least)
    largest = blocks.abs().amax(-1)
    assert bool((largest / scale[..., 0] < 7).all())
    assert bool((largest / scale[..., 0] >= 3.5).all())


def test_the_largest_and_the_smallest_weights() -> None:
    """Weights of float32 stay finite, and subnormal ones are kept as far as scale 0 goes."""
    weight = torch.zeros(4, 32)
    weight[0, 0] = -torch.finfo(torch.float32).max
    weight[1, 3] = 1.5 * 2.0**-127
    weight[2, 3] = 2.0**-130
    p = qk.quantize(weight, "mxfp4")
    found = p.dequantize()
    assert found[0, 0] == -6 * 2.0**125
    assert torch.equal(found[1:2], weight[1:2])
    assert not found[2:].any()
    assert p.tensors["weight_scale"].tolist() == [[252], [0], [0], [0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": torch.zeros(8, 31, dtype=torch.uint8)},
         r"mxfp4: weight_packed: expected shape \(8, 32\), got \(8, 31\)"),
        ({"weight_packed": torch.zeros(8, 32, dtype=torch.int8)},
         "mxfp4: weight_packed: expected dtype uint8, got int8"),
        ({"weight_scale": torch.ones(8, 2)},
         "mxfp4: weight_scale: expected dtype uint8, got float32"),
        ({"weight_scale": torch.zeros(8, 4, dtype=torch.uint8)},
         r"mxfp4: weight_scale: expected shape \(8, 2\), got \(8, 4\)"),
        ({"weight_scale": torch.tensor([[254, 255]] * 8, dtype=torch.uint8)},
         r"mxfp4: weight_scale: expected finite values, got nan \(8 bad\)"),
        ({"weight_zero_point": torch.zeros(8, 2, dtype=torch.uint8)},
         "mxfp4: weight_zero_point: unexpected tensor"),
    ],
)  # fmt: skip
def test_bad_tensors(change: dict[str, Tensor], message: str) -> None:
    p = qk.quantize(torch.randn(8, 64), "mxfp4")
    with pytest.raises(ValueError, match=message):
        qk.pack("mxfp4", {**p.tensors, **change}, (8, 64))


def test_k_is_whole_blocks() -> None:
    with pytest.raises(
        ValueError, match="mxfp4: shape: expected input features a multiple of 32, got 48"
    ):
        qk.quantize(torch.randn(8, 48), "mxfp4")


def test_our_config_is_the_one_that_their_scheme_prints() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.quant_scheme import MXFP4A16

    config = Mxfp4().to_hf_config({}, ["lm_head"])
    ours = quantization.QuantizationConfig(
        **{key: value for key, value in config.items() if key != "quant_method"}
    )
    assert ours.config_groups["group_0"].weights == MXFP4A16["weights"]
    assert Mxfp4.from_hf_config(config) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 16}, r"weights.group_size: expected one of \(32,\), got 16"),
        ({"num_bits": 8}, r"weights.num_bits: expected one of \(4,\), got 8"),
        ({"type": "int"}, r"weights.type: expected one of \('float',\), got 'int'"),
        ({"strategy": "tensor_group"}, r"weights.strategy: expected one of \('group',\), got"),
        ({"symmetric": False}, r"weights.symmetric: expected one of .*, got False"),
        ({"scale_dtype": "torch.float8_e4m3fn"}, "weights.scale_dtype: expected one of .*e4m3fn"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    config = Mxfp4().to_hf_config({}, [])
    config["config_groups"]["group_0"]["weights"].update(change)
    with pytest.raises(ValueError, match=f"quantization_config {message}"):
        Mxfp4.from_hf_config(config)


def test_quantized_activations_are_refused() -> None:
    config = Mxfp4().to_hf_config({}, [])
    inputs = compressed_tensors.arguments("float", 4, "group", dynamic=True, group_size=e2m1.BLOCK)
    config["config_groups"]["group_0"]["input_activations"] = inputs
    with pytest.raises(ValueError, match="input_activations: expected null with mxfp4-pack"):
        Mxfp4.from_hf_config(config)
