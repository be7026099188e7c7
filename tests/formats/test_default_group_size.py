"""The default group size is one for all layers, even if 128 does not divide K; one message."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import qkernels as qk
from qkernels.cli import main
from qkernels.integrations.transformers import QKernelsConfig
from qkernels.models.convert import convert_model
from qkernels.quantizers import awq

from ..moe_checkpoint import stacks_of, tiny_moe
from ..tiny import ids, save_tiny, tiny_model

#: hidden size and intermediate size of SmolLM2, a third of it each
SMOLLM2 = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
WORDS = (
    "qkernels: group_size 64 instead of 128, because 128 does not divide the 192 input features of "
)


@contextmanager
def said_once(words: str) -> Iterator[None]:
    """Assert that the context gives one warning of ours, with these words."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in said if str(w.message).startswith("qkernels: ")]
    assert len(ours) == 1, ours
    assert words in ours[0]


def sizes_of(model: nn.Module) -> set[int]:
    packed = [m.packed for m in model.modules() if isinstance(m, qk.QuantLinear)]
    stacks = [stack for experts in stacks_of(model) for stack in experts.parts.stacks]
    return {p.params["group_size"] for p in [*packed, *stacks]}


def assert_comes_back(model: nn.Module, path: Path, size: int) -> None:
    """Assert one group size in the config, and the same values from disk."""
    qk.save_model(model, path)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    config = config.get("config_groups", {}).get("group_0", {"weights": config})["weights"]
    assert config["group_size"] == size
    x = ids(20)[None]
    with torch.no_grad():
        assert torch.equal(qk.load_model(path)(x).logits, model(x).logits)


# ---------------------------------------------------------------------- whole models
@pytest.mark.parametrize("name", ["gptq", "awq", "pack_quantized"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_one_for_all_layers(name: str, calibrated: bool, tmp_path: Path) -> None:
    model = tiny_model(**SMOLLM2)
    with said_once(WORDS + "model.layers.0.self_attn.q_proj"):
        qk.quantize_model(model, name, ids(64).view(4, 16) if calibrated else None, progress=False)
    assert sizes_of(model) == {64}
    assert_comes_back(model, tmp_path / "m", 64)


def test_only_layers_that_are_quantized_count() -> None:
    """down_proj has 512 features; all other layers have 192."""
    model = tiny_model(**SMOLLM2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.quantize_model(
            model, "gptq", skip=["*.self_attn.*", "*.gate_proj", "*.up_proj"], progress=False
        )
    assert sizes_of(model) == {128}


@pytest.mark.parametrize(
    "params", [{"group_size": 128}, {"group_size": 128, "act_order": True}], ids=str
)
@pytest.mark.parametrize("name", ["gptq", "pack_quantized"])
def test_one_that_is_given_is_kept_and_comes_back(
    name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(**SMOLLM2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.quantize_model(model, name, progress=False, **params)
    packed = model.model.layers[0].mlp.up_proj.packed
    assert (
        packed.tensors["scales" if name == "gptq" else "weight_scale"].numel()
        == 2 * packed.shape[0]
    )
    assert_comes_back(model, tmp_path / "m", 128)


def test_one_that_awq_cannot_store_names_the_layer_and_changes_nothing() -> None:
    model = tiny_model(**SMOLLM2)
    message = (
        "q_proj: awq: group_size: expected -1 or a divisor of K=192, "
        "because awq stores no short last group"
    )
    with pytest.raises(ValueError, match=message):
        qk.quantize_model(model, "awq", group_size=128, progress=False)
    assert not sizes_of(model)


def test_experts_count_like_layers() -> None:
    """All layers have 256 features, but for the experts' down projections, which have 128 or 96."""
    model = tiny_moe("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.quantize_model(model, "gptq", experts=True, progress=False)
    assert sizes_of(model) == {128}
    model = tiny_moe("mixtral")
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.gate_up_proj = nn.Parameter(module.gate_up_proj[:, :192].detach().clone())
            module.down_proj = nn.Parameter(module.down_proj[..., :96].detach().clone())
    with said_once(
        "32 instead of 128, because 128 does not divide the 96 input features of model.layers.0."
    ):
        qk.quantize_model(model, "gptq", experts=True, progress=False)
    assert sizes_of(model) == {32}


def test_while_transformers_loads(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", **SMOLLM2)
    config = QKernelsConfig("gptq")
    with said_once(WORDS + "model.layers.0.self_attn.q_proj"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config)
    assert sizes_of(model) == {64}
    assert config.params == {}, "another model may need another"
    model.save_pretrained(tmp_path / "s")
    assert sizes_of(qk.load_model(tmp_path / "s")) == {64}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "m", **SMOLLM2)
    assert (
        main(
            [
                "quantize",
                str(tmp_path / "m"),
                "-f",
                "gptq",
                "-o",
                str(tmp_path / "q"),
                "--no-report",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "group_size" in line] == [
        WORDS + "model.layers.0.self_attn.q_proj"
    ]
    with pytest.warns(UserWarning, match="somebody else's"):
        warnings.warn("somebody else's", stacklevel=1)  # shown as ever again


@pytest.mark.parametrize("source", ["q4_1", "nf4"])
def test_convert_chooses_one_for_all_layers(source: str, tmp_path: Path) -> None:
    model = qk.quantize_model(tiny_model(**SMOLLM2), source, progress=False)
    with said_once(WORDS + "model.layers.0.self_attn.q_proj"):
        found = convert_model(model, "awq")
    assert {c.how for c in found} == {"requantized"}
    assert sizes_of(model) == {64}
    assert_comes_back(model, tmp_path / "m", 64)


# ---------------------------------------------------------------------- AWQ's clipping
@pytest.mark.parametrize("size", [64, 100, 256])
def test_clip_search_minds_a_short_last_group(size: int) -> None:
    """The output error of no group grows, and that of some full and some short groups falls."""
    n, k = 24, 160
    weight, x = torch.randn(n, k) ** 3, torch.randn(300, k) * torch.linspace(0.2, 3, k)
    hessian = x.T @ x / 300

    def round_trip(w: torch.Tensor) -> torch.Tensor:
        return qk.quantize(w, "gptq", bits=3, group_size=size).dequantize()

    clipped = awq.search_clip(weight, hessian, size, round_trip)
    before, after = weight - round_trip(weight), weight - round_trip(clipped)
    for begin in range(0, k, size):
        part = slice(begin, begin + size)
        errors = [((d[:, part] @ hessian[part, part]) * d[:, part]).sum(1) for d in (before, after)]
        assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
        assert errors[1].sum() < 0.95 * errors[0].sum()
