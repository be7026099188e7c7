"""GGUF files of mixtures of experts, each of whose tensors holds all experts of a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

import qkernels as qk
from qkernels.checkpoints.gguf import reader as gguf
from qkernels.nn.experts import expert_modules

from ..moe_checkpoint import stacks_of
from .gguf_files import rewrite
from .test_gguf_models import SIZES, bpe_tokenizer, logits, model_of

E, K, INNER, USED = 4, 64, 96, 2
#: architecture -> the dense one whose attention it has, transformers' config, fields that llama.cpp
#: does not ask for
KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", MixtralConfig,
     {"num_local_experts": E, "head_dim": 16, "rms_norm_eps": 1e-6}),
    "qwen3moe": ("qwen3", Qwen3MoeConfig, {"num_experts": E, "head_dim": 16,
                                           "norm_topk_prob": True}),
    "qwen2moe": ("qwen2", Qwen2MoeConfig, {"num_experts": E, "norm_topk_prob": False}),
}  # fmt: skip


def blocks(values: torch.Tensor, name: str) -> tuple[Any, torch.Tensor]:
    """(blocks in the file for a matrix or for one per expert, their values)."""
    if name == "f32":
        return values.numpy(), values
    packed = [qk.quantize(part, name) for part in values.reshape(-1, *values.shape[-2:])]
    worth = torch.stack([p.dequantize() for p in packed]).view(values.shape)
    if name == "fp16":
        return values.half().numpy(), worth
    data = torch.stack([p.tensors["data"] for p in packed]).view(*values.shape[:-1], -1)
    return (data.numpy(), package.GGMLQuantizationType[name.upper()]), worth


def mixture(
    kind: str,
    tmp_path: Path,
    gate: str = "q8_0",
    up: str = "q8_0",
    down: str = "q4_0",
    sizes: tuple[int, int] = (INNER, 32),
    **changes: Any,
) -> tuple[Path, nn.Module]:
    """A GGUF file of experts, made from one without, and transformers' model with its values.

    sizes: of each expert, and of a shared one.

    sizes: of each expert, and of a shared one.
    """
    inner, shared = sizes
    base, config, fields = KINDS[kind]
    dense = model_of(base, tie_word_embeddings=False)
    qk.quantize_model(dense, "q8_0", progress=False)
    source = tmp_path / "dense.gguf"
    qk.save_model(dense, source, bpe_tokenizer())
    dense, _ = gguf.load_dequantized(source)
    settings = dense.config.to_dict()
    more = {
        key: settings[key] for key in ("rope_parameters", "max_position_embeddings", "rms_norm_eps")
    }
    want = AutoModelForCausalLM.from_config(
        config(
            **{**SIZES, **fields, **more},
            num_experts_per_tok=USED,
            tie_word_embeddings=False,
            moe_intermediate_size=inner,
            shared_expert_intermediate_size=shared,
        )
    ).eval()
    state = {k: t for k, t in dense.state_dict().items() if ".mlp." not in k}
    tensors: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    for layer in range(2):
        there, here = f"blk.{layer}.ffn_", f"model.layers.{layer}.mlp."
        state[f"{here}gate.weight"] = router = random(E, K)
        tensors[f"{there}gate_inp.weight"] = router.numpy()
        tensors[f"{there}gate_exps.weight"], g = blocks(random(E, inner, K), gate)
        tensors[f"{there}up_exps.weight"], u = blocks(random(E, inner, K), up)
        tensors[f"{there}down_exps.weight"], d = blocks(random(E, K, inner), down)
        state[f"{here}experts.gate_up_proj"], state[f"{here}experts.down_proj"] = (
            torch.cat([g, u], 1),
            d,
        )
        if kind == "qwen2moe":
            for leaf, shape in (("gate", (shared, K)), ("up", (shared, K)), ("down", (K, shared))):
                tensors[f"{there}{leaf}_shexp.weight"], worth = blocks(random(*shape), "q8_0")
                state[f"{here}shared_expert.{leaf}_proj.weight"] = worth
            state[f"{here}shared_expert_gate.weight"] = once = random(1, K)
            tensors[f"{there}gate_inp_shexp.weight"] = once[0].numpy()
    want.load_state_dict(state)
    reader = package.GGUFReader(source)
    old = {k: f.contents() for k, f in reader.fields.items() if k.startswith(f"{base}.")}
    keys = {k.replace(f"{base}.", f"{kind}.", 1): v for k, v in old.items()}
    keys |= {
        f"{kind}.expert_count": E,
        f"{kind}.expert_used_count": USED,
        "general.architecture": kind,
    }
    if kind != "llama":
        keys[f"{kind}.expert_feed_forward_length"] = inner
    drop = {
        *old,
        *(f"blk.{n}.ffn_{leaf}.weight" for n in range(2) for leaf in ("gate", "up", "down")),
    }
    left = {k: v for k, v in (keys | changes).items() if v is not None}
    made = {k: v for k, v in tensors.items() if k not in changes}
    return rewrite(source, tmp_path / "m.gguf", left, drop, made), want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("gate", "up", "down"),
    [
        ("q8_0", "q8_0", "q4_0"),
        ("q4_1", "q8_0", "iq4_nl"),
        ("fp16", "fp16", "q8_0"),
        ("f32", "f32", "f32"),
    ],
)
def test_computes_what_the_dequantized_model_does(
    kind: str, gate: str, up: str, down: str, tmp_path: Path
) -> None:
    path, plain = mixture(kind, tmp_path, gate, up, down)
    model = qk.load_model(path)
    want = logits(plain)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    if gate == "f32":
        assert len(list(expert_modules(model))) == 2
    else:
        assert {s.down.format for s in stacks_of(model)} == {down}
        assert {len(s.parts.first) for s in stacks_of(model)} == {1 if gate == up else 2}
        for stack in stacks_of(model):
            stack.activation = "gelu"
        assert (logits(model) - want).abs().max() > 1e-2 * want.abs().max()
    dequantized, _ = gguf.load_dequantized(path)
    assert not stacks_of(dequantized)
    torch.testing.assert_close(
        logits(dequantized), want, rtol=1e-4, atol=1e-4 * want.abs().max().item()
    )


@pytest.mark.parametrize(("kind", "sizes"), [("qwen2moe", (1408, 5632)), ("qwen3moe", (768, 0))])
def test_transformers_reads_the_same(kind: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    """transformers' own reader dequantizes to the same values.

    Version 5.24 reads experts of its default sizes only, and no Mixtral.
    """
    path, _ = mixture(kind, tmp_path, sizes=sizes)
    theirs = gguf._without_mark(gguf._from_pretrained(path, torch.float32), path).eval()
    want = logits(theirs)
    found = logits(qk.load_model(path))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_as_a_directory(kind: str, tmp_path: Path) -> None:
    path, _ = mixture(kind, tmp_path)
    model = qk.load_model(path)
    qk.save_model(model, tmp_path / "m")
    again = qk.load_model(tmp_path / "m")
    assert len(stacks_of(again)) == 2
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"llama.expert_count": 3},
         "llama.expert_count: expected 4, as the tensors have it; got 3"),
        ("llama", {"llama.expert_count": 2**31 - 1},
         "expert_count: expected 4, as the tensors have it"),
        ("llama", {"llama.expert_used_count": 5},
         "expert_used_count: expected at most the 4 experts, got 5"),
        ("llama", {"llama.expert_used_count": None},
         "expert_used_count: expected int, .* got None"),
        ("llama", {"llama.feed_forward_length": 97},
         "feed_forward_length: expected 96, as the tensors have it"),
        ("qwen3moe", {"qwen3moe.expert_count": None}, "qwen3moe.expert_count: expected int"),
        ("qwen3moe", {"qwen3moe.expert_feed_forward_length": 32},
         "expert_feed_forward_length: expected 96"),
        ("qwen3moe", {"qwen3moe.expert_gating_func": 2}, "expert_gating_func: expected none or 1"),
        ("qwen3moe", {"qwen3moe.expert_weights_scale": 2.5},
         "expert_weights_scale: expected none or 0.0"),
        ("qwen3moe", {"blk.0.ffn_up_exps.weight": None},
         r"blk.0.ffn_up_exps.weight: expected .* found none"),
        ("qwen3moe", {"blk.1.ffn_down_exps.weight": None},
         r"blk.1.ffn_down_exps.weight: expected .* found none"),
        ("qwen3moe", {"blk.1.ffn_gate_inp.weight": None},
         r"blk.1.ffn_gate_inp.weight: expected .* found none"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path, _ = mixture(kind, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        qk.load_model(path)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    path, _ = mixture("qwen3moe", tmp_path, gate="f32")
    with pytest.raises(
        ValueError, match="blk.0.ffn_gate_exps.weight: expected one of the types .* got F32"
    ):
        qk.load_model(path)
    path, _ = mixture("qwen3moe", tmp_path)
    name = "blk.1.ffn_down_exps.weight"
    wrong = np.zeros((E, K, INNER + 32), np.float32)
    rewrite(path, tmp_path / "wrong.gguf", drop=[name], tensors={name: wrong})
    with pytest.raises(
        ValueError, match=rf"{name}: expected shape \(4, 64, 96\), got \(4, 64, 128\)"
    ):
        qk.load_model(tmp_path / "wrong.gguf")
