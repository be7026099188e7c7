"""Batch-invariant mode: the same row gives bitwise the same output, whatever M is."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch

import qkernels as qk
from qkernels.backends import registry

from ..conftest import DEVICE, k_of

pytest.importorskip("triton")
from qkernels.backends.problem import Problem
from qkernels.backends.triton import autotune, configs, eight_bit, weight_only

from .instances import cases_by_sums, fused_cases
from .launches import Launches

pytestmark = pytest.mark.usefixtures("dots_in_one_order")
MOST = 300


def operands(
    name: str, params: dict[str, object], dtype: torch.dtype
) -> tuple[qk.PackedWeight, torch.Tensor]:
    p = qk.quantize(torch.randn(24, k_of(name, 576)), name, **params).to(DEVICE)
    x = torch.randn(MOST, p.shape[1], dtype=torch.float32)
    x[::7, ::50] *= 8  # outliers, for LLM.int8(): in some rows only
    return p, x.to(dtype).to(DEVICE)


def decisions(
    p: qk.PackedWeight, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> dict[Hashable, list[int]]:
    """Decisions of the launchers -> the M in 1..300 with these decisions. Nothing is computed."""
    found: dict[Hashable, list[int]] = {}
    with monkeypatch.context() as patch:
        patch.setattr(autotune, "_first_calls", {})
        launches = Launches(patch)
        p.plans.clear()  # kept launches hold the kernels themselves
        for m in range(1, MOST + 1):
            launches.calls.clear()
            qk.matmul(x[:m], p, backend="triton", batch_invariant=True)
            found.setdefault(launches.decisions(m), []).append(m)
    p.plans.clear()
    return found


@cases_by_sums
def test_rows_do_not_depend_on_m(
    name: str, params: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every M from 1 to 300 on a GPU. The interpreter would take an hour, so it computes a few M.

    A program depends on M in two ways: through the host's decisions (kernels, compile-time
    constants, slices of K, strides), and through the bound `m < M`, which masks rows and does not
    change the arithmetic of other rows. So the test walks all M with kernels that only record the
    decisions. Of each group of M with the same decisions it computes the smallest and the largest:
    these have the fewest and the most blocks, and a last block that is full or nearly empty. The
    groups follow from the tables and launchers, so a new entry or threshold adds its own M.
    """
    if DEVICE == "cpu":  # so few that more rows would leave fewer for the slices of K
        for module in (weight_only, eight_bit):
            monkeypatch.setattr(module, "sm_count", lambda device: 4)
    p, x = operands(name, params, torch.float16)
    full = qk.matmul(x, p, backend="triton", batch_invariant=True)
    assert bool(full.isfinite().all())
    groups = decisions(p, x, monkeypatch)
    assert sorted(m for group in groups.values() for m in group) == list(range(1, MOST + 1))
    assert len(groups) > 1, "one tile for all M: this test would compare little"
    ends = sorted({end for group in groups.values() for end in (group[0], group[-1])} - {MOST})
    assert len(ends) < 12, f"too many to compute in the interpreter: {ends}"
    for m in ends if DEVICE == "cpu" else range(1, MOST):
        part = qk.matmul(x[:m], p, backend="triton", batch_invariant=True)
        assert torch.equal(part, full[:m]), f"M={m}"
    one = qk.matmul(x[MOST - 1 :], p, backend="triton", batch_invariant=True)
    assert torch.equal(one, full[MOST - 1 :])


@pytest.mark.parametrize("arch", sorted(configs.SHARED_KIB))
@pytest.mark.parametrize("family", sorted(configs.BATCH_INVARIANT))
def test_only_the_rows_of_a_tile_depend_on_m_on_any_gpu(family: str, arch: int) -> None:
    """The tables of GPUs that the interpreter never uses: the order of the sum over K must not
    depend on M.

    The number of stages does not matter, because it only says how far ahead loads are. The block
    size and the K slices decide how K is cut.
    """
    sizes = {
        "eight_bit": configs.StepSizes(64, 128),
        "weight_only": configs.StepSizes(256, 96, 160),
    }[family.split(".")[0]]
    found = {
        configs.choose(family, arch, m, True, sizes)._replace(block_m=0, num_stages=0)
        for m in range(1, MOST + 1)
    }
    assert len(found) == 1
    for sm_count in (46, 132, 148):
        k_slices = {
            configs.k_slices_of(config, 64, -(-8192 // config.block_n), sm_count)
            for config in found
        }
        assert len(k_slices) == 1


def test_transforms_are_cut_alike_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many features that few rows and many would be cut into other boxes otherwise."""
    p = qk.quantize(torch.randn(8, 8192), "quip_sharp").to(DEVICE).prepack_("weight_only")
    x = torch.randn(17, 8192).half().to(DEVICE)
    launches = Launches(monkeypatch)

    def boxes(m: int, invariant: bool) -> list[tuple[int, ...]]:
        launches.calls.clear()
        p.plans.clear()
        qk.matmul(x[:m], p, backend="triton", batch_invariant=invariant)
        calls = [named for name, _, named in launches.calls if name == "kronecker_rows"]
        return [tuple(named[key] for key in ("A0", "C", "A1", "A2")) for named in calls]

    assert len(boxes(1, True)) == 2
    assert boxes(1, True) == boxes(17, True)
    assert boxes(1, False) != boxes(17, False)


@fused_cases
def test_the_reference_does_not_depend_on_m(name: str, params: dict[str, object]) -> None:
    p, x = operands(name, params, torch.float32)
    full = qk.matmul(x, p, backend="reference", batch_invariant=True)
    for m in (1, 3, 16, 17, 33, 63, 64, 65, 129, 257):  # it takes 64 rows at a time
        assert torch.equal(
            qk.matmul(x[:m], p, backend="reference", batch_invariant=True), full[:m]
        ), f"M={m}"
    assert torch.equal(qk.matmul(x[299:], p, backend="reference", batch_invariant=True), full[299:])


def test_parallel_and_sequential_k_slices_sum_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the workspace would be too large, one program computes all K slices, in the same order."""
    p = qk.quantize(torch.randn(40, 1000), "gptq", group_size=-1).to(DEVICE)
    x = torch.randn(20, 1000).half().to(DEVICE)
    split = qk.matmul(x, p, backend="triton", batch_invariant=True)
    calls = []
    real = weight_only.split_of
    monkeypatch.setattr(weight_only, "split_of", lambda *a: calls.append(real(*a)) or 1)
    p.plans.clear()  # a kept launch would not ask again
    assert torch.equal(qk.matmul(x, p, backend="triton", batch_invariant=True), split)
    assert calls[0] > 1, "the first call did not split K, so this test compared nothing"


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    p = qk.quantize(torch.randn(16, 64), "nf4")
    seen = []
    real = registry.select

    def spy(problem: Problem, backend: str = "auto") -> registry.Kernel:
        seen.append(problem.batch_invariant)
        return real(problem, backend)

    monkeypatch.setattr(registry, "select", spy)
    x = torch.randn(2, 64)
    qk.matmul(x, p)
    monkeypatch.setenv("QKERNELS_BATCH_INVARIANT", "1")
    qk.matmul(x, p)
    qk.matmul(x, p, batch_invariant=False)
    monkeypatch.setenv("QKERNELS_BATCH_INVARIANT", "0")
    qk.QuantLinear(p, batch_invariant=True)(x)
    assert [seen[0], any(seen[1:3]), seen[-1]] == [False, True, True]
    monkeypatch.setenv("QKERNELS_BATCH_INVARIANT", "yes")
    with pytest.raises(ValueError, match="QKERNELS_BATCH_INVARIANT: expected 0 or 1, got 'yes'"):
        qk.matmul(x, p)


def test_dense_baseline_takes_the_invariant_path_too() -> None:
    p = qk.quantize(torch.randn(16, 64), "bf16").to(DEVICE)
    x = torch.randn(70, 64).bfloat16().to(DEVICE)
    full = qk.matmul(x, p, batch_invariant=True)
    assert torch.equal(qk.matmul(x[:1], p, batch_invariant=True), full[:1])
    assert qk.explain(p, 1, torch.bfloat16).kernel == "torch.linear"
    assert qk.explain(p, 1, torch.bfloat16, batch_invariant=True).kernel == "reference.dequantize"
