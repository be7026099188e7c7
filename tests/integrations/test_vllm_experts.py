"""The vLLM plugin's experts without vLLM: indices and product. run.sh tests the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, silu

import qkernels as qk
from qkernels.integrations.vllm.checkpoint import Checkpoint
from qkernels.integrations.vllm.experts import ExpertParts, expert_tensor, local_ids
from qkernels.integrations.vllm.loading import Piece, source_of

from ..moe_checkpoint import save_moe

CPU = torch.device("cpu")
E, K, INNER, TOKENS, TOP = 3, 128, 64, 5, 2


def stacks(name: str, params: dict[str, Any], k: int, inner: int) -> list[list[qk.PackedWeight]]:
    """Gate, up and down weights of E experts."""
    shapes = [(inner, k), (inner, k), (k, inner)]
    return [[qk.quantize(torch.randn(s) / 8, name, **params) for _ in range(E)] for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "params", "products", "activation"),
    [
        ("gptq", {"group_size": 32}, 1, "silu"),
        ("gptq", {"group_size": 32, "act_order": True}, 2, "silu"),
        ("awq", {"group_size": 32}, 1, "gelu"), ("nf4", {}, 2, "silu"),
        ("nf4", {"double_quant": True}, 2, "gelu"),
        ("pack_quantized", {"group_size": 32}, 2, "silu"), ("fp8", {}, 1, "silu"),
        ("fp8", {"granularity": "tensor"}, 2, "silu"), ("q8_0", {}, 1, "silu"),
    ],
)  # fmt: skip
def test_the_product(
    name: str, params: dict[str, Any], products: int, activation: str, dtype: torch.dtype
) -> None:
    gate, up, down = stacks(name, params, K, INNER)
    parts = ExpertParts(gate, up, down)
    assert len(parts.first) == products
    x = torch.randn(TOKENS, K).to(dtype)
    weights = torch.rand(TOKENS, TOP)
    ids = torch.randint(-1, E + 1, (TOKENS, TOP))
    ids[0] = torch.tensor([-1, E])  # a token that goes nowhere
    ids[1] = torch.tensor([0, E - 1])
    parts.prepack(dtype, activation, None)
    held = parts.stored_bytes
    found = parts.run(x, weights, ids, activation)
    assert parts.stored_bytes == held, "prepacked once, before"
    want = torch.zeros(TOKENS, K, dtype=torch.float64)
    act = {"silu": silu, "gelu": gelu}[activation]
    scale = torch.zeros(TOKENS, 1, dtype=torch.float64)  # what roundings to dtype are relative to
    for t in range(TOKENS):
        for j in range(TOP):
            e = int(ids[t, j])
            if 0 <= e < E:
                g, u, d = (s[e].dequantize(torch.float64) for s in (gate, up, down))
                h = act(g @ x[t].double()) * (u @ x[t].double())
                want[t] += weights[t, j].double() * (d @ h)
                scale[t] += (d.abs() @ h.abs()).max()
    assert found.dtype == dtype
    assert (found[0] == 0).all()
    assert want[1].abs().max() > 0
    # gate, up, the hidden features and the result are each rounded once; float32 sums lose less
    # than 1e-5
    unit = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert ((found.double() - want).abs() <= unit * (scale + 1) + 1e-6).all()


def test_experts_that_differ() -> None:
    gate, up, down = stacks("gptq", {"group_size": 32}, K, INNER)
    other = qk.quantize(torch.randn(K, INNER), "gptq", group_size=64)
    with pytest.raises(ValueError, match=r"experts\[1\]: expected params .*, that of experts\[0\]"):
        ExpertParts(gate, up, [down[0], other, down[2]])


def test_experts_of_other_processes() -> None:
    ids = torch.tensor([[0, 3], [2, -1], [7, 1]], dtype=torch.int32)
    assert local_ids(ids, None) is ids
    found = local_ids(ids, torch.tensor([-1, 0, 1, -1], dtype=torch.int32))
    assert found.tolist() == [[-1, -1], [1, -1], [-1, 0]]
    assert found.dtype == torch.int32


def test_names_of_tensors() -> None:
    leaves = ["gate_proj", "down_proj", "up_proj"]
    assert expert_tensor("12.up_proj.weight.quant_state.nf4", leaves) == (
        12,
        "w3",
        "weight.quant_state.nf4",
    )
    assert expert_tensor("0.down_proj.bias", leaves) == (0, "w2", "bias")
    for bad in (
        "gate_up_proj",
        "x.up_proj.qweight",
        "1.w1.qweight",
        "1.up_proj",
        "-1.up_proj.qweight",
    ):
        with pytest.raises(
            ValueError, match="expected tensors named EXPERT.NAME.TENSOR with NAME one of gate"
        ):
            expert_tensor(bad, leaves)


@pytest.mark.parametrize(("kind", "leaves"), [("mixtral", ("w1", "w3", "w2")),
                                              ("qwen3_moe",
                                               ("gate_proj", "up_proj", "down_proj"))])  # fmt: skip
def test_a_checkpoint_of_experts(kind: str, leaves: tuple[str, ...], tmp_path: Path) -> None:
    save_moe(kind, "gptq", {"group_size": 64}, tmp_path / "q", tmp_path / "p")
    checkpoint = Checkpoint(
        json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    )
    checkpoint.open(tmp_path / "q")
    block = "model.layers.1.block_sparse_moe" if kind == "mixtral" else "model.layers.1.mlp"
    assert checkpoint.scheme(f"{block}.gate") is None
    stacks = []
    for leaf, shape in zip(leaves, ((128, 256), (128, 256), (256, 128)), strict=True):
        stack = []
        for e in range(4):
            source = source_of(
                checkpoint, f"{block}.experts.{e}.{leaf}", shape, [Piece(0, shape[0])]
            )
            for own, tensor in (checkpoint.tensors(source.name) or {}).items():
                assert own in source.names()
                source.add(own, tensor, CPU)
            assert source.parts is not None
            stack += source.parts
        stacks.append(stack)
    parts = ExpertParts(*stacks)
    from safetensors.torch import load_file

    plain = load_file(tmp_path / "p" / "model.safetensors")
    for e in range(4):
        gate, up, down = (plain[f"{block}.experts.{e}.{leaf}.weight"] for leaf in leaves)
        assert torch.equal(parts.first[0].expert(e).dequantize(), torch.cat([gate, up]))
        assert torch.equal(parts.down.expert(e).dequantize(), down)
    with pytest.raises(ValueError, match=r"q: .*experts.0.*: gptq: qweight: expected shape"):
        source_of(checkpoint, f"{block}.experts.0.{leaves[0]}", (64, 256), [Piece(0, 64)])
