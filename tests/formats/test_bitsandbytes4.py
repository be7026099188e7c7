"""NF4 and FP4 against bitsandbytes' own CPU code: same bytes, same values."""

from __future__ import annotations

import json

import pytest
import torch

import qkernels as qk
from qkernels.formats import bitsandbytes4

bnb = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(64, 128), (7, 9), (5, 9), (33, 100), (128, 576)]


def theirs(weight: torch.Tensor, kind: str, block: int, nested: bool):
    shape = tuple(weight.shape)
    data, state = bnb.quantize_4bit(
        weight, blocksize=block, quant_type=kind, compress_statistics=nested
    )
    tensors = {"weight": data}
    for key, value in state.as_dict(packed=True).items():
        tensors[f"weight.{key}"] = value
    # Their portable kernel. The fast CPU one of 0.50.2 is wrong where blocks straddle rows: on
    # (128, 576) with blocks of 128 it is 22% off its own input, this one 10%.
    absmax = state.absmax
    if nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    default = pytest.importorskip("bitsandbytes.backends.default.ops")
    return tensors, default._dequantize_4bit_compute(
        data.reshape(-1), absmax, state.code, block, shape, torch.float32
    )


def test_tables_are_bitsandbytes_own() -> None:
    for kind, table in (("nf4", bitsandbytes4.NF4_TABLE), ("fp4", bitsandbytes4.FP4_TABLE)):
        assert torch.equal(bnb.get_4bit_type(kind, device="cpu").float(), torch.tensor(table)), kind
    assert torch.equal(bnb.create_dynamic_map().sort().values, bitsandbytes4.dynamic_map())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reads_what_bitsandbytes_writes(
    kind: str, block: int, nested: bool, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape)
    tensors, values = theirs(weight, kind, block, nested)
    p = qk.pack(kind, tensors, shape=shape)  # block size and nesting come from the quant state
    assert (p.params["block_size"], p.params["double_quant"]) == (block, nested)
    # One rounding of the product apart: their nested absmax may be fused differently.
    torch.testing.assert_close(p.dequantize(), values, rtol=2e-7, atol=1e-9)


def decoded_absmax(tensors: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    offset = json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{kind}"].tolist()))[
        "nested_offset"
    ]
    codes = tensors["weight.absmax"]
    outer = tensors["weight.nested_absmax"].repeat_interleave(256)[: codes.numel()]
    return tensors["weight.nested_quant_map"][codes.int()] * outer + offset


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_writes_the_bytes_bitsandbytes_writes(
    kind: str, block: int, nested: bool, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape)
    tensors, _ = theirs(weight, kind, block, nested)
    p = qk.quantize(weight, kind, block_size=block, double_quant=nested, dtype="float32")
    assert p.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if "quant_state" in name:
            ours, other = (json.loads(bytes(t.tolist())) for t in (p.tensors[name], tensor))
            assert ours.pop("nested_offset", 0.0) == pytest.approx(
                other.pop("nested_offset", 0.0), rel=1e-6
            )
            assert ours == other
        elif name == "weight":
            # x * (1/absmax) against x / absmax decides values within one rounding of a midpoint.
            different = (p.tensors[name] != tensor).sum().item()
            assert different <= 2e-4 * tensor.numel() + (1 if weight.numel() % 2 else 0)
        elif name == "weight.absmax" and nested:
            # The offset is a mean, summed in another order: codes next to a midpoint may differ,
            # and near zero, where the map's steps are 1e-6, many may. Ours must be as near the true
            # absmax.
            absmax = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % block))
            absmax = absmax.view(-1, block).abs().amax(-1)
            errors = [(decoded_absmax(t, kind) - absmax).abs() for t in (p.tensors, tensors)]
            assert (errors[0] <= errors[1] + 4e-6 * absmax.max()).all()
        else:
            torch.testing.assert_close(p.tensors[name], tensor, rtol=1e-6, atol=1e-7)


def test_all_zero_weight_has_no_nan() -> None:
    for nested in (False, True):
        p = qk.quantize(torch.zeros(16, 64), "nf4", double_quant=nested)
        assert torch.equal(p.dequantize(), torch.zeros(16, 64))


def state_with(**change: object) -> dict[str, torch.Tensor]:
    tensors = dict(qk.quantize(torch.randn(16, 64), "nf4", double_quant=True).tensors)
    name = "weight.quant_state.bitsandbytes__nf4"
    state = {**json.loads(bytes(tensors[name].tolist())), **change}
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "fp4"}, "expected quant_type 'nf4', got 'fp4'"),
        ({"shape": [16, 32]}, r"expected shape \[16, 64\], got \[16, 32\]"),
        ({"blocksize": 48}, "block_size: expected one of .*, got 48"),
        ({"nested_blocksize": 128}, "nested_block_size: expected one of .256,., got 128"),
        ({"nested_offset": float("nan")}, "expected a finite nested_offset"),
        ({"nested_offset": "1"}, "expected a finite nested_offset, got '1'"),
    ],
)
def test_bad_quant_state(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk.pack("nf4", state_with(**change), shape=(16, 64))


def test_quant_state_that_is_no_json() -> None:
    name = "weight.quant_state.bitsandbytes__nf4"
    for data in (b"\xff\xfe", b"[1]", b"{", b"x" * 70000):
        tensors = state_with() | {name: torch.tensor(list(data), dtype=torch.uint8)}
        with pytest.raises(ValueError, match="bitsandbytes__nf4: expected"):
            qk.pack("nf4", tensors, shape=(16, 64))


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_bytes_called_floats_are_the_same_bytes(storage: str) -> None:
    weight = torch.randn(24, 64)
    p, plain = qk.quantize(weight, "nf4", quant_storage=storage), qk.quantize(weight, "nf4")
    held = p.tensors["weight"].clone()
    assert held.dtype == getattr(torch, storage)
    assert torch.equal(held.view(-1).view(torch.uint8), plain.tensors["weight"].view(-1))
    assert torch.equal(p.dequantize(), plain.dequantize())
    restored = p.prepack_("weight_only").tensors["weight"]
    assert torch.equal(restored.view(torch.uint8), held.view(torch.uint8))
    with pytest.raises(
        ValueError, match="quant_storage: expected items that 3 bytes divide into, got 'bfloat16'"
    ):
        qk.quantize(torch.randn(2, 3), "nf4", quant_storage="bfloat16")
