"""Conversion between formats: exact if both hold the same integers; otherwise it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints.hf import reader as huggingface
from qkernels.cli import main
from qkernels.cli.convert import shard_bytes
from qkernels.models.convert import convert_model, convert_weight

from ..moe_checkpoint import save_moe, stacks_of
from ..tiny import ids, save_tiny, tiny_model

ASYMMETRIC = {"group_size": 32, "symmetric": False}
#: source, its parameters, target, parameters asked for
EXACT: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("gptq", ASYMMETRIC, "awq", {}),
    ("gptq", {"group_size": 32}, "awq", {}),
    ("gptq", {"group_size": 32, "act_order": True}, "pack_quantized", {}),
    ("gptq", ASYMMETRIC, "gptq", {"checkpoint_format": "gptq_v2"}),
    ("gptq", {"bits": 3, **ASYMMETRIC}, "awq", {}),  # 3-bit codes in 4 bits
    ("gptq", {"bits": 8, "group_size": -1}, "w8a8", {}),
    ("awq", {"group_size": 32}, "gptq", {}),
    ("awq", {"group_size": -1}, "pack_quantized", {}),
    ("awq", {"group_size": 32, "symmetric": True}, "pack_quantized", {}),
    ("pack_quantized", {"group_size": 16}, "gptq", {"checkpoint_format": "gptq_v2"}),
    ("pack_quantized", {"bits": 5, "group_size": 16, "symmetric": False}, "gptq", {}),  # in 8 bits
    ("pack_quantized", ASYMMETRIC, "awq", {}),
    ("w8a8", {}, "pack_quantized", {}),
    ("int8", {}, "pack_quantized", {}),
    ("w8a8", {"granularity": "tensor"}, "w8a8", {"granularity": "channel"}),
    ("fp8", {"granularity": "block"}, "fp8", {"activation": "dynamic"}),
    # DeepSeek to compressed-tensors
    (
        "fp8",
        {"granularity": "block"},
        "fp8",
        {"scale_name": "weight_scale"},
    ),
    ("int8", {}, "int8", {"threshold": 0.0}),
]
INEXACT: list[tuple[str, dict[str, Any], str, dict[str, Any], str]] = [
    (
        "gptq",
        {"group_size": 32, "act_order": True},
        "awq",
        {},
        "awq: groups: expected neighbouring",
    ),
    ("gptq", {"bits": 8, "group_size": 32}, "awq", {}, "awq: bits: expected one of (4,), got 8"),
    ("gptq", {"bits": 8, "group_size": 32}, "gptq", {"bits": 4}, "codes of 8 bits do not fit 4"),
    (
        "gptq",
        {"group_size": 32},
        "w8a8",
        {},
        "w8a8: groups: expected one for each row and no zero points: kernels",
    ),
    ("nf4", {}, "gptq", {"group_size": 32}, "nf4 is no integer grid"),
    ("awq", {"group_size": 32}, "nf4", {}, "nf4 is no integer grid"),
    (
        "awq",
        {"group_size": 32},
        "pack_quantized",
        {"symmetric": True},
        "symmetric: expected every zero point",
    ),
    ("fp8", {}, "fp8", {"granularity": "tensor"}, "weight_scale: expected one element"),
]


@pytest.mark.parametrize(("source", "given", "target", "params"), EXACT, ids=str)
def test_exact(source: str, given: dict[str, Any], target: str, params: dict[str, Any]) -> None:
    p = qk.quantize(torch.randn(40, 64), source, **given)
    q, how, reason = convert_weight(p, target, **params)
    assert (q.format, how, reason) == (target, "exact", "")
    assert params.items() <= q.params.items()
    assert torch.equal(p.dequantize(), q.dequantize())
    if source != target or source == "gptq":
        back, how, _ = convert_weight(q, source, **p.params)
        assert how == "exact"  # codes that went to a wider format fit back
        assert torch.equal(p.dequantize(), back.dequantize())


def test_gptq_to_awq_and_back_is_the_same_file() -> None:
    p = qk.quantize(torch.randn(40, 64), "gptq", **ASYMMETRIC)
    back, _, _ = convert_weight(convert_weight(p, "awq")[0], "gptq")
    assert all(torch.equal(v, back.tensors[k]) for k, v in p.tensors.items())


@pytest.mark.parametrize(("source", "given", "target", "params", "message"), INEXACT, ids=str)
def test_requantized_and_why(
    source: str, given: dict[str, Any], target: str, params: dict[str, Any], message: str
) -> None:
    p = qk.quantize(torch.randn(40, 64), source, **given)
    q, how, reason = convert_weight(p, target, **params)
    assert (q.format, how) == (target, "requantized")
    assert message in reason
    again = qk.quantize(p.dequantize(), target, **q.params)
    assert torch.equal(q.dequantize(), again.dequantize())


def test_kept_and_dequantized() -> None:
    p = qk.quantize(torch.randn(40, 64), "gptq", group_size=32)
    assert convert_weight(p, "gptq")[:2] == (p, "kept")
    q, how, _ = convert_weight(p, "fp16")
    assert (q.format, how) == ("fp16", "dequantized")
    assert torch.equal(q.tensors["weight"], p.dequantize(torch.float16))


# ---------------------------------------------------------------------- the command
def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in ("convert", *arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_command_without_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = qk.quantize_model(tiny_model(), "gptq", progress=False, **ASYMMETRIC)
    huggingface.save(model, tmp_path / "a")
    code, out, _ = _run(capsys, tmp_path / "a", tmp_path / "b", "--format", "awq", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["layers"], result["exact"], result["requantized"], result["lossless"]) == (
        14,
        14,
        0,
        True,
    )
    again = qk.load_model(tmp_path / "b")
    assert torch.equal(model(ids(20)[None]).logits, again(ids(20)[None]).logits)
    code, out, _ = _run(capsys, tmp_path / "b", tmp_path / "c", "--format", "pack_quantized")
    assert code == 0
    assert "14 carried over exactly" in out
    assert out.rstrip().endswith("\nlossless")
    code, out, _ = _run(capsys, tmp_path / "c", tmp_path / "d", "--format", "gptq")
    assert code == 0
    first, last = (
        load_file(tmp_path / "a/model.safetensors"),
        load_file(tmp_path / "d/model.safetensors"),
    )
    assert first.keys() == last.keys()
    assert all(torch.equal(v, last[k]) for k, v in first.items())


def test_command_with_loss_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huggingface.save(qk.quantize_model(tiny_model(), "nf4", progress=False), tmp_path / "a")
    code, out, _ = _run(capsys, tmp_path / "a", tmp_path / "b", "-f", "gptq", "-p", "group_size=32")
    assert code == 0
    assert "14 dequantized and rounded again, which costs accuracy" in out
    assert "14 because nf4 is no integer grid" in out
    assert "relative error of a weight: mean 0." in out
    assert out.rstrip().endswith("\nnot lossless")


def test_command_dequantizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = qk.quantize_model(
        tiny_model(attention_bias=True).half(), "gptq", progress=False, group_size=32
    )
    huggingface.save(model, tmp_path / "a")
    assert _run(capsys, tmp_path / "a", tmp_path / "b", "-f", "fp16")[0] == 0
    plain = qk.load_model(tmp_path / "b")
    assert not any(isinstance(m, qk.QuantLinear) for m in plain.modules())
    name = "model.layers.1.mlp.up_proj"
    packed = model.get_submodule(name).packed
    assert torch.equal(plain.get_submodule(name).weight, packed.dequantize(torch.float16))


def test_command_quantizes_a_plain_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "a")
    code, out, _ = _run(capsys, tmp_path / "a", tmp_path / "b", "-f", "nf4", "--json")
    assert code == 0
    assert json.loads(out)["quantized"] == 14
    want = qk.quantize_model(tiny_model(), "nf4", progress=False)
    assert torch.equal(
        qk.load_model(tmp_path / "b")(ids(9)[None]).logits, want(ids(9)[None]).logits
    )


def test_command_changes_shards_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huggingface.save(qk.quantize_model(tiny_model(), "int8", progress=False), tmp_path / "a")
    code, out, _ = _run(capsys, tmp_path / "a", tmp_path / "b", "--max-shard-size", "20KB")
    assert code == 0
    assert "the same weights" in out
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert _run(capsys, tmp_path / "b", tmp_path / "c")[0] == 0
    first, last = (
        load_file(tmp_path / "a/model.safetensors"),
        load_file(tmp_path / "c/model.safetensors"),
    )
    assert first.keys() == last.keys()
    assert all(torch.equal(v, last[k]) for k, v in first.items())


@pytest.mark.parametrize(("arguments", "message"), [
    (["{a}", "{b}", "-f", "hqq"], "format: expected one of fp16"),
    (["{a}", "{b}", "-f", "awq", "-p", "group_size=48"],
     "group_size: expected -1 or a divisor of K=64, because awq"),
    (["{a}", "{b}", "-p", "bits=4"], "--param: expected --format with it"),
    (["{a}", "{a}"], "OUTPUT: expected another directory"),
    (["{a}", "{b}", "--max-shard-size", "5"], "--max-shard-size: expected a size as 500MB"),
    (["{a}/nothing", "{b}"], "expected a model directory"),
])  # fmt: skip
def test_command_bad_input(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huggingface.save(qk.quantize_model(tiny_model(), "nf4", progress=False), tmp_path / "a")
    filled = [a.format(a=tmp_path / "a", b=tmp_path / "b") for a in arguments]
    code, out, err = _run(capsys, *filled)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "b").exists()


def test_shard_sizes() -> None:
    assert [shard_bytes(t) for t in ("5GB", "1.5mb", " 20KB")] == [5 * 10**9, 1_500_000, 20_000]
    for text in ("", "GB", "-1GB", "5", "nanGB", "infGB"):
        with pytest.raises(ValueError, match="expected a size"):
            shard_bytes(text)


@pytest.mark.parametrize(
    ("source", "params", "target", "how"),
    [
        ("gptq", {"group_size": 64, "symmetric": False}, "awq", "exact"),
        ("nf4", {}, "gptq", "requantized"),
        ("gptq", {"group_size": 64}, "bf16", "dequantized"),
        ("awq", {"group_size": 64}, "awq", "kept"),
    ],
)  # fmt: skip
def test_experts(
    source: str, params: dict[str, Any], target: str, how: str, tmp_path: Path
) -> None:
    """Experts are converted one by one, and the saved config says so."""
    save_moe("mixtral", source, params, tmp_path / "q", tmp_path / "p")
    model, tokens = qk.load_model(tmp_path / "q"), ids(9)[None]
    with torch.no_grad():
        before = model(tokens).logits
    old = [stack.parts.expert(3) for stack in stacks_of(model)]
    more = {"group_size": 64} if target == "gptq" else {}
    done = {d.name: d for d in convert_model(model, target, **more)}
    assert len(done) == 2 * (4 + 4 * 3)
    found = done["model.layers.1.mlp.experts.3.down_proj"]
    assert (found.source, found.target, found.how) == (source, target, how)
    assert {d.how for d in done.values()} == {how}
    for stack, was in zip(stacks_of(model), old, strict=True):
        for role, packed in stack.parts.expert(3).items():
            assert packed.format == target
            error = (packed.dequantize() - was[role].dequantize()).norm() / was[
                role
            ].dequantize().norm()
            assert error <= {"exact": 0, "kept": 0, "dequantized": 2**-9, "requantized": 0.2}[how]
    qk.save_model(model, tmp_path / "m")
    again = qk.load_model(tmp_path / "m")
    with torch.no_grad():
        after = again(tokens).logits
    if how in ("exact", "kept"):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    names = load_file(tmp_path / "m/model.safetensors")
    assert ("model.layers.1.block_sparse_moe.experts.3.w2.weight" in names) == (target == "bf16")
