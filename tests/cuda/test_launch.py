"""Kept plans: the same results as new ones, and the calls that the extension gets."""

from __future__ import annotations

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import qkernels as qk
from bench import host
from qkernels.backends import registry
from qkernels.backends.cuda.calls import Call, WeightOnlyCall
from qkernels.backends.cuda.eight_bit import EightBitCall, QuantizeCall
from qkernels.backends.cuda.transforms import TransformCall
from qkernels.backends.plan import Product
from qkernels.backends.problem import problem_of

from ..conftest import DEVICE

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gptq", {"bits": 4, "group_size": 64}),
    ("gptq", {"bits": 3, "group_size": 64, "act_order": True}),
    ("q4_k", {}),
    ("spqr", {}),
    ("quip", {"bits": 2}),
    ("quip_sharp", {}),
    ("w8a8", {}),
    ("int8", {}),
    ("fp8", {"activation": "dynamic", "granularity": "block"}),
)
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])


def kept(p: qk.PackedWeight) -> dict[int, Any]:
    """The plans of the one product of `p`, by alignment."""
    (plan,) = [plan for plan in p.plans.values() if isinstance(getattr(plan, "run", None), Product)]
    plans: dict[int, Any] = plan.run._plans
    return plans


@pytest.mark.usefixtures("emulated", "poisoned")
@cases
@pytest.mark.parametrize("m", [1, 20])
def test_kept_plans_equal_new_ones(case: tuple[str, dict[str, Any]], m: int) -> None:
    name, params = case
    p = qk.quantize(torch.randn(40, 256), name, **params).to(DEVICE)
    for call in range(4):
        # The bias is not in x's dtype, so it is cast at each call.
        x, bias = torch.randn(m, 256).bfloat16().to(DEVICE), torch.randn(40).to(DEVICE)
        y = qk.matmul(x, p, bias, backend="cuda")
        problem = problem_of(p, m, x.dtype, x.device)
        want = registry.select(problem, "cuda").run(x, p, bias, problem)
        assert bool(want.isfinite().all())
        assert torch.equal(y, want), f"call {call}"
    assert list(kept(p)) == [0]


class Forgetful(dict[Any, Any]):
    """The plans of a weight that another thread clears all the time, and copies before that."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[Any] = []

    def __setitem__(self, key: Any, value: Any) -> None:
        self.copied.append(value.copy() if isinstance(value, Call) else value)


@pytest.mark.usefixtures("emulated", "poisoned")
@cases
@pytest.mark.parametrize("m", [1, 20])
def test_other_threads_clear_and_read_the_plans(case: tuple[str, dict[str, Any]], m: int) -> None:
    name, params = case
    p = qk.quantize(torch.randn(40, 256), name, **params).to(DEVICE)
    x = torch.randn(m, 256).half().to(DEVICE)
    want = qk.matmul(x, p, backend="cuda")
    p.plans = plans = Forgetful()
    assert torch.equal(qk.matmul(x, p, backend="cuda"), want)
    products = [call for call in plans.copied if isinstance(call, WeightOnlyCall)]
    assert all((call.kernel > 0) == (m > 16) for call in products)  # not the decode kernel
    (normed,) = qk.fused.rms_norm_matmul(x, x[0], 1e-6, [p], backend="cuda")
    assert bool(normed.isfinite().all())


@pytest.mark.usefixtures("emulated", "poisoned")
def test_rows_at_odd_addresses_have_their_own_plan() -> None:
    p = qk.quantize(torch.randn(40, 256), "gptq", group_size=64).to(DEVICE)
    for _ in range(4):
        x = torch.randn(12 * 256 + 1).half().to(DEVICE)[1:].view(12, 256)
        y = qk.matmul(x, p, backend="cuda")
        assert torch.equal(y, qk.matmul(x.clone(), p, backend="cuda"))
    assert sorted(kept(p)) == [0, 2]


def struct_of(name: str) -> type[Any]:
    if name.startswith("weight_only"):
        return WeightOnlyCall
    return {"quantize_rows": QuantizeCall, "transform_rows": TransformCall}.get(name, EightBitCall)


def values(call: Any) -> dict[str, Any]:
    fields = {name: getattr(call, name) for name, _ in call._fields_ if name != "args"}
    return fields | {f"args.{name}": getattr(call.args, name) for name, _ in call.args._fields_}


@cases
@pytest.mark.parametrize("m", [1, 20])
def test_the_extension_is_given_the_same(
    case: tuple[str, dict[str, Any]], m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake extension records the calls."""
    name, params = case
    taken: list[tuple[str, dict[str, Any]]] = []
    streams = iter(range(7, 100))

    class Extension:
        @staticmethod
        def run(name: str, address: int) -> str:
            call = struct_of(name).from_address(address)
            assert call.size == ctypes.sizeof(call)
            taken.append((name, values(call)))
            return ""

    from qkernels.backends import cuda

    kernel = host.launcher_of("cuda", name, params, m)
    assert kernel is not None
    p = qk.quantize(torch.randn(64, 256), name, **params)
    bias = torch.randn(64).half()
    # The context undoes its patches before null_extension does, so that neither outlives this test.
    extension, context = host.null_extension(), monkeypatch.context()
    with extension, host.only(kernel), torch.inference_mode(), context as patch:
        patch.setattr(cuda.build, "extension", lambda: Extension)
        patch.setattr(cuda, "stream_of", lambda index: next(streams))
        calls = []
        for _ in range(4):
            taken.clear()
            x = torch.randn(m, 256).half()
            y = qk.matmul(x, p, bias)
            first = taken[0][1]  # without codes x is args.x16
            ends = (
                first["args.x"] or first["args.x16"], taken[-1][1]["args.y"],
                taken[-1][1]["args.bias"],
            )  # fmt: skip
            assert ends[1:] == (y.data_ptr(), bias.data_ptr())
            # Where x is copied it is the copy that the kernel gets.
            assert ends[0] == x.data_ptr() or (m > 8 and "act_order" in params)
            calls.append(list(taken))
    for call in calls[1:]:
        for (name, first), (other, later) in zip(calls[0], call, strict=True):
            assert name == other
            for field, value in first.items():
                if isinstance(value, int) and value > 2**20:
                    assert later[field] > 2**20, f"{name}.{field}: an address"
                elif field not in ("stream", "pdl"):
                    assert later[field] == value, f"{name}.{field}"
    starts = [{fields["stream"] for _, fields in call} for call in calls]
    assert all(stream >= {7} or min(stream) > 7 for stream in starts)
    assert not starts[2] & starts[3], "a kept plan asks for the stream at each call"


def test_threads_share_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of other threads do not change this thread's call."""
    from qkernels.backends import cuda

    mine = threading.local()

    class Extension:
        @staticmethod
        def run(name: str, address: int) -> str:
            time.sleep(0)  # lets others run
            mine.taken.append(values(struct_of(name).from_address(address)))
            return ""

    def check(number: int) -> None:
        x = torch.randn(12, 256).half()
        for _ in range(50):
            mine.taken = []
            y = qk.matmul(x, p)
            quantize, product = mine.taken
            assert (quantize["args.x"], product["args.y"]) == (x.data_ptr(), y.data_ptr())
            assert quantize["args.codes"] == product["args.x"]
            assert quantize["args.scale"] == product["args.x_scale"]

    kernel = host.launcher_of("cuda", "w8a8", {})
    p = qk.quantize(torch.randn(64, 256), "w8a8")
    with host.null_extension(), host.only(kernel), monkeypatch.context() as patch:
        patch.setattr(cuda.build, "extension", lambda: Extension)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(check, range(8)))
