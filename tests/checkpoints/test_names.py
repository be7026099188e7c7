"""transformers' names of tensors and those of files: there and back."""

from __future__ import annotations

from qkernels.checkpoints.names import Names

from ..moe_checkpoint import tiny_moe
from ..tiny import tiny_model


def test_names_go_there_and_back() -> None:
    names = Names(tiny_moe("mixtral"))
    there = {
        "model.layers.0.mlp.gate.weight": "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.self_attn.q_proj.qweight": "model.layers.0.self_attn.q_proj.qweight",
        "model.layers.1.mlp.experts.3.w1.weight.absmax": "model.layers.1.block_sparse_moe.experts.3.w1.weight.absmax",
    }
    for own, stored in there.items():
        assert names.written(own) == stored
        assert names.of_file(stored) == names.of_file(own) == own
    assert names.of_file("model.block_sparse_moe.nothing") == "model.block_sparse_moe.nothing"
    experts = names.experts["model.layers.0.mlp.experts"]
    assert experts.of(2, "down") == "model.layers.0.block_sparse_moe.experts.2.w2"


def test_names_of_models_without_experts_stay() -> None:
    names = Names(tiny_model())
    assert not names.experts
    assert all(names.written(name) == name == names.of_file(name) for name in tiny_model().state_dict())


class _Renaming:
    """Like transformers' own, of which the model below has none so contrary."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def rename_source_key(self, name: str) -> tuple[str, None]:
        return name.replace(self.old, self.new), None


def test_names_that_would_not_come_back_stay() -> None:
    names = Names(tiny_moe("mixtral"))
    names._renamings = [_Renaming("self_attn", "mlp")]
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert names.of_file(q_proj) == q_proj, "a name that transformers has, too"
    names._reversed = [_Renaming("layers.0", "layers")]
    assert names.written(q_proj) == q_proj
    names._reversed = [_Renaming("q_proj", "k_proj")]
    assert names.written(q_proj) == q_proj
