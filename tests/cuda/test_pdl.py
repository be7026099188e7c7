"""When CUDA kernels may start early (PDL): not while another kernel may still write the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qkernels as qk
from bench import host
from qkernels import counters
from qkernels.backends import cuda, device
from qkernels.backends.cuda import launch
from qkernels.backends.triton.launch import pdl

from .test_launch import struct_of

#: weights with one kernel, with two of which both read it, and with several tensors
CASES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("gptq", {"bits": 4, "group_size": 64}, 1),
    ("gptq", {"bits": 4, "group_size": 64}, 20),
    ("nf4", {"double_quant": True}, 1),
    ("q4_k", {}, 300),
    ("quip_sharp", {}, 1),
    ("w8a8", {}, 20),
)


#: the tensors that kernels are given
READ = {
    "gptq": {"qdata", "scaler.scales", "scaler.zeros"},
    "nf4": {
        "qdata",
        "lut",
        "scaler.absmax",
        "scaler.nested_map",
        "scaler.nested_absmax",
        "scaler.offset",
    },
    "q4_k": {"qdata", "scaler.d", "scaler.dmin", "scaler.scales"},
    "quip_sharp": {"qdata", "lut", "scaler.absmax", "input.diagonal", "output.diagonal"},
    "w8a8": {"weight", "weight_scale"},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """An extension that notes whether launches have PDL, and the stream that they go to."""
    state = SimpleNamespace(stream=7, capture=0, pdl=set())

    class Extension:
        @staticmethod
        def run(name: str, address: int) -> str:
            state.pdl.add(struct_of(name).from_address(address).pdl)
            return ""

    with host.null_extension(), monkeypatch.context() as patch:
        patch.setattr(cuda.build, "extension", lambda: Extension)
        patch.setattr(cuda, "stream_of", lambda index: state.stream)
        patch.setattr(counters, "capture_of", lambda stream: state.capture)
        yield state


def caller(gpu: SimpleNamespace, p: qk.PackedWeight, m: int = 1) -> Callable[..., bool]:
    """A function that computes a product on a stream, perhaps in a capture: whether with PDL."""
    kernel = host.launcher_of("cuda", p.format, p.params, m)
    assert kernel is not None
    x = torch.randn(m, p.shape[1]).half()

    def call(stream: int = 7, capture: int = 0) -> bool:
        gpu.stream, gpu.capture, gpu.pdl = stream, capture, set()
        with host.only(kernel):
            qk.matmul(x, p)
        (early,) = gpu.pdl  # all launches of a product agree
        return bool(early)

    return call


def weight(name: str = "gptq", **params: Any) -> qk.PackedWeight:
    return qk.quantize(torch.randn(64, 256), name, **params)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_a_change_in_place_of_any_tensor(
    gpu: SimpleNamespace, case: tuple[str, dict[str, Any], int], inference: bool
) -> None:
    """The launch after it waits for the kernels before, and later ones do not."""
    name, params, m = case
    p = weight(name, **params)
    call = caller(gpu, p, m)
    with torch.inference_mode(inference):
        assert [call(), call(), call()] == [False, True, True]
        waited = set()
        for key, tensor in p.storage.items():
            tensor.view(-1)[:1].copy_(tensor.view(-1)[:1].clone())  # through a view
            waited |= set() if call() else {key}
            assert call()
    extra = {key for key in p.storage if key.startswith("extra.")}  # the kernel's tensors are views
    assert waited - extra == READ[name]


def test_the_operator(gpu: SimpleNamespace) -> None:
    """What torch.compile's code calls has plans of its own."""
    p, x = weight(group_size=64), torch.randn(1, 256).half()
    call = caller(gpu, p)
    call()  # prepacks the weight
    kernel = host.launcher_of("cuda", p.format, p.params)

    def operator() -> set[int]:
        gpu.pdl = set()
        operands = x, list(p.storage.values()), None, qk.ops.matmul.spec_of(p), "auto", False
        with host.only(kernel):
            torch.ops.qkernels.matmul(*operands)
        early: set[int] = gpu.pdl
        return early

    assert [operator(), operator()] == [{0}, {1}]
    p.storage["qdata"].zero_()
    assert [operator(), operator(), call(), call()] == [{0}, {1}, False, True]


def test_each_stream_waits_for_itself(gpu: SimpleNamespace) -> None:
    """Another stream's launch does not make this stream wait for what wrote the weight."""
    p = weight(group_size=64)
    call = caller(gpu, p)
    assert [call(7), call(8), call(7), call(8), call(0), call(0)] == [
        False, False, True, True, False, True,
    ]  # fmt: skip
    p.storage["qdata"].zero_()
    assert [call(7), call(8), call(7), call(8)] == [False, False, True, True]


@pytest.mark.parametrize("capture", [3, counters.UNKNOWN])
def test_captured_launches(gpu: SimpleNamespace, capture: int) -> None:
    """A graph waits as a whole for what came before; a change that is captured counts, too."""
    p = weight(group_size=64)
    call = caller(gpu, p)
    assert not call(9, capture), "nothing has waited for what wrote the weight"
    assert not call(9), "what is captured has not run"
    assert [call(9), call(10, capture), call(9, capture)] == [True, True, True]
    p.storage["qdata"].zero_()  # perhaps captured
    assert not call(10, capture)
    assert not call(9), "the change may not be captured"
    assert [call(9), call(10, capture)] == [True, True]


def test_what_torch_does_not_count(gpu: SimpleNamespace) -> None:
    """As docs/kernels.md says, with the way out."""
    p = weight(group_size=64)
    call = caller(gpu, p)
    call()
    p.storage["qdata"].data.zero_()
    assert call()
    torch.autograd.graph.increment_version(list(p.storage.values()))
    assert [call(), call()] == [False, True]


def test_a_plan_keeps_no_tensor_of_the_weight() -> None:
    tensor = torch.zeros(1024)
    changes = launch.Changes([tensor, tensor])
    assert not any(twin.numel() for twin in vars(changes.twins).values())
    first = changes.counts(changes.twins)
    tensor[3] = 1
    second = changes.counts(changes.twins)
    del tensor
    assert first != second
    assert changes.counts(changes.twins) == second


@pytest.mark.parametrize(("value", "early"), [("0", False), ("1", True), (None, True)])
def test_the_environment_switches_pdl_off(
    gpu: SimpleNamespace, value: str | None, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both languages."""
    if value is None:
        monkeypatch.delenv("QKERNELS_PDL", raising=False)
    else:
        monkeypatch.setenv("QKERNELS_PDL", value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(launch, "supports_pdl", lambda index: device.supports_pdl(0))
    device.supports_pdl.cache_clear()
    call = caller(gpu, weight(group_size=64))
    assert [call(), call()] == [False, early]
    assert pdl(torch.device("cuda", 0)) == (
        {"PDL": True, "launch_pdl": True} if early else {"PDL": False}
    )
    device.supports_pdl.cache_clear()
