"""Checkpoints that deviate from documentation: read as others read them, or one clear message."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import qkernels as qk
from qkernels.integrations.transformers import QKernelsConfig

from ..tiny import ids, tiny_model


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(9)[None]).logits


def _edit(path: Path, **changes: Any) -> None:
    """Set fields of quantization_config; None deletes one."""
    config = json.loads((path / "config.json").read_text())
    quantization = {**config["quantization_config"], **changes}
    config["quantization_config"] = {k: v for k, v in quantization.items() if v is not None}
    (path / "config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------------- GPT-2's transposed linears
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {"group_size": 32}), ("nf4", {}), ("fp8", {}), ("pack_quantized", {"group_size": 32}),
    ("awq", {"group_size": 32}), ("int8", {}), ("w8a8", {}), ("q8_0", {}), ("fp16", {}),
]  # fmt: skip


def _gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("format", "params"), KINDS, ids=str)
def test_gpt2(format: str, params: dict[str, Any], tmp_path: Path) -> None:
    """Quantize, save and load, with one layer left plain."""
    model = qk.quantize_model(_gpt2(), format, skip=["*.0.mlp.c_fc"], progress=False, **params)
    qk.save_model(model, tmp_path / "m")
    loaded = qk.load_model(tmp_path / "m")
    assert type(loaded.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    torch.testing.assert_close(
        _logits(loaded), _logits(model), rtol=0, atol=0 if format != "fp16" else 1e-5
    )
    qk.save_model(loaded, tmp_path / "again")
    assert torch.equal(_logits(qk.load_model(tmp_path / "again")), _logits(loaded))
    try:  # transformers must not run it on random weights
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", dtype=torch.float32
        )
    except ImportError:  # of GPTQModel
        assert format == "gptq"
    else:
        a, b = _logits(theirs), _logits(model)
        assert (a - b).norm() <= 10 * 2.0**-7 * b.norm()


@pytest.mark.parametrize("options", [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True},
], ids=str)  # fmt: skip
def test_bitsandbytes_own_gpt2(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    _gpt2().save_pretrained(tmp_path / "m")
    config = transformers.BitsAndBytesConfig(
        **options,
        **({"bnb_4bit_compute_dtype": torch.float32} if "load_in_4bit" in options else {}),
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=config, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "q")
    ours = qk.load_model(tmp_path / "q")
    assert sum(isinstance(m, qk.QuantLinear) for m in ours.modules()) == 8
    a, b = _logits(ours), _logits(theirs)
    # Activations are rounded to 8 bits, or products to bfloat16: see test_others.py.
    assert (a - b).norm() <= 10 * 2.0**-7 * b.norm()


@pytest.mark.parametrize("format", ["nf4", "q8_0"])
def test_gpt2_quantized_on_load(format: str, tmp_path: Path) -> None:
    model = _gpt2()
    model.save_pretrained(tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=QKernelsConfig(format)
    )
    want = qk.quantize_model(copy.deepcopy(model), format, progress=False)
    assert sum(isinstance(m, qk.QuantLinear) for m in loaded.modules()) == 8
    assert torch.equal(_logits(loaded), _logits(want))


# ------------------------------------------------------------ configs that say too little, or wrong
@pytest.mark.parametrize("change", [{"desc_act": False}, {"desc_act": None}], ids=str)
def test_permuted_groups_that_the_config_does_not_speak_of(
    change: dict[str, Any], tmp_path: Path
) -> None:
    model = qk.quantize_model(tiny_model(), "gptq", group_size=32, act_order=True, progress=False)
    qk.save_model(model, tmp_path / "m")
    _edit(tmp_path / "m", **change)
    assert torch.equal(_logits(qk.load_model(tmp_path / "m")), _logits(model))


@pytest.mark.parametrize("said", [True, False])
def test_an_index_of_zeros(said: bool, tmp_path: Path) -> None:
    model = qk.quantize_model(tiny_model(), "gptq", group_size=32, progress=False)
    qk.save_model(model, tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    tensors = {
        k: torch.zeros_like(v) if k.endswith("g_idx") else v.clone()
        for k, v in load_file(file).items()
    }
    save_file(tensors, file)
    _edit(tmp_path / "m", desc_act=said)
    loaded = qk.load_model(tmp_path / "m")
    assert torch.equal(_logits(loaded), _logits(model))
    qk.save_model(loaded, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("said", [None, "nf4", "fp4"])
def test_the_table_is_in_the_quant_state(format: str, said: str | None, tmp_path: Path) -> None:
    """The config may be silent or wrong; like bitsandbytes, we believe the quant state."""
    model = qk.quantize_model(tiny_model(), format, progress=False)
    qk.save_model(model, tmp_path / "m")
    _edit(tmp_path / "m", bnb_4bit_quant_type=said)
    loaded = qk.load_model(tmp_path / "m")
    assert {m.packed.format for m in loaded.modules() if isinstance(m, qk.QuantLinear)} == {format}
    assert torch.equal(_logits(loaded), _logits(model))


def test_a_stale_index_beside_one_file(tmp_path: Path) -> None:
    """transformers reads model.safetensors."""
    qk.save_model(tiny_model(seed=1), tmp_path / "old", max_shard_bytes=20_000)
    model = tiny_model()
    qk.save_model(model, tmp_path / "m")
    name = "model.safetensors.index.json"
    (tmp_path / "m" / name).write_text((tmp_path / "old" / name).read_text())
    assert torch.equal(_logits(qk.load_model(tmp_path / "m")), _logits(model))
    assert torch.equal(
        _logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")), _logits(model)
    )


@pytest.mark.parametrize(("dtype", "want"), [
    ("float16", torch.float16), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16),
    ("auto", torch.float32),
    (None, torch.float32),
])  # fmt: skip
def test_dtypes_by_name(dtype: Any, want: torch.dtype, tmp_path: Path) -> None:
    qk.save_model(tiny_model(), tmp_path / "m")
    assert qk.load_model(tmp_path / "m", dtype=dtype).dtype == want


@pytest.mark.parametrize("dtype", ["half precision", "int8", torch.int32, "nn", 16])
def test_dtypes_that_are_none(dtype: Any, tmp_path: Path) -> None:
    qk.save_model(tiny_model(), tmp_path / "m")
    with pytest.raises(
        ValueError, match="dtype: expected None or one of float16, bfloat16, float32, float64, got"
    ):
        qk.load_model(tmp_path / "m", dtype=dtype)


# ---------------------------------------------------------------------- the model's class
@pytest.mark.parametrize("names", [None, [], ["QWenLMHeadModel"], ["LlamaForCausalLM"]], ids=str)
def test_a_causal_model_by_its_type(names: list[str] | None, tmp_path: Path) -> None:
    qk.save_model(tiny_model(), tmp_path / "m")
    file = tmp_path / "m/config.json"
    config = {**json.loads(file.read_text()), "architectures": names}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert torch.equal(_logits(qk.load_model(tmp_path / "m")), _logits(tiny_model()))


@pytest.mark.parametrize(("names", "message"), [
    (["BertModel"], "architectures: expected a class for the model type 'llama', got 'BertModel'"),
])  # fmt: skip
def test_classes_that_do_not_fit(names: list[str], message: str, tmp_path: Path) -> None:
    qk.save_model(tiny_model(), tmp_path / "m")
    file = tmp_path / "m/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": names}))
    with pytest.raises(ValueError, match=message):
        qk.load_model(tmp_path / "m")


def test_a_model_without_a_class(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
    )
    qk.save_model(transformers.ViTModel(config), tmp_path / "m")
    file = tmp_path / "m/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["MyViT"]}))
    with pytest.raises(
        ValueError, match=r"because 'vit' is no causal language model's type, got \['MyViT'\]"
    ):
        qk.load_model(tmp_path / "m")


# ----------------------------------------------------------------- embeddings that scale their rows
def _gemma(**changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return transformers.GemmaForCausalLM(config).eval()


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_16_bit_layers_beside_embeddings_that_scale(format: str, tmp_path: Path) -> None:
    """A layer in another dtype than its input stays a QuantLinear, which accepts both."""
    model = qk.quantize_model(_gemma(), format, progress=False)
    qk.save_model(model, tmp_path / "m")
    loaded = qk.load_model(tmp_path / "m")
    assert sum(isinstance(m, qk.QuantLinear) for m in loaded.modules()) == 14
    assert torch.equal(_logits(loaded), _logits(model))


def test_a_packed_head_gives_such_an_embedding_its_values(tmp_path: Path) -> None:
    """Gemma's embedding multiplies its rows, which a QuantEmbedding does not."""
    model = _gemma()
    qk.quantize_model(model, "gptq", group_size=32, progress=False)
    head = qk.QuantLinear.from_linear(model.lm_head, "gptq", group_size=32)
    model.config.tie_word_embeddings = False
    model.lm_head = head
    model.model.embed_tokens.weight = nn.Parameter(head.packed.dequantize())
    qk.save_model(model, tmp_path / "m")
    file, config = tmp_path / "m/model.safetensors", tmp_path / "m/config.json"
    save_file({k: v for k, v in load_file(file).items() if "embed_tokens" not in k}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    assert torch.equal(_logits(qk.load_model(tmp_path / "m")), _logits(model))


# ---------------------------------------------------------------------- what others keep in float32
@pytest.mark.parametrize("options", [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    {"load_in_8bit": True},
], ids=str)  # fmt: skip
def test_t5_as_bitsandbytes_has_it(options: dict[str, Any], tmp_path: Path) -> None:
    """`wo` overflows float16, so transformers leaves it plain, and could not read it packed."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "m")
    config = transformers.BitsAndBytesConfig(**options)
    load = transformers.T5ForConditionalGeneration.from_pretrained
    theirs = load(tmp_path / "m", quantization_config=config, device_map="cpu", dtype=torch.float32)
    with pytest.warns(
        UserWarning,
        match="wo and 1 more like it stays as it is: T5ForConditionalGeneration keeps wo",
    ):
        qk.quantize_model(model, "nf4" if "load_in_4bit" in options else "int8", progress=False)
    plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    packed = {
        n for n, m in theirs.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    assert packed == {n for n, m in model.named_modules() if isinstance(m, qk.QuantLinear)}
    assert {n.rpartition(".")[2] for n in plain} == {"wo", "lm_head"}
    theirs.save_pretrained(tmp_path / "t")
    qk.save_model(model, tmp_path / "q")
    tokens = {"input_ids": ids(9)[None], "decoder_input_ids": ids(4)[None]}
    with torch.no_grad():
        want = model(**tokens).logits
        for other in (
            load(tmp_path / "q", device_map="cpu", dtype=torch.float32),
            qk.load_model(tmp_path / "t"),
        ):
            assert (other(**tokens).logits - want).norm() <= 10 * 2.0**-7 * want.norm()
