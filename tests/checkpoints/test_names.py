"""transformers' names of tensors and those in files, in both directions."""

from __future__ import annotations

import pytest
import torch

from qkernels.checkpoints.hf.model_config import NoExperts
from qkernels.checkpoints.hf.names import Names
from qkernels.checkpoints.hf.writer import _experts_tensors, _stored_separately

from ..moe_checkpoint import tiny_moe
from ..tiny import tiny_model


def test_names_go_there_and_back() -> None:
    names = Names(tiny_moe("mixtral"))
    there = {
        "model.layers.0.mlp.gate.weight": "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.self_attn.q_proj.qweight": "model.layers.0.self_attn.q_proj.qweight",
        "model.layers.1.mlp.experts.3.w1.weight.absmax": (
            "model.layers.1.block_sparse_moe.experts.3.w1.weight.absmax"
        ),
    }
    for own, stored in there.items():
        assert names.to_stored(own) == stored
        assert names.from_stored(stored) == names.from_stored(own) == own
    assert names.from_stored("model.block_sparse_moe.nothing") == "model.block_sparse_moe.nothing"
    experts = names.experts["model.layers.0.mlp.experts"]
    assert experts.of(2, "down") == "model.layers.0.block_sparse_moe.experts.2.w2"


def test_names_of_models_without_experts_stay() -> None:
    names = Names(tiny_model())
    assert not names.experts
    assert all(
        names.to_stored(name) == name == names.from_stored(name)
        for name in tiny_model().state_dict()
    )


class _Renaming:
    """A renaming like transformers' own, more contrary than any of the model below."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def rename_source_key(self, name: str) -> tuple[str, None]:
        return name.replace(self.old, self.new), None


def test_names_that_would_not_come_back_stay() -> None:
    names = Names(tiny_moe("mixtral"))
    names._renamings = [_Renaming("q_proj", "o_proj")]
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert names.from_stored(q_proj) == q_proj, "a name that transformers has, too"
    names._reversed = [_Renaming("layers.0", "layers")]
    assert names.to_stored(q_proj) == q_proj
    names._reversed = [_Renaming("q_proj", "k_proj")]
    assert names.to_stored(q_proj) == q_proj


@pytest.mark.parametrize(
    "kind",
    [
        "afmoe",
        "ernie4_5_moe",
        "exaone_moe",
        "hy_v3",
        "jamba",
        "laguna",
        "minimax_m2",
        "phimoe",
        "qwen3_next",
    ],
)
def test_names_are_those_that_transformers_writes(kind: str) -> None:
    """For models of the usual size, without weights."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        pytest.skip(f"{kind} is not known to this transformers")
    with torch.device("meta"), NoExperts():
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
    names = Names(model)
    want = set(revert_weight_conversion(model, model.state_dict()))
    experts = {p: dict(_experts_tensors(p, model.get_submodule(p), names)) for p in names.experts}
    assert all(own.mapped for own in names.experts.values())
    assert all(_stored_separately(prefix, model.get_submodule(prefix), names) for prefix in experts)
    found = {n for own in experts.values() for n in own}
    found |= {
        names.to_stored(n)
        for n in model.state_dict()
        if names.experts.keys().isdisjoint([n.rpartition(".")[0]])
    }
    assert found == want
    for name in want:
        assert (
            names.layer_of(names.from_stored(name))
            or names.from_stored(name) in names._tensors
            or name in found
        )
    for prefix, own in experts.items():
        assert {names.experts_of(names.from_stored(name)) for name in own} == {prefix}


def test_experts_that_are_not_all_alike_stay_in_one_tensor() -> None:
    """LongCat has experts that change nothing and have no down projection."""
    model = tiny_moe("mixtral")
    names, prefix = Names(model), "model.layers.0.mlp.experts"
    module = model.get_submodule(prefix)
    assert _stored_separately(prefix, module, names)
    module.gate_up_proj = torch.nn.Parameter(torch.zeros(5, *module.gate_up_proj.shape[1:]))
    assert not _stored_separately(prefix, module, names)
