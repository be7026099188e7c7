"""The parts of the vLLM plugin that need no vLLM: the checkpoint's config, and each process's part.

tests/integrations/vllm/run.sh tests the rest with the real vLLM.
"""

from __future__ import annotations

import pickle
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels as qk
from qkernels.checkpoints.hf.layers import stored_module
from qkernels.checkpoints.hf.quantization import Scheme
from qkernels.integrations.vllm.checkpoint import Checkpoint
from qkernels.integrations.vllm.loading import (
    Piece,
    Source,
    fused_pieces,
    layer_pieces,
    shard_index,
)

from ..conftest import CASES, case_id, k_of
from ..tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def source_of(p: qk.PackedWeight, pieces: list[Piece], **more: Any) -> Source:
    expected = frozenset(p.tensors)
    return Source("m", Scheme(p.format, p.params), p.shape, pieces, expected=expected, **more)


def loaded(source: Source, tensors: dict[str, torch.Tensor]) -> list[qk.PackedWeight]:
    source.check(tensors)
    for own, tensor in tensors.items():
        source.add(own, tensor, CPU)
    assert source.parts is not None, "expected to be packed as soon as all is there"
    assert not source.tensors, "expected the checkpoint's tensors to be dropped"
    return source.parts


# ---------------------------------------------------------------------- which rows a process has
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_row_is_held_by_as_many_processes_as_should(count: int) -> None:
    heads, kv_heads, size = 8, 2, 16
    replicas = max(1, count // kv_heads)
    local = [
        heads * size // count,
        kv_heads * size * replicas // count,
        kv_heads * size * replicas // count,
    ]
    held = [torch.zeros(heads * size), torch.zeros(kv_heads * size), torch.zeros(kv_heads * size)]
    for rank in range(count):
        pieces = layer_pieces(local, sum(local) * count, rank, replicas)
        assert [rows for rows, _ in pieces] == [heads * size, kv_heads * size, kv_heads * size]
        for counter, (_, piece) in zip(held, pieces, strict=True):
            begin, end = piece.rows
            counter[begin:end] += 1
    assert (held[0] == 1).all()
    assert (held[1] == replicas).all()
    assert (held[2] == replicas).all()


def test_a_layer_fused_in_the_checkpoint() -> None:
    rows, pieces = fused_pieces(layer_pieces([8, 4], 24, rank=1))
    assert rows == 24
    assert [piece.rows for piece in pieces] == [(8, 16), (20, 24)]


def test_a_replicated_layer_is_not_cut() -> None:
    assert layer_pieces([24], 24, rank=3) == [(24, Piece(0, 24, 0, 1))]


def test_shard_ids() -> None:
    assert [shard_index(shard, 3) for shard in ("q", "k", "v", 0, 2)] == [0, 1, 2, 0, 2]
    assert shard_index(None, 1) == shard_index((0, 1), 1) == 0
    for bad in (None, (0, 1), 3, "x", -1, True):
        with pytest.raises(ValueError, match="expected a tensor for one of 3 fused weights"):
            shard_index(bad, 3)


# ---------------------------------------------------------------------- parts of every format
@pytest.mark.parametrize(("name", "params"), CASES, ids=map(case_id, CASES))
def test_two_processes_have_the_whole(name: str, params: dict[str, Any]) -> None:
    # multiples of two parts and every group, block and word
    p = qk.quantize(torch.randn(256, k_of(name, 768)), name, **params)
    whole = p.dequantize()
    for dim in (0, 1):
        found = []
        for rank in range(2):
            piece = Piece(0, 256, rank, 2) if dim == 0 else Piece(0, 256)
            source = source_of(p, [piece], columns=(rank, 2) if dim else (0, 1))
            if p.shape[dim] % (2 * qk.formats.get(name).cuts(p.shape, p.params)[dim]):
                with pytest.raises(
                    ValueError, match="^m: .* expected .* 2 parts .*; counts that work: 1"
                ):
                    source.check(p.tensors)
                continue
            found += loaded(source, p.tensors)
        if found:
            assert torch.equal(torch.cat([part.dequantize() for part in found], dim), whole)
            for part in found:  # nothing of the whole is kept alive by a view
                assert all(
                    t.untyped_storage().nbytes() <= max(t.nbytes, 64) for t in part.storage.values()
                )


def test_one_process_holds_the_checkpoints_own_bytes() -> None:
    p = qk.quantize(torch.randn(64, 64), "nf4")
    part = loaded(source_of(p, [Piece(0, 64)]), p.tensors)[0]
    assert all(part.storage[name] is tensor for name, tensor in p.tensors.items())


def test_a_plain_weight_beside_packed_ones() -> None:
    weight = torch.randn(8, 16)
    source = Source("m", None, (8, 16), [Piece(0, 8, 1, 2)], expected=frozenset({"weight"}))
    part = loaded(source, {"weight": weight})[0]
    assert (part.format, part.shape) == ("bf16", (4, 16))
    assert torch.equal(part.storage["weight"], weight[4:].bfloat16())
    odd = Source("m", None, (8, 16), [Piece(0, 8)], dtype=torch.float32)
    with pytest.raises(ValueError, match="m: expected float16 or bfloat16 for a plain weight"):
        odd.check(None)


def test_a_short_last_group_is_served_whole_and_not_cut() -> None:
    p = qk.quantize(torch.randn(64, 576), "gptq", group_size=128)
    (part,) = loaded(source_of(p, [Piece(0, 64, 1, 2)]), p.tensors)
    assert torch.equal(part.dequantize(), p.dequantize()[32:])
    source = source_of(p, [Piece(0, 64)], columns=(0, 2))
    with pytest.raises(
        ValueError, match="m: gptq: columns: expected 576 to be a multiple of 2 parts times 128"
    ):
        source.check(p.tensors)


def test_bad_tensors_show_before_they_are_loaded() -> None:
    p = qk.quantize(torch.randn(64, 64), "gptq", group_size=32)
    source = Source("m", Scheme("gptq", {"bits": 8, "group_size": 32}), p.shape, [Piece(0, 64)])
    with pytest.raises(
        ValueError, match=r"m: gptq: qweight: expected shape \(16, 64\), got \(8, 64\)"
    ):
        source.check(p.tensors)
    less = {k: v for k, v in p.tensors.items() if k != "scales"}
    good = source_of(p, [Piece(0, 64)])
    with pytest.raises(ValueError, match="m: gptq: scales: expected a tensor of shape"):
        good.check(less)
    odd = Source("m", Scheme("awq", {"group_size": 48}), p.shape, [Piece(0, 64)])
    with pytest.raises(
        ValueError, match="m: awq: group_size: expected -1 or a divisor of K=64, .* got 48"
    ):
        odd.check(None)
    loaded(good, p.tensors)
    with pytest.raises(ValueError, match="m: scales: expected to be loaded once"):
        good.add("scales", p.tensors["scales"], CPU)
    unfinished = source_of(p, [Piece(0, 64)])
    unfinished.add("scales", p.tensors["scales"], CPU)
    with pytest.raises(
        ValueError, match="m: gptq: qweight: expected a tensor of shape .*, got none"
    ):
        unfinished.finish(CPU)


# ---------------------------------------------------------------------- what a checkpoint says
def saved(path: Path, format: str, **params: Any) -> tuple[Any, dict[str, Any]]:
    import json

    model = tiny_model(tie_word_embeddings=False)
    qk.quantize_model(model, format, skip=["*.1.mlp.up_proj"], progress=False, **params)
    qk.save_model(model, path, tiny_tokenizer())
    return model, json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("format", "params"),
    [
        ("gptq", {"group_size": 32}), ("awq", {"group_size": 32}),
        ("pack_quantized", {"group_size": 32}),
        ("nf4", {}), ("mxfp4", {}), ("int8", {}), ("w8a8", {}), ("fp8", {}), ("q8_0", {}),
    ],
)  # fmt: skip
def test_modules_left_alone(tmp_path: Path, format: str, params: dict[str, Any]) -> None:
    model, config = saved(tmp_path / "x", format, **params)
    checkpoint = Checkpoint(config)
    for known in (False, True):
        if known:
            checkpoint.open(tmp_path / "x")
        for name, module in model.named_modules():
            if isinstance(module, qk.QuantLinear):
                scheme = checkpoint.scheme(name)
                assert scheme is not None
                assert scheme.format == format
            elif isinstance(module, torch.nn.Linear):
                assert checkpoint.scheme(name) is None, name
    tensors = checkpoint.tensors("model.layers.0.mlp.up_proj")
    assert tensors is not None
    assert set(tensors) == set(model.model.layers[0].mlp.up_proj.packed.tensors)
    assert checkpoint.packed_below("model.layers.0.mlp") is not None
    assert checkpoint.packed_below("model.layers.1.mlp.up_proj") is None
    assert checkpoint.embedding() is None


def test_modules_that_vllm_calls_otherwise(tmp_path: Path) -> None:
    _, config = saved(tmp_path / "x", "gptq", group_size=32)
    checkpoint = Checkpoint(config)
    checkpoint.open(tmp_path / "x")
    checkpoint.rename(lambda name: None if "norm" in name else f"language_model.{name}")
    assert not checkpoint.has("model.layers.0.mlp.up_proj")
    assert checkpoint.scheme("language_model.model.layers.0.mlp.up_proj") is not None
    assert checkpoint.scheme("language_model.model.layers.1.mlp.up_proj") is None
    names = checkpoint.names("language_model.model.layers.0.mlp.up_proj")
    assert stored_module(names) == "model.layers.0.mlp.up_proj"  # which the config calls it


def test_it_goes_to_other_processes(tmp_path: Path) -> None:
    _, config = saved(tmp_path / "x", "gptq", group_size=32)
    checkpoint = Checkpoint(config)
    again = pickle.loads(pickle.dumps(checkpoint))
    assert again.scheme("model.layers.0.mlp.up_proj") == checkpoint.scheme(
        "model.layers.0.mlp.up_proj"
    )
    checkpoint.open(tmp_path / "x")
    checkpoint.rename(lambda name: f"a.{name}")
    again = pickle.loads(pickle.dumps(checkpoint))
    for name in ("a.model.layers.0.mlp.up_proj", "a.model.layers.1.mlp.up_proj"):
        assert again.scheme(name) == checkpoint.scheme(name)
        assert again.names(name) == checkpoint.names(name)
    assert again.tensors("a.model.layers.0.mlp.up_proj").keys() == {
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    }


def test_a_config_that_contradicts_the_files(tmp_path: Path) -> None:
    _, config = saved(tmp_path / "x", "gptq", group_size=32)
    checkpoint = Checkpoint({**config, "modules_to_not_convert": ["model.layers.0"]})
    checkpoint.open(tmp_path / "x")
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj: expected a plain weight.*got"):
        checkpoint.scheme("model.layers.0.mlp.up_proj")
    with pytest.raises(
        ValueError, match="quantization_config.quant_method: expected gptq, .*; got 'mystery'"
    ):
        Checkpoint({"quant_method": "mystery"})


def test_a_packed_embedding_is_found(tmp_path: Path) -> None:
    from qkernels.nn.embedding import QuantEmbedding

    model = tiny_model()
    qk.quantize_model(model, "q8_0", progress=False)
    embedding = QuantEmbedding(qk.quantize(torch.randn(128, 64), "q8_0"))
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(qk.QuantLinear(embedding.packed))
    qk.save_model(model, tmp_path / "x")
    import json

    checkpoint = Checkpoint(
        json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    )
    checkpoint.open(tmp_path / "x")
    assert checkpoint.embedding() == "model.embed_tokens"
    assert not checkpoint.has("lm_head")


# ---------------------------------------------------------------------- the plugin
def test_the_entry_point_is_inert_without_vllm() -> None:
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "qkernels"]
    assert all(e.value == "qkernels.integrations.vllm:register" for e in found)
    import qkernels.integrations.vllm as plugin

    assert callable(plugin.register)
    assert "vllm" not in sys.modules
