"""`layer.weight` of a packed layer: it has a shape, dtype and device, and refuses arithmetic."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.nn.embedding import QuantEmbedding

SENTENCE = (
    r"weight: expected a tensor to compute with, got a packed nf4 weight of shape \(16, 64\), "
    r"which only its layer multiplies with; layer.packed.dequantize\(\) makes a tensor of it"
)


def _layer(**kwargs: Any) -> qk.QuantLinear:
    return qk.QuantLinear.from_linear(nn.Linear(64, 16, **kwargs), "nf4")


def test_it_answers_as_the_linears_weight() -> None:
    linear = nn.Linear(64, 16, dtype=torch.bfloat16)
    weight, want = qk.QuantLinear.from_linear(linear, "nf4").weight, linear.weight
    for name in ("shape", "dtype", "device", "ndim", "is_meta", "is_cuda"):
        assert getattr(weight, name) == getattr(want, name), name
    for name in ("size", "dim", "numel", "is_floating_point", "is_complex"):
        assert getattr(weight, name)() == getattr(want, name)(), name
    assert (weight.size(0), weight.size(-1)) == (16, 64)
    assert weight.data.dtype == weight.detach().dtype == want.dtype
    assert weight is not None
    assert not isinstance(weight, torch.Tensor)
    assert "packed nf4 weight of shape (16, 64), dtype=torch.bfloat16, device='cpu'" in repr(weight)


def test_its_dtype_and_device_follow_the_model() -> None:
    model = nn.Sequential(_layer(), _layer(bias=False))
    assert [layer.weight.dtype for layer in model] == [torch.float32] * 2
    assert [layer.weight.dtype for layer in model.half()] == [torch.float16] * 2
    assert [layer.weight.dtype for layer in model.to(torch.bfloat16)] == [torch.bfloat16] * 2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[1].weight.dtype == torch.bfloat16
    assert model.to("meta")[0].weight.device.type == "meta"
    assert model.to_empty(device="cpu")[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("compute", [
    lambda w: w + 1, lambda w: 2 * w, lambda w: -w, lambda w: w @ torch.ones(64),
    lambda w: torch.ones(16) @ w, lambda w: w[0], lambda w: w == w.T if hasattr(w, "T") else w > 0,
    lambda w: list(w), lambda w: bool(w), lambda w: torch.nn.functional.linear(torch.ones(64), w),
    lambda w: torch.cat([w, w]), lambda w: torch.ones(3, 64).matmul(w),
    lambda w: torch.nn.init.normal_(w), lambda w: w.requires_grad_(),
    lambda w: torch.empty(16, 64).copy_(w), lambda w: torch.allclose(torch.ones(16, 64), other=w),
])  # fmt: skip
def test_it_refuses_arithmetic(compute: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=SENTENCE):
        compute(_layer().weight)


@pytest.mark.parametrize("name", ["T", "t", "float", "clone", "to", "numpy", "copy_", "data_ptr"])
def test_it_has_no_other_attribute_of_a_tensor(name: str) -> None:
    weight = _layer().weight
    assert not hasattr(weight, name)
    with pytest.raises(AttributeError, match=f"{name}: {SENTENCE}"):
        getattr(weight, name)


def test_it_cannot_be_assigned() -> None:
    """Tying assigns a weight; a head that computes with packed bytes must not seem to take it."""
    layer = _layer()
    for value in (nn.Parameter(torch.ones(16, 64)), torch.ones(16, 64), None):
        with pytest.raises(
            ValueError, match=r"weight: expected nothing to be assigned, .* packed \(nf4\)"
        ):
            layer.weight = value
    assert set(dict(layer.named_parameters())) == {"bias"}


def test_copies() -> None:
    weight = _layer().weight
    for other in (copy.copy(weight), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert (other.shape, other.dtype) == (weight.shape, weight.dtype)


def test_an_embeddings() -> None:
    embedding = QuantEmbedding(qk.quantize(torch.randn(32, 64), "q8_0"), torch.float16)
    assert (embedding.weight.shape, embedding.weight.dtype) == ((32, 64), torch.float16)
    assert embedding.bfloat16()(torch.tensor([1])).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="got a packed q8_0 weight"):
        _ = embedding.weight * 2


def test_torchs_fast_path_of_an_encoder_layer_steps_aside() -> None:
    """It multiplies with the weights of `linear1` and `linear2` without calling those layers."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    plain = copy.deepcopy(encoder)
    for name in ("linear1", "linear2"):
        packed = qk.QuantLinear.from_linear(getattr(encoder, name), "nf4")
        setattr(encoder, name, packed)
        with torch.no_grad():
            getattr(plain, name).weight.copy_(packed.packed.dequantize())
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), plain(x))
