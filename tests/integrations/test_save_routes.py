"""Ways to save and load models with packed layers through transformers: read back, or refused."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import qkernels as qk
from qkernels.checkpoints.hf.model_config import NOTE
from qkernels.models.convert import convert_model
from qkernels.nn.embedding import QuantEmbedding

from ..moe_checkpoint import save_moe
from ..tiny import ids, save_tiny, tiny_model

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {"block_size": 32, "double_quant": True}), ("gptq", {"group_size": 32}),
    ("awq", {"group_size": 32}),
    ("pack_quantized", {"group_size": 32}), ("mxfp4", {}), ("int8", {}), ("w8a8", {}), ("fp8", {}),
]  # fmt: skip
#: what no quantization_config of others can say
OURS: list[tuple[str, dict[str, Any]]] = [
    ("q8_0", {}),
    ("quip", {}),
    ("quip_sharp", {}),
    ("spqr", {}),
]


def _model(format: str, params: dict[str, Any], **sizes: Any) -> nn.Module:
    model = tiny_model(intermediate_size=128, **sizes)
    return qk.quantize_model(model, format, skip=["*.0.mlp.up_proj"], progress=False, **params)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(9)[None]).logits


def _quantization(path: Path) -> dict[str, Any] | None:
    return json.loads((path / "config.json").read_text()).get("quantization_config")


# ---------------------------------------------------------------------- model.save_pretrained
@pytest.mark.parametrize(("format", "params"), KINDS, ids=str)
@pytest.mark.parametrize("loaded", [False, True])
def test_save_pretrained_writes_what_save_model_writes(
    format: str, params: dict[str, Any], loaded: bool, tmp_path: Path
) -> None:
    model = _model(format, params, tie_word_embeddings=not loaded)
    qk.save_model(model, tmp_path / "w")
    want = _logits(model)
    if loaded:
        model = qk.load_model(tmp_path / "w")
    model.save_pretrained(tmp_path / "s")
    assert _quantization(tmp_path / "s") == _quantization(tmp_path / "w")
    assert torch.equal(_logits(qk.load_model(tmp_path / "s")), want)


@pytest.mark.parametrize(("format", "params"), [("nf4", {}), ("w8a8", {}), ("fp8", {})])
def test_transformers_reads_what_save_pretrained_writes(
    format: str, params: dict[str, Any], tmp_path: Path
) -> None:
    """With random weights the logits would differ entirely."""
    model = _model(format, params)
    model.save_pretrained(tmp_path / "s")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "s", device_map="cpu", dtype=torch.float32
    )
    a, b = _logits(model), _logits(theirs)
    assert (
        a - b
    ).norm() < 0.05 * a.norm()  # 4-bit products in bfloat16, or activations that are not rounded


def test_it_is_asked_anew_at_each_save(tmp_path: Path) -> None:
    """Changed layers, copied and pickled models, parts of models, models no longer quantized."""
    model = _model("nf4", {})
    model.save_pretrained(tmp_path / "a")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.model.layers[0].self_attn.q_proj = nn.Linear(64, 64, bias=False)
        other.save_pretrained(tmp_path / "b")
        assert (
            "model.layers.0.self_attn.q_proj"
            in _quantization(tmp_path / "b")["llm_int8_skip_modules"]
        )
        assert torch.equal(_logits(qk.load_model(tmp_path / "b")), _logits(other))
    model.model.save_pretrained(tmp_path / "c")
    inner = qk.load_model(tmp_path / "c")
    assert torch.equal(
        inner(ids(9)[None]).last_hidden_state, model.model(ids(9)[None]).last_hidden_state
    )
    convert_model(model, "bf16")
    model.save_pretrained(tmp_path / "d")
    assert _quantization(tmp_path / "d") is None
    model.save_pretrained(tmp_path / "d")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.bfloat16)
    assert torch.equal(
        theirs.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    )


@pytest.mark.parametrize(("format", "params"), OURS, ids=str)
def test_what_only_we_read_is_not_saved_so(
    format: str, params: dict[str, Any], tmp_path: Path
) -> None:
    model = _model(format, params)
    message = (
        rf"save_pretrained: expected formats .* others know, got {format}; "
        r"qkernels.save_model\(model, path\)"
    )
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "s")
    assert not list((tmp_path / "s").iterdir())


def test_what_no_config_can_say_is_not_saved(tmp_path: Path) -> None:
    model = _model("nf4", {})
    qk.quantize_model(model, "gptq", group_size=32, progress=False)
    with pytest.raises(ValueError, match="because no quantization_config can say both"):
        model.save_pretrained(tmp_path / "s")
    assert not list((tmp_path / "s").iterdir())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts(kind: str, tmp_path: Path) -> None:
    save_moe(kind, "gptq", {"group_size": 64}, tmp_path / "q", tmp_path / "p")
    model = qk.load_model(tmp_path / "q")
    model.save_pretrained(tmp_path / "s")
    assert torch.equal(_logits(qk.load_model(tmp_path / "s")), _logits(model))


def test_resized_embeddings(tmp_path: Path) -> None:
    model = _model("nf4", {}, tie_word_embeddings=False)
    model.resize_token_embeddings(140)
    model.save_pretrained(tmp_path / "s")
    assert torch.equal(_logits(qk.load_model(tmp_path / "s")), _logits(model))
    model.lm_head = qk.QuantLinear.from_linear(model.lm_head, "nf4")
    # transformers' own
    with pytest.raises(TypeError, match="Old language model head is of type .*QuantLinear"):
        model.resize_token_embeddings(150)


# ---------------------------------------------------------------------- plain from_pretrained
def _own(path: Path) -> dict[str, torch.Tensor]:
    """Write directories that only we read. Returns their names -> logits of the models."""
    models = {format: _model(format, params) for format, params in OURS}
    model = models["embedding"] = _model("q8_0", {}, tie_word_embeddings=False)
    model.set_input_embeddings(
        QuantEmbedding(qk.quantize(model.get_input_embeddings().weight, "q8_0"))
    )
    for name, model in models.items():
        qk.save_model(model, path / name)
        config = json.loads((path / name / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "qkernels"
        assert config["transformers_weights"] == NOTE
    return {name: _logits(model) for name, model in models.items()}


LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
        print("LOADED", path)
    except ValueError as error:
        print("REFUSED", str(error).splitlines()[-1][-200:])
"""


def test_our_own_directories(tmp_path: Path) -> None:
    """transformers alone refuses them; it loads them after our integration is imported.

    qk.load_model reads them, too.
    """
    want = _own(tmp_path)
    paths = [str(tmp_path / name) for name in want]
    result = subprocess.run(
        [sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths), result.stderr
    assert all(line.startswith("REFUSED") and NOTE in line for line in lines), lines

    import qkernels.integrations.transformers  # noqa: F401

    for name, logits in want.items():
        path = tmp_path / name
        loaded = qk.load_model(path)
        assert torch.equal(_logits(loaded), logits), name
        assert not hasattr(loaded.config, "transformers_weights")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            theirs = AutoModelForCausalLM.from_pretrained(path)
        torch.testing.assert_close(_logits(theirs), logits, msg=name)
        qk.save_model(theirs, tmp_path / "again")
        assert torch.equal(_logits(qk.load_model(tmp_path / "again")), logits), name


def test_the_note_goes_with_the_formats(tmp_path: Path) -> None:
    """A directory of ours that gets another library's format loses the note that refuses it."""
    qk.save_model(_model("q8_0", {}), tmp_path / "m")
    for model in (
        qk.load_model(tmp_path / "m"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
    ):
        convert_model(model, "int8")
        qk.save_model(model, tmp_path / "c")
        model.save_pretrained(tmp_path / "d")
        for path in (tmp_path / "c", tmp_path / "d"):
            assert "transformers_weights" not in json.loads((path / "config.json").read_text())
            assert torch.equal(_logits(qk.load_model(path)), _logits(model))


def test_a_head_of_its_own_in_a_tied_config(tmp_path: Path) -> None:
    """Packed and plain, by transformers' loader; tests/checkpoints/test_tying.py tests ours."""
    from qkernels.integrations.transformers import checkpoint_config

    for packed in (True, False):
        model = _model("gptq", {"group_size": 32}, tie_word_embeddings=False)
        if packed:
            model.lm_head = qk.QuantLinear.from_linear(model.lm_head, "gptq", group_size=32)
        qk.save_model(model, tmp_path / "m")
        file = tmp_path / "m/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
        config = checkpoint_config(tmp_path / "m")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", config=config)
        assert torch.equal(_logits(theirs), _logits(model))


def test_models_that_initialize_layers_by_name(tmp_path: Path) -> None:
    """T5's `_init_weights` fills `wo.weight`, which is a placeholder during loading."""
    from transformers import T5Config, T5ForConditionalGeneration

    from qkernels.integrations.transformers import QKernelsConfig

    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "m")
    loaded = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "m", quantization_config=QKernelsConfig("nf4")
    )
    qk.quantize_model(model, "nf4", progress=False)
    tokens = {"input_ids": ids(9)[None], "decoder_input_ids": ids(4)[None]}
    with torch.no_grad():
        assert torch.equal(loaded(**tokens).logits, model(**tokens).logits)


def test_a_model_quantized_by_transformers_is_asked_anew(tmp_path: Path) -> None:
    from qkernels.integrations.transformers import QKernelsConfig

    save_tiny(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=QKernelsConfig("nf4")
    )
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 96, bias=False)
    model.save_pretrained(tmp_path / "s")
    assert torch.equal(_logits(qk.load_model(tmp_path / "s")), _logits(model))


# --------------------------------------------------------------------- what a reviewer's models did
def test_layers_that_the_saved_model_does_not_know_of(tmp_path: Path) -> None:
    """Layers put in by hand, or by quantizing a part of a model.

    transformers would write no config for them, and load random weights.
    """
    by_hand, inner = tiny_model(), tiny_model()
    layer = by_hand.model.layers[0].mlp
    layer.up_proj = qk.QuantLinear.from_linear(layer.up_proj, "nf4")
    qk.quantize_model(inner.model, "gptq", group_size=32, progress=False)
    for i, model in enumerate((by_hand, inner)):
        with pytest.raises(
            ValueError, match=r"put in by hand; qkernels.save_model\(model, path\) saves it"
        ):
            model.save_pretrained(tmp_path / str(i))
        assert not list((tmp_path / str(i)).glob("*.safetensors"))
        qk.save_model(model, tmp_path / f"m{i}")
        assert torch.equal(_logits(qk.load_model(tmp_path / f"m{i}")), _logits(model))
        assert model.state_dict()
    inner.model.save_pretrained(tmp_path / "inner")
    assert _quantization(tmp_path / "inner") is not None


def test_a_model_without_its_head_and_with_it(tmp_path: Path) -> None:
    """transformers loads one from a directory of the other; so do we, with packed layers."""
    from transformers import AutoModel, LlamaModel

    from qkernels.integrations.transformers import checkpoint_config

    tokens = ids(9)[None]
    for format, params in (("q8_0", {}), ("gptq", {"group_size": 32})):
        model = _model(format, params)
        qk.save_model(model, tmp_path / format)
        base = AutoModel.from_pretrained(
            tmp_path / format, config=checkpoint_config(tmp_path / format)
        )
        assert isinstance(base, LlamaModel)
        assert sum(isinstance(m, qk.QuantLinear) for m in base.modules()) == 13
        with torch.no_grad():
            want = model.model(tokens).last_hidden_state
            assert torch.equal(base(tokens).last_hidden_state, want)
        qk.save_model(base, tmp_path / f"{format}-base")
        path = tmp_path / f"{format}-base"
        whole = AutoModelForCausalLM.from_pretrained(path, config=checkpoint_config(path))
        assert torch.equal(_logits(whole), _logits(model)), "the head is tied"


def test_packed_tensors_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from qkernels.integrations.transformers import checkpoint_config

    qk.save_model(_model("gptq", {"group_size": 32}), tmp_path / "m")
    config = OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4
    )
    config.quantization_config = checkpoint_config(tmp_path / "m").quantization_config
    with pytest.raises(
        ValueError, match="expected tensors of OPTForCausalLM's layers, got only others: "
    ):
        OPTForCausalLM.from_pretrained(tmp_path / "m", config=config)


def test_a_tied_packed_embedding_of_our_own(tmp_path: Path) -> None:
    import qkernels.integrations.transformers  # noqa: F401

    model = _model("q8_0", {})
    model.set_input_embeddings(
        QuantEmbedding(qk.quantize(model.get_input_embeddings().weight, "q8_0"))
    )
    model.set_output_embeddings(qk.QuantLinear(model.get_input_embeddings().packed))
    qk.save_model(model, tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["tie_word_embeddings"] is True
    for loaded in (
        qk.load_model(tmp_path / "m"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
    ):
        assert isinstance(loaded.get_input_embeddings(), QuantEmbedding)
        assert isinstance(loaded.lm_head, qk.QuantLinear)
        torch.testing.assert_close(_logits(loaded), _logits(model))


def test_a_packed_router_through_transformers(tmp_path: Path) -> None:
    """The router computes with its weight, so loading puts the values there, not random ones."""
    from safetensors.torch import load_file, save_file

    from qkernels.integrations.transformers import checkpoint_config

    save_moe("qwen3_moe", "gptq", {"group_size": 64}, tmp_path / "q", tmp_path / "p")
    file = tmp_path / "q/model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        packed = qk.quantize(tensors.pop(name), "gptq", bits=8, group_size=64)
        tensors |= {
            f"{name.removesuffix('weight')}{key}": t.contiguous()
            for key, t in packed.tensors.items()
        }
    save_file(tensors, file)
    config = json.loads((tmp_path / "q/config.json").read_text())
    quantization = {
        k: v
        for k, v in config["quantization_config"].items()
        if k not in ("dynamic", "modules_to_not_convert")
    }
    config["quantization_config"] = {**quantization, "dynamic": {r"+:.*mlp\.gate$": {"bits": 8}}}
    (tmp_path / "q/config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="2 modules are stored packed but need a plain weight"):
        want = _logits(qk.load_model(tmp_path / "q"))
    with pytest.warns(UserWarning, match="2 modules are stored packed but need a plain weight"):
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "q", config=checkpoint_config(tmp_path / "q"), dtype=torch.float32
        )
    assert torch.equal(_logits(theirs), want)


def test_offloaded_models_are_refused_by_name(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(
        _model("gptq", {"group_size": 32}), execution_device=torch.device("cpu")
    )
    for save in (model.save_pretrained, lambda path: qk.save_model(model, path)):
        with pytest.raises(
            ValueError,
            match="expected data to save, got a tensor on the meta device; if the model is "
            "offloaded",
        ):
            save(tmp_path / "s")
        assert not list(tmp_path.glob("s/*.safetensors"))
    plain = accelerate.cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match="_proj: weight: expected data, got a tensor on the meta device"
    ):
        qk.quantize_model(plain, "nf4", progress=False)
    with pytest.raises(
        ValueError, match="nf4: weight: expected data, got a tensor on the meta device"
    ):
        qk.quantize(torch.empty(4, 64, device="meta"), "nf4")
