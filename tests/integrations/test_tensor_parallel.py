"""Two processes give the result of one, for every format, by columns, rows and whole models."""

from __future__ import annotations

import copy
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import qkernels as qk
from qkernels.integrations import tensor_parallel as tp
from qkernels.weights.sharding import COLUMNS, ROWS

from ..conftest import CASES, case_id
from ..tiny import ids, tiny_model

#: (format, parameters) of a whole model with 64 hidden features
MODEL_FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {"group_size": 32}), ("awq", {"group_size": 16}), ("nf4", {"block_size": 32}),
    ("bf16", {}),
    ("w8a8", {}), ("int8", {}), ("fp8", {}),
]  # fmt: skip


def cannot_be_cut(p: qk.PackedWeight, dim: int) -> bool:
    """Whether two parts would cut a group, a block or a word."""
    return bool(p.shape[dim] % (2 * qk.formats.get(p.format).cuts(p.shape, p.params)[dim]))


def tolerance(name: str, params: dict[str, Any], dim: int) -> float:
    """Relative error that two processes may add.

    Sums in float32 have another order. A process that sees half of a row finds another scale for
    the codes of activations: each code may be off by half a step of 1/127 or 2^-4.
    """
    dynamic = name in ("int8", "w8a8") or (name == "fp8" and params.get("activation") == "dynamic")
    if dim == ROWS or not dynamic or params.get("activation") == "static":
        return 1e-5 if name not in ("bf16", "fp16") else 1e-2
    return 0.1 if name == "fp8" else 0.02


@torch.no_grad()
def check_layers() -> None:
    torch.manual_seed(1)
    for name, params in CASES:
        layer = qk.QuantLinear(qk.quantize(torch.randn(256, 768), name, **params), torch.randn(256))
        layer.backend = "reference"
        x = torch.randn(5, 768)
        want = layer(x)
        for dim in (ROWS, COLUMNS):
            model = torch.nn.Sequential(copy.deepcopy(layer))
            if cannot_be_cut(layer.packed, dim):
                with pytest.raises(ValueError, match="^0: "):
                    tp.parallelize(model, plan={"0": dim})
                assert type(model[0]) is qk.QuantLinear, "changed in spite of an error"
                continue
            tp.parallelize(model, plan={"0": dim}, gather=True)
            mine = x if dim == ROWS else x.chunk(2, -1)[dist.get_rank()]
            error = float((model(mine) - want).norm() / want.norm())
            assert error < tolerance(name, params, dim), f"{name} {params} dim {dim}: {error}"


def check_models() -> None:
    for name, params in MODEL_FORMATS:
        model = tiny_model(intermediate_size=128)
        if name != "bf16":
            qk.quantize_model(model, name, progress=False, **params)
        tokens = ids(24, seed=5)[None]
        with torch.no_grad():
            want = model(tokens).logits
            held = qk.models.quantize.model_summary(model).quantized_bytes
            tp.parallelize(model)
            found = model(tokens).logits
        error = float((found - want).norm() / want.norm())
        assert error < (1e-4 if name in ("gptq", "awq", "nf4", "bf16", "fp8") else 0.1), (
            f"{name}: {error}"
        )
        if name != "bf16":
            assert qk.models.quantize.model_summary(model).quantized_bytes < 0.6 * held


def work(rank: int, file: str, checks: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        for check in checks:
            globals()[check]()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path / "store"), ("check_layers", "check_models")), nprocs=2)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_bad_input(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    qk.quantize_model(model, "gptq", group_size=32, progress=False)
    with pytest.raises(
        ValueError, match="plan: expected patterns that match a linear layer, got 'no.such'"
    ):
        tp.parallelize(model, plan={"no.such": ROWS})
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    with pytest.raises(
        ValueError, match="expected num_attention_heads=4 to be a multiple of 3 processes"
    ):
        tp.parallelize(model)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    with pytest.raises(ValueError, match="expected num_key_value_heads=2 to be a multiple of 4"):
        tp.parallelize(model)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    with pytest.raises(ValueError, match=r"down_proj: gptq: columns: .* counts that work: 1, 3"):
        tp.parallelize(model)  # 96 features are three groups of 32
    model.config.model_type = "mystery"
    with pytest.raises(ValueError, match="plan: expected one for a model of type 'mystery'"):
        tp.parallelize(model)
    assert sum(isinstance(m, qk.QuantLinear) for m in model.modules()) == 14


def test_case_ids_are_unique() -> None:
    assert len({case_id(case) for case in CASES}) == len(CASES)
