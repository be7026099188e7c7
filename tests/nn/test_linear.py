"""QuantLinear as a drop-in nn.Linear: state_dict, dtype and device moves, gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels as qk

from ..conftest import DEVICE, all_cases, k_of
from ..reference import assert_fused_close


@all_cases
@pytest.mark.parametrize("prepacked", [False, True])
def test_state_dict_is_the_checkpoint_bit_for_bit(
    name: str, params: dict[str, object], prepacked: bool
) -> None:
    k = k_of(name, 192)
    p = qk.quantize(torch.randn(16, k), name, **params)
    want = {k: v.clone() for k, v in p.tensors.items()}
    bias = torch.randn(16)
    model = nn.Sequential(qk.QuantLinear(p, bias))
    if prepacked and (layout := qk.formats.get(name).kernel_layout(p.params)):
        layer = model[0]
        layer._hold(layer.packed.prepack_(layout))
    state = model.state_dict()
    assert set(state) == {f"0.{k}" for k in want} | {"0.bias"}
    for key, tensor in want.items():
        got = state[f"0.{key}"].cpu().flatten()
        assert torch.equal(got.view(torch.uint8), tensor.flatten().view(torch.uint8)), key

    other = nn.Sequential(
        qk.QuantLinear(qk.quantize(torch.randn(16, k), name, **params), torch.zeros(16))
    )
    assert not other.load_state_dict(state).missing_keys
    x = torch.randn(4, k)
    assert torch.equal(other(x), qk.matmul(x, p, bias))


def test_load_state_dict_reports_missing_and_bad() -> None:
    layer = qk.QuantLinear(qk.quantize(torch.randn(16, 64), "gptq", group_size=32))
    state = layer.state_dict()
    short = {k: v for k, v in state.items() if k != "scales"}
    assert layer.load_state_dict(short, strict=False).missing_keys == ["scales"]
    with pytest.raises(RuntimeError, match="scales"):
        layer.load_state_dict(short)
    with pytest.raises(ValueError, match="qweight: expected dtype int32, got float32"):
        layer.load_state_dict({**state, "qweight": state["qweight"].float()})


@all_cases
def test_loading_from_the_meta_device(name: str, params: dict[str, object]) -> None:
    """As nn.Linear: assign=True takes the state dict's tensors, else there is no memory to fill."""
    k = k_of(name, 192)

    def layer() -> nn.Module:
        return nn.Sequential(
            qk.QuantLinear(qk.quantize(torch.randn(16, k), name, **params), torch.zeros(16))
        )

    source, x = layer(), torch.randn(4, k)
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    empty = layer().to("meta")
    assert str(empty.load_state_dict(state, assign=True)) == "<All keys matched successfully>"
    loaded = empty.state_dict()
    assert not any(tensor.is_meta for tensor in loaded.values())
    assert all(loaded[key].data_ptr() == tensor.data_ptr() for key, tensor in state.items())
    assert torch.equal(empty(x), source(x))

    empty = layer().to("meta")
    with pytest.warns(
        UserWarning, match="0.: the packed weight stays without data on the meta device"
    ):
        empty.load_state_dict(state)
    assert all(tensor.is_meta for tensor in empty[0].packed.tensors.values())
    roomy = empty.to_empty(device="cpu")
    roomy.load_state_dict(state)
    assert torch.equal(roomy(x), source(x))


def test_dtype_moves_leave_the_packed_tensors_alone() -> None:
    layer = qk.QuantLinear(
        qk.quantize(torch.randn(16, 64), "nf4", double_quant=True), torch.randn(16)
    )
    before = {k: v.clone() for k, v in layer.packed.tensors.items()}
    layer = layer.half()
    assert layer.bias.dtype == torch.float16
    for key, tensor in layer.packed.tensors.items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key])
    assert layer(torch.randn(2, 64).half()).dtype == torch.float16
    assert {t.device.type for t in layer.to("meta").packed.storage.values()} == {"meta"}


def test_from_linear_matches_the_linear() -> None:
    linear = nn.Linear(64, 16)
    layer = qk.QuantLinear.from_linear(linear, "gptq", bits=8, group_size=32)
    x = torch.randn(2, 3, 64)
    assert (layer(x) - linear(x)).norm() < 0.02 * linear(x).norm()
    assert layer.bias is not linear.bias
    assert qk.QuantLinear.from_linear(nn.Linear(64, 16, bias=False), "nf4").bias is None
    assert "in_features=64, out_features=16, bias=True, format='gptq'" in repr(layer)


def test_gradient_reaches_input_and_bias_and_nothing_else() -> None:
    layer = qk.QuantLinear.from_linear(nn.Linear(64, 16), "nf4")
    assert [n for n, _ in layer.named_parameters()] == ["bias"]
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert layer.bias.grad is not None


def test_deepcopy_and_memory_stay_packed() -> None:
    layer = qk.QuantLinear.from_linear(nn.Linear(256, 256, bias=False), "nf4")
    copied = copy.deepcopy(layer)
    x = torch.randn(2, 256)
    assert torch.equal(copied(x), layer(x))
    nbytes = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert nbytes == layer.packed.nbytes


@pytest.mark.parametrize(
    ("name", "between"), [("q4_0", ", "), ("fp4", ", block_size=64, double_quant=False")]
)
def test_text_of_formats_with_and_without_parameters(name: str, between: str) -> None:
    p, experts = (
        qk.quantize(torch.randn(8, 64), name),
        qk.quantize_experts(torch.randn(1, 8, 64), name),
    )
    assert f"'{name}', shape=(8, 64){between}" in repr(p)
    assert f"'{name}', shape=(8, 64){between}" in repr(experts)
    assert f"format='{name}'{between}" in repr(qk.QuantLinear(p))
    for text in (repr(p), repr(experts), repr(qk.QuantLinear(p))):
        assert ", ," not in text


def test_prepack_keeps_one_copy() -> None:
    pytest.importorskip("triton")
    layer = qk.QuantLinear(
        qk.quantize(torch.randn(256, 256), "gptq", group_size=64), backend="triton"
    )
    x = torch.randn(2, 256).half()
    layer.prepack(x)
    assert "layout='weight_only'" in repr(layer)
    nbytes = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert nbytes <= 1.02 * layer.packed.nbytes  # zero points take a byte each, not four bits
    assert_fused_close(layer(x), x, layer.packed)


def test_bad_bias() -> None:
    with pytest.raises(ValueError, match=r"bias: expected a floating tensor of shape \(16,\)"):
        qk.QuantLinear(qk.quantize(torch.randn(16, 64), "nf4"), torch.randn(15))


# ---------------------------------------------------------------------- what a call costs the host
def test_only_the_first_call_checks_and_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = qk.QuantLinear(qk.quantize(torch.randn(16, 64), "nf4"), torch.randn(16))
    layer.requires_grad_(False)
    x = torch.randn(2, 3, 64)
    want = layer(x)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(qk.ops.matmul, "check_operands", fail)
    monkeypatch.setattr(qk.backends.registry, "select", fail)
    assert torch.equal(layer(x), want)
    assert torch.equal(qk.matmul(x, layer.packed, layer.bias), want)
    with pytest.raises(AssertionError, match="done again"):
        layer(x[:1])  # another shape is another plan
    with pytest.raises(AssertionError, match="done again"):
        layer(x.requires_grad_())  # autograd must see an operator


def test_layers_that_share_a_weight_move_it_each_for_itself() -> None:
    pytest.importorskip("triton")
    p = qk.quantize(torch.randn(16, 64), "gptq", group_size=32).to(DEVICE)
    x = torch.randn(2, 64).half().to(DEVICE)
    one, two = (qk.QuantLinear(p, backend="triton") for _ in range(2))
    want = qk.QuantLinear(p, backend="reference")(x)
    for layer in (one, two, one):
        torch.testing.assert_close(layer(x), want, rtol=1e-2, atol=1e-2)
    assert p.layout == "checkpoint"
    layer = pickle.loads(pickle.dumps(one))
    assert torch.equal(layer(x), one(x))
    layer = copy.deepcopy(one)
    assert torch.equal(layer(x), one(x))


def test_replaced_buffers_are_seen() -> None:
    """Offloading hooks replace buffers."""
    layer = qk.QuantLinear(qk.quantize(torch.randn(16, 64), "w8a8"), backend="reference")
    x = torch.randn(2, 64)
    want = layer(x)
    key = next(key for key in layer._buffers if key.endswith("weight_scale"))
    layer._buffers[key] = layer._buffers[key] * 2
    torch.testing.assert_close(layer(x), want * 2)


def test_modes_and_transforms_see_an_operator() -> None:
    layer = qk.QuantLinear(qk.quantize(torch.randn(16, 64), "nf4")).requires_grad_(False)
    x = torch.randn(3, 64)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    layer(x)
    with Watch():
        layer(x)
    assert "qkernels.matmul.default" in seen
    # the operator refuses; an eager call would give wrong gradients
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jacrev(lambda v: layer(v))(x[0])


def test_multiply_takes_another_bias() -> None:
    layer = qk.QuantLinear(qk.quantize(torch.randn(8, 64), "nf4"), torch.randn(8))
    x, bias = torch.randn(3, 64), torch.randn(8)
    plain = x @ layer.packed.dequantize().T
    torch.testing.assert_close(layer.multiply(x, None), plain)
    torch.testing.assert_close(layer.multiply(x, bias), plain + bias)
    torch.testing.assert_close(layer(x), plain + layer.bias)
