"""Checkpoints with separate tensors for each expert: loaded, saved in the same form, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu

import qkernels as qk
from qkernels.checkpoints.hf import reader as huggingface
from qkernels.checkpoints.hf.names import Names
from qkernels.checkpoints.hf.writer import matrices
from qkernels.nn.experts import expert_modules

from ..moe_checkpoint import SIZES, edit, save_moe, stacks_of, tiny_moe

KINDS = ["mixtral", "qwen3_moe"]
LEAVES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
BLOCK = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}
#: formats that leave activations alone, so that the model of the dequantized weights computes the
#: same
WEIGHT_ONLY: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {"group_size": 64}),
    ("gptq", {"group_size": 32, "act_order": True, "symmetric": False}),
    ("awq", {"group_size": 64}), ("nf4", {}), ("nf4", {"double_quant": True}),
    ("fp8", {}), ("fp8", {"granularity": "block"}), ("fp8", {"granularity": "tensor"}),
    ("pack_quantized", {"group_size": 32}),
    ("pack_quantized", {"group_size": 32, "symmetric": False}),
    ("mxfp4", {}), ("q8_0", {}),
]  # fmt: skip
BOTH: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}), ("w8a8", {}), ("w8a8", {"granularity": "tensor"}),
    ("fp8", {"granularity": "channel", "activation": "dynamic"}),
    ("fp8", {"granularity": "tensor", "activation": "static", "input_scale": 0.02}),
]  # fmt: skip


def ids() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 9))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape), name
        first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, b[name]))
        assert torch.equal(first, second), name


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())[
        "quantization_config"
    ]
    return config


# ---------------------------------------------------------------------- loading
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "params"), WEIGHT_ONLY, ids=str)
def test_computes_what_the_dequantized_model_does(
    kind: str, name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    save_moe(kind, name, params, tmp_path / "q", tmp_path / "p")
    model, plain = qk.load_model(tmp_path / "q"), qk.load_model(tmp_path / "p")
    assert len(stacks_of(model)) == 2
    assert len(list(expert_modules(plain))) == 2
    assert not list(expert_modules(model))
    tokens = ids()
    with torch.no_grad():
        want = plain(tokens).logits
        # Sums in float32 in another order.
        torch.testing.assert_close(
            model(tokens).logits, want, rtol=1e-4, atol=1e-4 * want.abs().max().item()
        )
        for stack in stacks_of(model):  # so that experts matter
            stack.activation = "gelu"
        assert (model(tokens).logits - want).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "params"), BOTH, ids=str)
def test_formats_that_round_activations(
    kind: str, name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    """Each expert agrees with the product of its own three weights in the file."""
    save_moe(kind, name, params, tmp_path / "q", tmp_path / "p")
    model, tensors = qk.load_model(tmp_path / "q"), tensors_of(tmp_path / "q")
    x = torch.randn(6, 256)
    for layer, stack in enumerate(stacks_of(model)):
        for e in range(4):
            weights = []
            for leaf, shape in zip(LEAVES[kind], ((128, 256), (128, 256), (256, 128)), strict=True):
                prefix = f"model.layers.{layer}.{BLOCK[kind]}.experts.{e}.{leaf}."
                own = {
                    k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)
                }
                weights.append(qk.pack(name, own, shape, **stack.down.params))
            gate, up = (qk.matmul(x, w, backend="reference") for w in weights[:2])
            want = qk.matmul(silu(gate) * up, weights[2], backend="reference")
            found = stack(x, torch.full((6, 1), e), torch.ones(6, 1))
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_down_projections_in_another_format(kind: str, tmp_path: Path) -> None:
    save_moe(kind, "q8_0", {}, tmp_path / "q", tmp_path / "p", down="iq4_nl")
    model, plain = qk.load_model(tmp_path / "q"), qk.load_model(tmp_path / "p")
    assert {s.down.format for s in stacks_of(model)} == {"iq4_nl"}
    tokens = ids()
    with torch.no_grad():
        want = plain(tokens).logits
        torch.testing.assert_close(
            model(tokens).logits, want, rtol=1e-4, atol=1e-4 * want.abs().max().item()
        )
    huggingface.save(model, tmp_path / "s")
    assert_same(tensors_of(tmp_path / "q"), tensors_of(tmp_path / "s"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_down_projection_beside_packed_ones(kind: str, tmp_path: Path) -> None:
    save_moe(kind, "gptq", {"group_size": 64}, tmp_path / "q", tmp_path / "p")
    tensors, plain = (
        load_file(tmp_path / "q/model.safetensors"),
        load_file(tmp_path / "p/model.safetensors"),
    )
    leaf = f".{LEAVES[kind][2]}."
    tensors = {k: t for k, t in tensors.items() if not (".experts." in k and leaf in k)}
    for name, tensor in plain.items():
        if ".experts." in name and leaf in name:
            tensors[name] = tensor.half()
            plain[name] = tensor.half().float()
    save_file(tensors, tmp_path / "q/model.safetensors", metadata={"format": "pt"})
    save_file(plain, tmp_path / "p/model.safetensors", metadata={"format": "pt"})
    model, reference = qk.load_model(tmp_path / "q"), qk.load_model(tmp_path / "p")
    assert {(s.parts.first[0].format, s.down.format) for s in stacks_of(model)} == {
        ("gptq", "fp16")
    }
    tokens = ids()
    with torch.no_grad():
        want = reference(tokens).logits
        torch.testing.assert_close(
            model(tokens).logits, want, rtol=1e-4, atol=1e-4 * want.abs().max().item()
        )
    huggingface.save(model, tmp_path / "s")
    assert_same(tensors, tensors_of(tmp_path / "s"))
    assert_same(qk.load_model(tmp_path / "s").state_dict(), model.state_dict())
    edit(
        tmp_path / "q",
        **{name: t.float() for name, t in tensors.items() if name in plain and leaf in name},
    )
    with pytest.raises(
        ValueError, match=rf"experts.0{leaf[:-1]}: expected a weight in F16 or BF16 .* got F32"
    ):
        qk.load_model(tmp_path / "q")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_experts_that_are_plain_stay_so(
    kind: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Their files are those that transformers writes."""
    model = tiny_moe(kind).half()
    with pytest.warns(UserWarning, match="experts of 2 layers .* stay as they are"):
        qk.quantize_model(model, "gptq", group_size=64, progress=False)
    qk.save_model(model, tmp_path / "q")
    skipped = matrices(model, Names(model))[1]  # for quantization methods that list them
    experts = {
        f"model.layers.1.{BLOCK[kind]}.experts.{e}.{leaf}"
        for e in range(4)
        for leaf in LEAVES[kind]
    }
    assert experts | {f"model.layers.0.{BLOCK[kind]}.gate", "lm_head"} <= set(skipped)
    names = set(tensors_of(tmp_path / "q"))
    assert f"model.layers.1.{BLOCK[kind]}.experts.3.{LEAVES[kind][1]}.weight" in names
    assert f"model.layers.1.{BLOCK[kind]}.gate.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    again = qk.load_model(tmp_path / "q", dtype=dtype)
    assert len(list(expert_modules(again))) == 2
    assert not stacks_of(again)
    assert isinstance(again.model.layers[0].self_attn.q_proj, qk.QuantLinear)
    if dtype is None:
        assert_same(again.state_dict(), model.state_dict())
    else:
        gate_up = again.model.layers[0].mlp.experts.gate_up_proj
        assert gate_up.dtype == dtype
        assert torch.equal(gate_up, model.model.layers[0].mlp.experts.gate_up_proj.to(dtype))
    assert torch.isfinite(again(ids()).logits).all()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_experts_in_another_dtype_than_what_comes_in(kind: str, tmp_path: Path) -> None:
    model = tiny_moe(kind)
    model.half().save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    mixed = {k: t.bfloat16() if ".experts." not in k else t for k, t in tensors.items()}
    save_file(mixed, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    again = qk.load_model(tmp_path / "m")
    assert {s.down.format for s in stacks_of(again)} == {"fp16"}
    assert again(ids()).logits.dtype == torch.bfloat16
    qk.save_model(again, tmp_path / "s")
    assert_same(tensors_of(tmp_path / "s"), mixed)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_models(kind: str, tmp_path: Path) -> None:
    """Files go from transformers to us, and from us to transformers."""
    from transformers import AutoModelForCausalLM

    model, tokens = tiny_moe(kind), ids()
    model.save_pretrained(tmp_path / "theirs")
    qk.save_model(model, tmp_path / "ours", max_shard_bytes=1_000_000)
    assert_same(tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        want = model(tokens).logits
        assert torch.equal(theirs(tokens).logits, want)
        assert torch.equal(qk.load_model(tmp_path / "theirs")(tokens).logits, want)


def test_files_with_one_tensor_for_all_plain_experts(tmp_path: Path) -> None:
    """One tensor for all experts, as in transformers' modules and in our earlier files."""
    model = tiny_moe("mixtral")
    model.save_pretrained(tmp_path / "m")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    assert_same(qk.load_model(tmp_path / "m").state_dict(), model.state_dict())


# ---------------------------------------------------------------------- saving
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "params"), WEIGHT_ONLY + BOTH, ids=str)
def test_what_is_loaded_is_saved_as_it_was(
    kind: str, name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    save_moe(kind, name, params, tmp_path / "q", tmp_path / "p")
    model, tokens = qk.load_model(tmp_path / "q"), ids()
    model(tokens)  # which may move weights to a kernel layout
    qk.save_model(model, tmp_path / "s", max_shard_bytes=1_000_000)
    assert_same(tensors_of(tmp_path / "q"), tensors_of(tmp_path / "s"))
    old, new = config_of(tmp_path / "q"), config_of(tmp_path / "s")
    assert {key: _sorted(value) for key, value in old.items()} == {
        key: _sorted(v) for key, v in new.items()
    }
    again = qk.load_model(tmp_path / "s")
    assert_same(again.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def _sorted(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{key: _sorted(v) for key, v in entry.items()} for entry in value]
    return sorted(value) if isinstance(value, list) else value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "params"), WEIGHT_ONLY + BOTH, ids=str)
def test_what_is_quantized_here_comes_back(
    kind: str, name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    model, tokens = tiny_moe(kind), ids()
    qk.quantize_model(model, name, experts=True, progress=False, **params)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    qk.save_model(model, tmp_path / "m")
    again = qk.load_model(tmp_path / "m")
    assert_same(again.state_dict(), state)
    assert [len(s.parts.first) for s in stacks_of(again)] == [
        len(s.parts.first) for s in stacks_of(model)
    ]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    prefix = f"model.layers.0.{BLOCK[kind]}.experts.3.{LEAVES[kind][2]}."
    own = {n.removeprefix(prefix) for n in tensors_of(tmp_path / "m") if n.startswith(prefix)}
    assert own == set(stacks_of(model)[0].parts.expert(3)["down"].tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("pack_quantized", {"group_size": 32}), ("fp8", {}), ("fp8", {"granularity": "block"}),
        ("fp8", {"granularity": "channel", "activation": "dynamic"}),
    ],
    ids=str,
)  # fmt: skip
def test_transformers_reads_our_experts(
    kind: str, name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    """transformers 5.24 dequantizes them, as always on a CPU.

    It cannot read bitsandbytes' and int8 experts at all.
    """
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    model = qk.quantize_model(
        tiny_moe(kind).bfloat16(), name, experts=True, progress=False, **params
    )
    qk.save_model(model, tmp_path / "m")
    config = {"fp8": FineGrainedFP8Config, "compressed-tensors": CompressedTensorsConfig}[
        config_of(tmp_path / "m")["quant_method"]
    ](dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", device_map="cpu", dtype=torch.bfloat16, quantization_config=config
    )
    for (_, other), stack in zip(expert_modules(theirs), stacks_of(model), strict=True):
        experts = [
            {role: p.dequantize() for role, p in stack.parts.expert(e).items()}
            for e in range(stack.parts.count)
        ]
        gate_up = torch.stack([torch.cat([own["gate"], own["up"]]) for own in experts])
        # Scale and product are each rounded to bfloat16, in an order of theirs.
        torch.testing.assert_close(other.gate_up_proj.float(), gate_up, rtol=2**-7, atol=0)
        down = torch.stack([own["down"] for own in experts])
        torch.testing.assert_close(other.down_proj.float(), down, rtol=2**-7, atol=0)


def test_experts_in_another_method_than_linears_are_refused(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    for name, module in list(expert_modules(model)):
        model.set_submodule(name, qk.QuantExperts.from_module(module, "nf4"))
    qk.quantize_model(model, "gptq", group_size=64, progress=False)
    with pytest.raises(
        ValueError, match=r"block_sparse_moe.experts.0.w1: expected gptq .* got nf4"
    ):
        qk.save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_nested_scales_of_one_weight_that_is_cut(tmp_path: Path) -> None:
    """A hand-made stack whose halves need another double quantization than the whole."""
    model = tiny_moe("qwen3_moe")
    for name, module in list(expert_modules(model)):
        gate_up = qk.quantize_experts(module.gate_up_proj.detach(), "nf4", double_quant=True)
        down = qk.quantize_experts(module.down_proj.detach(), "nf4", double_quant=True)
        model.set_submodule(name, qk.QuantExperts(gate_up, down))
    qk.save_model(model, tmp_path / "m")
    tokens = ids()
    with torch.no_grad():
        want = model(tokens).logits
        found = qk.load_model(tmp_path / "m")(tokens).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


# ---------------------------------------------------------------------- memory
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_one_layer_is_held_twice(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a layer's experts in place, only tensors as large as the file's live; none is dense."""
    save_moe(kind, "gptq", {"group_size": 64}, tmp_path / "q", tmp_path / "p")
    model = qk.load_model(tmp_path / "q")
    for stack in stacks_of(model):
        assert stack.parts.stored_bytes == stack.nbytes
        for part in stack.parts.stacks:
            for tensor in part.storage.values():
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, (
                    "a part of something bigger"
                )
    from qkernels.formats import registry

    def dense(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a weight was dequantized")

    monkeypatch.setattr(type(registry.get("gptq")), "dequantize", dense)
    qk.load_model(tmp_path / "q")


# ---------------------------------------------------------------------- inspect
@pytest.mark.parametrize("kind", KINDS)
def test_inspect_knows_the_sizes(kind: str, tmp_path: Path) -> None:
    from qkernels.cli.inspect import collect

    save_moe(kind, "gptq", {"group_size": 64}, tmp_path / "q", tmp_path / "p")
    rows = {row.module: row for row in collect(str(tmp_path / "q"))[1]}
    for leaf, shape in zip(LEAVES[kind], ((128, 256), (128, 256), (256, 128)), strict=True):
        row = rows[f"model.layers.1.{BLOCK[kind]}.experts.3.{leaf}"]
        assert (row.format, row.shape, row.weights) == ("gptq", shape, 128 * 256)
