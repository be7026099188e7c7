"""Saving and loading Hugging Face directories: bit for bit, all or nothing, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qkernels as qk
from qkernels.checkpoints import load_tokenizer, tensor_files
from qkernels.checkpoints.hf import reader as huggingface
from qkernels.formats.gguf import TYPES

from ..conftest import CASES, case_id
from ..tiny import ids, save_tiny, tiny_model, tiny_tokenizer


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _assert_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape), name
        assert torch.equal(_bits(tensor), _bits(second[name])), name


def _quantized(format: str = "gptq", **params: Any) -> nn.Module:
    if format == "gptq":
        params.setdefault("group_size", 32)
    return qk.quantize_model(tiny_model(), format, progress=False, **params)


def _edit_config(directory: Path, **changes: Any) -> None:
    """Set fields of config.json; None deletes one."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _edit_tensors(directory: Path, drop: str = "", **changes: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items() if k != drop}
    save_file({**tensors, **changes}, path)


#: group sizes of conftest's cases that do not divide 64 and 96 have no tiny model; GGUF types have
#: files of
#: their own
FITTING = [
    (n, p)
    for n, p in CASES
    if p.get("group_size", 32) in (-1, 32) and n not in {t.name for t in TYPES}
] + [
    ("gptq", {"bits": 4, "group_size": 16, "act_order": True, "symmetric": False}),
    ("gptq", {"bits": 3, "group_size": 32, "symmetric": False}),
    ("gptq", {"bits": 8, "group_size": 32}),
    ("awq", {"group_size": 32}),
    ("pack_quantized", {"bits": 5, "group_size": 16, "symmetric": False}),
]


# ---------------------------------------------------------------------- round trips
@pytest.mark.parametrize(("name", "params"), FITTING, ids=map(case_id, FITTING))
def test_round_trip_is_bit_for_bit(name: str, params: dict[str, Any], tmp_path: Path) -> None:
    model = qk.quantize_model(tiny_model(), name, progress=False, **params)
    huggingface.save(model, tmp_path / "m")
    again = huggingface.load(tmp_path / "m")
    _assert_same_state(model, again)
    for layer, other in zip(model.modules(), again.modules(), strict=True):
        if isinstance(layer, qk.QuantLinear):
            assert isinstance(other, qk.QuantLinear)
            assert (other.packed.format, other.packed.params) == (name, layer.packed.params)
    assert torch.equal(model(ids(20)[None]).logits, again(ids(20)[None]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_model_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False, attention_bias=True).to(dtype)
    huggingface.save(model, tmp_path / "m")
    assert "quantization_config" not in json.loads((tmp_path / "m/config.json").read_text())
    again = huggingface.load(tmp_path / "m")
    assert again.dtype == dtype
    _assert_same_state(model, again)


def test_model_in_16_bits_stays_plain_linears(tmp_path: Path) -> None:
    model = qk.quantize_model(tiny_model().half(), "fp16", progress=False)
    huggingface.save(model, tmp_path / "m")
    again = huggingface.load(tmp_path / "m")
    assert not any(isinstance(m, qk.QuantLinear) for m in again.modules())
    _assert_same_state(model, again)


def test_biases_and_skipped_layers_survive(tmp_path: Path) -> None:
    model = tiny_model(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    qk.quantize_model(model, "nf4", skip=["*.down_proj"], progress=False)
    huggingface.save(model, tmp_path / "m")
    again = huggingface.load(tmp_path / "m")
    _assert_same_state(model, again)
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    skipped = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    assert set(skipped["llm_int8_skip_modules"]) == {
        "lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj",
    }  # fmt: skip


def test_saved_after_a_forward_pass_is_the_same(tmp_path: Path) -> None:
    """A forward pass may move weights to a kernel layout; the file must not show it."""
    model = _quantized("nf4")
    huggingface.save(model, tmp_path / "before")
    model(ids(20)[None])
    huggingface.save(model, tmp_path / "after")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("before", "after"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_names_in_the_file_are_the_ecosystem_s(tmp_path: Path) -> None:
    huggingface.save(_quantized("nf4", double_quant=True), tmp_path / "m")
    names = {n for n in load_file(tmp_path / "m/model.safetensors") if ".0.mlp.up_proj." in n}
    suffixes = {n.removeprefix("model.layers.0.mlp.up_proj.") for n in names}
    assert suffixes == {
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    }  # fmt: skip


def test_tied_embeddings_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    huggingface.save(_quantized(), tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m/model.safetensors")
    again = huggingface.load(tmp_path / "m")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_dtype_converts_what_is_not_packed(tmp_path: Path) -> None:
    model = _quantized("gptq")
    huggingface.save(model, tmp_path / "m")
    again = huggingface.load(tmp_path / "m", dtype=torch.bfloat16)
    assert again.model.embed_tokens.weight.dtype == again.model.norm.weight.dtype == torch.bfloat16
    packed = again.model.layers[0].mlp.up_proj.packed.tensors
    expected = model.model.layers[0].mlp.up_proj.packed.tensors
    assert all(
        torch.equal(packed[k], expected[k]) and packed[k].dtype == v.dtype
        for k, v in expected.items()
    )
    assert again(ids(9)[None]).logits.dtype == torch.bfloat16


def test_shards_and_index(tmp_path: Path) -> None:
    model = _quantized("int8")
    huggingface.save(model, tmp_path / "m", max_shard_bytes=20_000)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files[0].name == f"model-00001-of-{count:05d}.safetensors"
    for file in files:
        tensors = load_file(file)
        assert (
            sum(t.numel() * t.element_size() for t in tensors.values()) <= 20_000
            or len(tensors) == 1
        )
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    _assert_same_state(model, huggingface.load(tmp_path / "m"))


def test_tokenizer_is_saved_and_loaded(tmp_path: Path) -> None:
    huggingface.save(tiny_model(), tmp_path / "m", tokenizer=tiny_tokenizer())
    assert load_tokenizer(tmp_path / "m")("hi there")["input_ids"] == [ord(c) for c in "hi there"]
    huggingface.save(tiny_model(), tmp_path / "bare")
    with pytest.raises(ValueError, match="expected tokenizer files"):
        load_tokenizer(tmp_path / "bare")


def test_generation_config_survives(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.max_new_tokens = 7
    huggingface.save(model, tmp_path / "m")
    assert huggingface.load(tmp_path / "m").generation_config.max_new_tokens == 7


def test_a_gptq_file_with_a_bias_the_model_lacks(tmp_path: Path) -> None:
    """AutoGPTQ wrote zero biases for layers without one."""
    huggingface.save(_quantized(), tmp_path / "m")
    bias = torch.arange(96.0)
    _edit_tensors(tmp_path / "m", **{"model.layers.0.mlp.up_proj.bias": bias})
    assert torch.equal(huggingface.load(tmp_path / "m").model.layers[0].mlp.up_proj.bias, bias)


def test_a_quantized_output_projection(tmp_path: Path) -> None:
    model = tiny_model()
    model.lm_head = qk.QuantLinear.from_linear(model.lm_head, "nf4")
    qk.quantize_model(model, "nf4", progress=False)
    huggingface.save(model, tmp_path / "m")
    again = huggingface.load(tmp_path / "m")
    _assert_same_state(model, again)
    assert isinstance(again.lm_head, qk.QuantLinear)


#: bitsandbytes' CPU kernel wants blocks that divide K
BITSANDBYTES = [
    ("nf4", {"block_size": 32, "double_quant": True}),
    ("fp4", {"block_size": 32}),
    ("int8", {}),
]


@pytest.mark.parametrize(("format", "params"), BITSANDBYTES)
def test_transformers_reads_our_bitsandbytes_files(
    format: str, params: dict[str, Any], tmp_path: Path
) -> None:
    """transformers with bitsandbytes reads our files on the CPU; 4 bits multiply in bfloat16."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    model = _quantized(format, **params)
    huggingface.save(model, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", device_map="cpu", dtype=torch.float16
    )
    for name, layer in model.named_modules():
        if not isinstance(layer, qk.QuantLinear):
            continue
        other = theirs.get_submodule(name)
        assert type(other).__module__.startswith("bitsandbytes")
        x = torch.randn(8, layer.in_features).half()
        with torch.no_grad():
            a, b = layer(x).float(), other(x).float()
        assert (a - b).norm() / a.norm() < (2e-3 if format == "int8" else 8e-3), name


@pytest.mark.parametrize(("name", "params"), [
    ("w8a8", {}), ("w8a8", {"granularity": "tensor"}),
    ("fp8", {}), ("fp8", {"granularity": "tensor", "activation": "static", "input_scale": 0.02}),
    ("fp8", {"granularity": "channel", "activation": "dynamic"}),
])  # fmt: skip
def test_transformers_reads_our_compressed_tensors_files(
    name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = _quantized(name, **params)
    huggingface.save(model, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", device_map="cpu", dtype=torch.float32
    )
    theirs(ids(4)[None])  # it decompresses on first use
    for name, layer in model.named_modules():
        if isinstance(layer, qk.QuantLinear):
            weight = theirs.get_submodule(name).weight
            assert torch.equal(weight, layer.packed.dequantize(weight.dtype)), name


@pytest.mark.parametrize(("name", "params"), [
    ("pack_quantized", {"group_size": 32}), ("pack_quantized", {"group_size": -1, "bits": 8}),
    ("pack_quantized", {"group_size": 32, "symmetric": False}), ("fp8", {"granularity": "block"}),
    ("mxfp4", {}),
    ("fp8", {"granularity": "block", "activation": "dynamic", "scale_name": "weight_scale"}),
    ("fp8", {"granularity": "tensor", "activation": "dynamic", "scale_name": "weight_scale_inv"}),
], ids=str)  # fmt: skip
def test_transformers_dequantizes_our_files(
    name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    """`dequantize=True`, which is also all transformers can do with FP8 on a CPU."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    model = _quantized(name, **params).bfloat16()
    huggingface.save(model, tmp_path / "m")
    method = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"][
        "quant_method"
    ]
    kind = {"fp8": FineGrainedFP8Config, "compressed-tensors": CompressedTensorsConfig}[method]
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        device_map="cpu",
        dtype=torch.bfloat16,
        quantization_config=kind(dequantize=True),
    )
    for layer_name, layer in model.named_modules():
        if isinstance(layer, qk.QuantLinear):
            weight, ours = theirs.get_submodule(layer_name).weight, layer.packed.dequantize()
            assert type(theirs.get_submodule(layer_name)) is nn.Linear
            # Scale and product are each rounded to bfloat16, in an order of theirs.
            assert torch.allclose(weight.float(), ours, rtol=2**-7, atol=0), layer_name


# ---------------------------------------------------------------------- all or nothing
def test_a_failing_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write_file = tensor_files._write_file

    def fail_at_the_third(shard: dict[str, torch.Tensor], path: Path) -> None:
        if len(written) == 2:
            raise OSError("No space left on device")
        written.append(path)
        write_file(shard, path)

    monkeypatch.setattr(tensor_files, "_write_file", fail_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        huggingface.save(_quantized(), tmp_path / "m", max_shard_bytes=20_000)
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_leaves_the_earlier_one(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, path: Path) -> None:
            (path / "tokenizer.json").write_text("{")
            raise OSError("No space left on device")

    model = save_tiny(tmp_path / "m")
    before = sorted(f.name for f in (tmp_path / "m").iterdir())
    with pytest.raises(OSError, match="No space left"):
        huggingface.save(_quantized(), tmp_path / "m", tokenizer=Broken())
    assert sorted(f.name for f in (tmp_path / "m").iterdir()) == before
    assert [f.name for f in tmp_path.iterdir()] == ["m"]
    _assert_same_state(model, huggingface.load(tmp_path / "m"))


def test_an_earlier_save_is_replaced_whole(tmp_path: Path) -> None:
    huggingface.save(_quantized("int8"), tmp_path / "m", max_shard_bytes=20_000)
    model = _quantized("nf4")
    huggingface.save(model, tmp_path / "m")
    assert [f.name for f in (tmp_path / "m").glob("*.safetensors*")] == ["model.safetensors"]
    assert [f.name for f in tmp_path.iterdir()] == ["m"]
    _assert_same_state(model, huggingface.load(tmp_path / "m"))


def test_a_model_can_be_saved_over_its_own_files(tmp_path: Path) -> None:
    """Its tensors are mapped from the files that the save replaces."""
    save_tiny(tmp_path / "m")
    model = huggingface.load(tmp_path / "m")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    huggingface.save(model, tmp_path / "m")
    after = huggingface.load(tmp_path / "m").state_dict()
    assert all(torch.equal(before[k], after[k]) and torch.equal(before[k], v)
               for k, v in model.state_dict().items())  # fmt: skip


@pytest.mark.parametrize(("present", "message"), [
    (["notes.txt"], "expected an empty directory or an earlier save .* got one with notes.txt"),
    (["config.json", "notes.txt"], "expected nothing but a saved model's files, .* got notes.txt"),
    (["config.json", ".git/HEAD"], "expected nothing but a saved model's files, .* got .git"),
])  # fmt: skip
def test_directories_of_something_else_are_not_overwritten(
    present: list[str], message: str, tmp_path: Path
) -> None:
    for name in present:
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        huggingface.save(tiny_model(), tmp_path / "m")
    assert all((tmp_path / "m" / name).read_text() == "{}" for name in present)


def test_saving_to_a_file_or_a_module_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="expected a directory or nothing to save to, got a file"):
        huggingface.save(tiny_model(), tmp_path / "f")
    with pytest.raises(
        ValueError, match="model: expected a transformers PreTrainedModel, got Linear"
    ):
        huggingface.save(nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(ValueError, match="max_shard_bytes: expected at least 1, got 0"):
        huggingface.save(tiny_model(), tmp_path / "m", max_shard_bytes=0)


def test_two_formats_in_one_model_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    qk.quantize_model(model, "nf4", skip=["*.down_proj"], progress=False)
    qk.quantize_model(model, "gptq", group_size=32, progress=False)
    with pytest.raises(ValueError, match=r"down_proj: expected nf4 with .*; got gptq with"):
        huggingface.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------------- bad files
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    huggingface.save(_quantized(), tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": None}, "config.json: model_type: expected .* got None"),
    ({"model_type": "lama"}, "config.json: model_type: expected .* got 'lama'"),
    ({"hidden_size": None}, "config.json: hidden_size: expected a positive integer, got none"),
    ({"vocab_size": "many"}, "config.json: vocab_size: expected a positive integer, got 'many'"),
    ({"num_hidden_layers": 3}, "found none of: model.layers.2.self_attn.q_proj.weight"),
    ({"num_hidden_layers": 1}, "unexpected: model.layers.1"),
    ({"hidden_size": 32}, r"expected shape \(128, 32\) from config.json, got \(128, 64\)"),
    ({"quantization_config": None}, r"unexpected: .*; config.json has no quantization_config"),
    ({"quantization_config": 3}, "quantization_config: expected an object, got 3"),
    ({"quantization_config": {"quant_method": "hqq"}},
     r"quantization_config.quant_method: expected gptq, awq.*; got 'hqq'"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 5, "group_size": 32}},
     r"_proj: gptq: bits: expected one of .* got 5"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 32}},
     r"_proj: gptq: qweight: expected shape \((16|24), 64\), got \((8|12), 64\)"),
    ({"quantization_config": {"quant_method": "awq", "version": "gemv"}},
     r"quantization_config.version: expected 'gemm' for awq, got 'gemv'"),
])  # fmt: skip
def test_config_that_does_not_fit(changes: dict[str, Any], message: str, saved: Path) -> None:
    _edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        huggingface.load(saved)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "config.json: expected JSON"),
    ("[1]", "config.json: expected a JSON object, got list"),
    ("\xff\xfe", "config.json: expected JSON"),
])  # fmt: skip
def test_config_that_is_no_config(text: str, message: str, saved: Path) -> None:
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        huggingface.load(saved)


def test_missing_config(saved: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected a file config.json, found none"):
        huggingface.load(saved)


def test_missing_and_unexpected_tensors(saved: Path) -> None:
    _edit_tensors(saved, drop="model.norm.weight")
    with pytest.raises(
        ValueError, match="expected 1 more tensors, found none of: model.norm.weight"
    ):
        huggingface.load(saved)
    _edit_tensors(saved, **{"model.norm.weight": torch.ones(64), "model.norm.bias": torch.ones(64)})
    with pytest.raises(ValueError, match="got 1 unexpected: model.norm.bias$"):
        huggingface.load(saved)


def test_a_missing_packed_tensor(saved: Path) -> None:
    _edit_tensors(saved, drop="model.layers.1.mlp.up_proj.scales")
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj: gptq: scales: expected .* got none"
    ):
        huggingface.load(saved)


def test_a_bad_packed_tensor_is_named_with_its_file(saved: Path) -> None:
    name = "model.layers.1.mlp.up_proj.scales"
    scales = load_file(saved / "model.safetensors")[name].clone()
    scales[0, 3] = torch.nan
    _edit_tensors(saved, **{name: scales})
    with pytest.raises(
        ValueError, match=r"model.safetensors: .*up_proj: gptq: scales: expected finite"
    ):
        huggingface.load(saved)


def test_a_plain_tensor_of_the_wrong_shape_or_dtype(saved: Path) -> None:
    _edit_tensors(saved, **{"model.norm.weight": torch.ones(65)})
    with pytest.raises(
        ValueError, match=r"'model.norm.weight': expected shape \(64,\) .* got \(65,\)"
    ):
        huggingface.load(saved)
    _edit_tensors(saved, **{"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(
        ValueError, match=r"'model.norm.weight': expected dtype F16, BF16 or F32, got I8"
    ):
        huggingface.load(saved)


def test_pickled_weights_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"got only pickled ones \(pytorch_model.bin\), .* never loaded"
    ):
        huggingface.load(saved)


def test_no_weights_at_all(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="expected model.safetensors or .*index.json, found neither"
    ):
        huggingface.load(saved)


def test_a_file_is_no_directory(saved: Path) -> None:
    with pytest.raises(
        ValueError, match="expected a model directory or a .gguf file, got another file"
    ):
        huggingface.load(saved / "config.json")
