"""GGUF block types: bytes against the gguf package, errors against llama.cpp's own quantizer."""

from __future__ import annotations

from pathlib import Path

import gguf as package
import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints.gguf.header import read_header
from qkernels.cli import samples
from qkernels.formats.gguf import TYPES, GgufFormat, search

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf.safetensors"
types = pytest.mark.parametrize("fmt", TYPES, ids=lambda fmt: fmt.name)


def random_blocks(fmt: GgufFormat, n: int, k: int) -> torch.Tensor:
    """Random bits, but scales are finite: exponents below that of infinity, no e8m0 NaN."""
    data = torch.randint(0, 256, (n, fmt.row_bytes(k)), dtype=torch.uint8)
    fields = fmt.split(data)
    for name, tensor in fields.items():
        if tensor.dtype == torch.float16:
            bits = tensor.view(torch.int16)
            fields[name] = torch.where(bits & 0x7C00 == 0x7C00, bits & ~0x4000, bits).view(
                torch.float16
            )
        elif tensor.dtype == torch.float8_e8m0fnu:
            fields[name] = tensor.view(torch.uint8).clamp(max=254).view(tensor.dtype)
    return fmt.join(fields).view(n, -1)


def theirs(fmt: GgufFormat, data: torch.Tensor) -> torch.Tensor:
    kind = package.GGMLQuantizationType[fmt.ggml_type]
    return torch.from_numpy(package.dequantize(data.numpy(), kind))


@types
def test_dequantizes_as_the_gguf_package_bit_for_bit(fmt: GgufFormat) -> None:
    data = random_blocks(fmt, 64, 1024)
    found = qk.pack(fmt.name, {"data": data}, (64, 1024)).dequantize()
    assert torch.equal(found.view(torch.int32), theirs(fmt, data).view(torch.int32))


@types
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_single_row(fmt: GgufFormat, blocks: int) -> None:
    """Strides of dimensions of size 1 say nothing; in mapped files bytes lie at odd addresses."""
    shape = (1, blocks * fmt.block)
    data = random_blocks(fmt, *shape)
    want = theirs(fmt, data)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), data.view(-1)])[1:].view(1, -1)
    for bytes_ in (data, shifted):
        p = qk.pack(fmt.name, {"data": bytes_}, shape)
        assert torch.equal(p.dequantize().view(torch.int32), want.view(torch.int32))
        assert torch.equal(p.prepack_("weight_only").tensors["data"], data)
    weight = torch.randn(shape)
    found = qk.quantize(weight, fmt.name).dequantize()
    # one block of 32 may have nearly twice the usual error: of 200,000, the worst had 0.17 in q4_0
    # and 0.21 in gguf_mxfp4
    most = 2.0 ** (1 - fmt.bits + (fmt.block == 32))
    assert (found - weight).norm() < weight.norm() * most
    layer = qk.QuantLinear(qk.quantize(weight, fmt.name))
    x = torch.randn(2, shape[1])
    torch.testing.assert_close(layer(x), x @ found.T, rtol=1e-4, atol=1e-4 * shape[1] ** 0.5)


@types
def test_sizes_are_ggml_s(fmt: GgufFormat) -> None:
    kind = package.GGMLQuantizationType[fmt.ggml_type]
    assert package.GGML_QUANT_SIZES[kind] == (fmt.block, fmt.block_bytes)


@types
def test_prepack_restores_every_bit(fmt: GgufFormat) -> None:
    k = 3 * fmt.block
    data = random_blocks(fmt, 40, k)
    p = qk.pack(fmt.name, {"data": data}, (40, k)).prepack_("weight_only")
    assert torch.equal(p.tensors["data"], data)
    held = sum(
        t.numel() * t.element_size()
        for name, t in p.storage.items()
        if name not in ("table", "lut")
    )
    # No expansion: what the file has, and at most the padding of the last tile of codes (512 of
    # 256..).
    tile = 256 if fmt.bits in (2, 3) else 512 // fmt.bits if fmt.bits in (4, 8) else 128
    padded = -(-k // tile) * tile
    assert held == data.numel() + 40 * (padded - k) * fmt.bits // 8


@pytest.mark.parametrize("weighted", [False, True])
@types
def test_error_is_no_worse_than_llama_cpp_s(fmt: GgufFormat, weighted: bool) -> None:
    """The relative squared error, all rows weighted alike, is at most 1% above llama.cpp's."""
    golden = load_file(GOLDEN)
    weight, importance = golden["weight"].float(), golden["importance"] if weighted else None
    if fmt.ggml_type == "MXFP4":  # llama.cpp uses no importance, and the gguf package has its rule
        kind = package.GGMLQuantizationType.MXFP4
        bytes_ = torch.from_numpy(package.quantize(weight.numpy(), kind))
    else:
        bytes_ = golden[fmt.name + (".importance" if weighted else "")]
    best = qk.pack(fmt.name, {"data": bytes_}, tuple(weight.shape))
    w = torch.ones(weight.shape[1]) if importance is None else importance

    def error(p: qk.PackedWeight) -> float:
        return float(
            (((p.dequantize() - weight).square() * w).sum(1) / (weight.square() * w).sum(1)).sum()
        )

    ours = qk.quantize(weight, fmt.name, importance=importance)
    assert error(ours) <= 1.01 * error(best)
    if fmt.name == "q8_0" or (fmt.ggml_type == "MXFP4" and not weighted):
        assert torch.equal(ours.tensors["data"], bytes_)


@types
def test_importance_helps_where_it_lies(fmt: GgufFormat) -> None:
    weight, importance = torch.randn(64, 512), torch.rand(512) ** 4 * 10 + 1e-3
    errors = []
    for given in (None, importance):
        found = qk.quantize(weight, fmt.name, importance=given).dequantize()
        errors.append(float(((found - weight).square() * importance).sum()))
    assert errors[1] <= errors[0] if fmt.name == "q8_0" else errors[1] < errors[0]


@types
def test_zeros_stay_zeros(fmt: GgufFormat) -> None:
    weight = torch.zeros(2, 512)
    weight[1, 256:] = torch.randn(256)
    for importance in (None, torch.ones(512), torch.zeros(512)):
        found = qk.quantize(weight, fmt.name, importance=importance).dequantize()
        assert bool(torch.isfinite(found).all())
        assert not found[0].any()
        assert not found[1, :256].any()


@types
def test_bad_input(fmt: GgufFormat) -> None:
    with pytest.raises(
        ValueError, match=f"{fmt.name}: shape: expected .* multiple of {fmt.block}, got 48"
    ):
        qk.quantize(torch.randn(4, 48), fmt.name)
    data = random_blocks(fmt, 4, 256)
    with pytest.raises(ValueError, match=f"{fmt.name}: data: expected shape"):
        qk.pack(fmt.name, {"data": data[:, :-1]}, (4, 256))
    with pytest.raises(
        ValueError, match="importance: expected a floating tensor of shape \\(256,\\)"
    ):
        qk.quantize(torch.randn(4, 256), fmt.name, importance=torch.ones(255))
    with pytest.raises(ValueError, match="importance: expected finite values >= 0, got -1.0"):
        qk.quantize(torch.randn(4, 256), fmt.name, importance=-torch.ones(256))
    fields = fmt.split(data)
    name, scale = next((f.name, fields[f.name]) for f in fmt.fields if f.dtype.is_floating_point)
    half = scale.dtype == torch.float16
    scale.view(torch.int16 if half else torch.uint8)[0] = 0x7E00 if half else 255
    with pytest.raises(
        ValueError, match=f"{fmt.name}: data: {name}: expected finite values, got nan"
    ):
        qk.pack(fmt.name, {"data": fmt.join(fields).view(4, -1)}, (4, 256))
    ramp = torch.linspace(-1, 1, 256)[None]
    with pytest.raises(ValueError, match="weight: expected magnitudes up to 3e"):
        qk.quantize(1e30 * ramp, fmt.name)
    if half:
        with pytest.raises(ValueError, match="expected scales up to 65504"):
            qk.quantize(2.9e8 * ramp, fmt.name)


def mxfp4_blocks() -> torch.Tensor:
    """Weights of 16 bits of any size, in the middle between two codes, with scales 0 and 1, 0."""
    weight = torch.randn(64, 256) * 2.0 ** torch.randint(-60, 20, (64, 1))
    weight[:8] = torch.arange(-128, 128) / 8 * 2.0 ** torch.randint(-126, 10, (8, 1))
    weight[8:16] = torch.linspace(3, 7, 8)[:, None] * torch.randn(8, 256).sign() * 2.0**-126
    weight[16], weight[17] = 0, -0.0
    return weight.bfloat16().float()


def test_mxfp4_quantizes_as_the_gguf_package_bit_for_bit() -> None:
    weight = mxfp4_blocks()
    want = package.quantize(weight.numpy(), package.GGMLQuantizationType.MXFP4)
    found = qk.quantize(weight, "gguf_mxfp4").tensors["data"]
    assert torch.equal(found, torch.from_numpy(want))


def test_importance_moves_the_scale_of_mxfp4() -> None:
    """Up, where a weight of 7.9 must not become 6; down, where 4.1 matters less than 0.25s do."""
    weight = torch.full((2, 32), 0.25)
    weight[:, 0] = torch.tensor([7.9, 4.1])
    importance = torch.ones(32)
    for row, factor, scales in ((0, 1000.0, (127, 128)), (1, 0.0, (127, 126))):
        importance[0] = factor
        given = [qk.quantize(weight[row : row + 1], "gguf_mxfp4", importance=i)
                 for i in (None, importance)]  # fmt: skip
        assert tuple(int(p.tensors["data"][0, 0]) for p in given) == scales


def test_every_scale_and_code_of_mxfp4() -> None:
    """Values are the gguf package's bit for bit, and kernels get what format mxfp4 gives them."""
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    codes = torch.arange(16, dtype=torch.uint8) * 17
    data, shape = torch.cat([scales, codes.expand(255, 16)], dim=1), (255, 32)
    ours = qk.pack("gguf_mxfp4", {"data": data}, shape)
    want = theirs(qk.formats.get("gguf_mxfp4"), data)  # type: ignore[arg-type]
    assert torch.equal(ours.dequantize().view(torch.int32), want.view(torch.int32))
    parts = qk.formats.get("gguf_mxfp4").weight_only({"data": data}, shape, {})
    packed = {"weight_packed": parts.codes[:, ::2] | parts.codes[:, 1::2] << 4}
    ocp = qk.pack("mxfp4", packed | {"weight_scale": scales}, shape)
    assert torch.equal(ours.dequantize(), ocp.dequantize())
    one, other = (p.prepack_("weight_only").storage for p in (ours, ocp))
    assert all(torch.equal(one[name], other[name]) for name in other if name != "lut")  # -0.0


def test_nonnegative_never_leaves_its_range() -> None:
    unit, steps = search.nonnegative(torch.rand(100, 8), torch.rand(100, 8), 63)
    assert int(steps.min()) >= 0
    assert int(steps.max()) <= 63
    assert bool((unit > 0).all())


@pytest.mark.slow
def test_real_file() -> None:
    path = samples.model_path("smollm2-135m")
    raw = path.read_bytes()
    chosen = [t for t in read_header(path).tensors if t.type in ("Q4_1", "Q8_0")][:30:7]
    for tensor in chosen:
        data = torch.frombuffer(bytearray(raw[tensor.offset :][: tensor.nbytes]), dtype=torch.uint8)
        data = data.view(tensor.shape[0], -1)
        p = qk.pack(tensor.type.lower(), {"data": data}, tensor.shape)
        want = theirs(qk.formats.get(tensor.type.lower()), data)  # type: ignore[arg-type]
        assert torch.equal(p.dequantize().view(torch.int32), want.view(torch.int32)), tensor.name
