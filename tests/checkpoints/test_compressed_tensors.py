"""Directories written by compressed-tensors load with its weights and its forward's logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qkernels as qk
from qkernels.checkpoints.hf.quantization import Plan, kinds_of
from qkernels.nn.embedding import QuantEmbedding

from ..tiny import ids, tiny_model

pytest.importorskip("compressed_tensors")

Groups = dict[str, dict[str, Any]]


def weights(**changes: Any) -> dict[str, Any]:
    """QuantizationArgs for weights; int4 in groups of 32 by default."""
    return {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        **changes,
    }


def int8(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **changes}


def fp8(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", **changes}


def mxfp4(**changes: Any) -> dict[str, Any]:
    groups = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    return {"num_bits": 4, "type": "float", "symmetric": True, **groups, **changes}


def tokens(**changes: Any) -> dict[str, Any]:
    """QuantizationArgs for activations: int8 with a scale per token."""
    return int8(strategy="token", dynamic=True, **changes)


def _qparams(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Scales and zero points, chosen by compressed-tensors' own functions."""
    from compressed_tensors.quantization.utils import calculate_qparams

    n, k = weight.shape
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
        grouped = padded.view(-(-n // rows), rows, -1, columns).transpose(1, 2).flatten(2)
    elif args.strategy == "tensor":
        grouped = weight.reshape(1, -1)
    else:
        grouped = weight.view(n, -1, args.group_size or k)
    return calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)


def write(
    path: Path,
    groups: Groups,
    ignore: tuple[str, ...] = ("lm_head",),
    model: nn.Module | None = None,
    format: str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Quantize a model with compressed-tensors and save it.

    Returns the dequantized weights by module and the logits of ids(20), both its own, the latter
    with activations rounded as the groups say.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        fake_quantize,
    )

    model = tiny_model() if model is None else model
    config = QuantizationConfig(config_groups=groups, ignore=list(ignore))
    apply_quantization_config(model, config, show_progress=False)
    rounded = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        weight, args = module.weight.detach(), scheme.weights
        scale, zero = _qparams(weight, args)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.05)
            if not scheme.input_activations.symmetric:
                module.input_zero_point.data.fill_(-9)
        rounded[name] = fake_quantize(
            weight, module.weight_scale, getattr(module, "weight_zero_point", None), args
        )
    with torch.no_grad():
        logits = model(ids(20)[None]).logits
    compressor = ModelCompressor.from_pretrained_model(model, format)
    compressor.compress_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path, save_original_format=False)
    compressor.update_config(path)
    return rounded, logits


def edit(path: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def quantization(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def assert_same_tensors(one: Path, other: Path) -> None:
    """Assert equal bits, for any dtype."""
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(
            ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name


def _packed_zeros(path: Path) -> bool:
    names = {name.rpartition(".")[2] for name in load_file(path / "model.safetensors")}
    return {"weight_packed", "weight_zero_point"} <= names


def check(
    path: Path,
    again: Path,
    rounded: dict[str, Tensor],
    logits: Tensor | None,
    within: float = 2.0**-19,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Load, compare weights and logits, save, and load the saved files here and in transformers.

    dtype: the one that transformers loads with.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = qk.load_model(path)
    packed = {
        n: m for n, m in model.named_modules() if isinstance(m, (qk.QuantLinear, QuantEmbedding))
    }
    assert set(packed) == set(rounded)
    for name, layer in packed.items():
        assert torch.equal(layer.packed.dequantize(), rounded[name]), name
    with torch.no_grad():
        got = model(ids(20)[None]).logits
        if logits is not None:
            assert (got - logits).norm() < within * logits.norm()
        qk.save_model(model, again)
        assert_same_tensors(again, path)
        assert torch.equal(qk.load_model(again)(ids(20)[None]).logits, got)
    # It decompresses on first use, but takes no packed zero points or embeddings then, not its own
    # either.
    dequantize = _packed_zeros(path) or "model.embed_tokens" in rounded
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(again, device_map="cpu", dtype=dtype, **more)
    theirs(ids(4)[None])
    for name, value in rounded.items():
        assert torch.equal(theirs.get_submodule(name).weight.to(value.dtype), value), name
    return model


# ---------------------------------------------------------------------- targets
TARGETS = [
    {"a": ["Linear"]}, {"a": ["Embedding"]}, {"a": ["Linear", "Embedding"]}, {"a": ["Module"]},
    {"a": ["Linear"], "b": ["Embedding"]}, {"a": ["LlamaAttention", "Linear"]},
    {"a": ["re:.*"], "b": ["Embedding"]},
    {"a": ["Linear"], "b": ["model.embed_tokens", "re:.*up_proj"]},
    {"a": ["re:.*mlp.*", "Embedding"], "b": ["re:.*down_proj", "lm_head"], "c": ["Linear"]},
    {"a": ["re:.*proj"], "b": ["re:.*mlp.*"]}, {"a": ["Linear"], "b": ["Module"]},
    {"a": ["Linear"], "b": ["Linear"]},
]  # fmt: skip


@pytest.mark.parametrize(
    "ignore", [[], ["Embedding"], ["Linear"], ["lm_head", "re:.*k_proj"], ["Module"]], ids=str
)
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_agree_with_compressed_tensors(
    targets: dict[str, list[str]], ignore: list[str]
) -> None:
    """Each linear layer and embedding gets the scheme that compressed-tensors applies to it."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    bits = dict(zip(targets, (4, 8, 2), strict=False))
    groups = {
        name: {"targets": own, "weights": weights(num_bits=bits[name])}
        for name, own in targets.items()
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }
    plan = Plan("here", {**config, "ignore": ignore})
    model = tiny_model()
    theirs = QuantizationConfig(config_groups=groups, ignore=ignore)
    apply_quantization_config(model, theirs, show_progress=False)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            applied = getattr(module, "quantization_scheme", None)
            ours = plan.scheme(name, kinds_of(module))
            assert (ours and ours.params["bits"]) == (applied and applied.weights.num_bits), name


# ---------------------------------------------------------------------- embeddings
EMBEDDINGS = {
    "int4": weights(), "int4-asymmetric": weights(symmetric=False), "int8": weights(num_bits=8),
    "int3-asymmetric": weights(num_bits=3, symmetric=False), "int5-channel":
    {"num_bits": 5, "type": "int", "symmetric": False, "strategy": "channel"}, "fp8": fp8(),
    "fp8-tensor": fp8(strategy="tensor"),
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_packed_embedding(kind: str, tied: bool, tmp_path: Path) -> None:
    """Rows of the embedding equal theirs; the head keeps the tensors that the files hold for it."""
    groups = {"a": {"targets": ["Linear", "Embedding"], "weights": EMBEDDINGS[kind]}}
    model = tiny_model(tie_word_embeddings=tied)
    rounded, logits = write(tmp_path / "q", groups, model=model)
    ours = check(tmp_path / "q", tmp_path / "s", rounded, logits)
    embedding = ours.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    rows = torch.randint(0, 128, (3, 70))
    assert torch.equal(embedding(rows), rounded["model.embed_tokens"][rows])


@pytest.mark.parametrize("kind", ["int4-asymmetric", "fp8"])
def test_head_tied_to_a_packed_embedding(kind: str, tmp_path: Path) -> None:
    """If the files hold no tensors of the head, the head multiplies by the embedding's bytes."""
    from safetensors.torch import save_file

    groups = {"a": {"targets": ["Embedding"], "weights": EMBEDDINGS[kind]}}
    rounded, _ = write(tmp_path / "q", groups)
    tensors = load_file(tmp_path / "q/model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file(tensors, tmp_path / "q/model.safetensors", {"format": "pt"})
    ours = qk.load_model(tmp_path / "q")
    reference = tiny_model()
    reference.model.embed_tokens.weight.data.copy_(rounded["model.embed_tokens"])
    with torch.no_grad():
        want, got = reference(ids(20)[None]).logits, ours(ids(20)[None]).logits
    assert (got - want).norm() < 2.0**-19 * want.norm()
    head, embedding = ours.get_output_embeddings(), ours.get_input_embeddings()
    assert (
        head.packed.tensors["weight_scale"].data_ptr()
        == embedding.packed.tensors["weight_scale"].data_ptr()
    )
    qk.save_model(ours, tmp_path / "s")
    assert_same_tensors(tmp_path / "s", tmp_path / "q")
    assert torch.equal(qk.load_model(tmp_path / "s")(ids(20)[None]).logits, got)
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    dequantize = CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "s", dtype=torch.float32, quantization_config=dequantize
        )
    with torch.no_grad():
        assert torch.equal(theirs(ids(20)[None]).logits, want)


def test_linear_is_no_embedding(tmp_path: Path) -> None:
    """A packed embedding that the config does not mention is refused."""
    write(tmp_path / "q", {"a": {"targets": ["Linear", "Embedding"], "weights": weights()}})
    config = quantization(tmp_path / "q")
    config["config_groups"]["group_0"]["targets"] = ["Linear"]
    edit(tmp_path / "q", quantization_config=config)
    with pytest.raises(
        ValueError, match=r"embed_tokens: expected a plain weight, because .* got weight_packed"
    ):
        qk.load_model(tmp_path / "q")


# ---------------------------------------------------------------------- MXFP4
@pytest.mark.parametrize("targets", [["Linear"], ["Linear", "Embedding"]], ids=str)
def test_mxfp4(targets: list[str], tmp_path: Path) -> None:
    """It decompresses to bfloat16 only, exactly; in float32 its logits are then ours."""
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    groups = {"a": {"targets": targets, "weights": mxfp4()}}
    rounded, logits = write(tmp_path / "q", groups, model=model)
    ours = check(tmp_path / "q", tmp_path / "s", rounded, logits, dtype=torch.bfloat16)
    assert isinstance(ours.get_input_embeddings(), QuantEmbedding) == ("Embedding" in targets)
    assert quantization(tmp_path / "s")["format"] == "mxfp4-pack-quantized"
    if "Embedding" in targets:
        return
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.bfloat16)
    theirs(ids(4)[None])  # it decompresses on first use
    nn.Module.float(theirs)  # its own `float` refuses, because the model was packed
    with torch.no_grad():
        want, got = theirs(ids(20)[None]).logits, ours(ids(20)[None]).logits
    assert (got - want).norm() < 2.0**-19 * want.norm()


def test_mxfp4_beside_another_format(tmp_path: Path) -> None:
    groups = {
        "a": {"targets": ["re:.*mlp.*"], "weights": mxfp4(), "format": "mxfp4-pack-quantized"},
        "b": {"targets": ["re:.*attn.*"], "weights": weights(), "format": "pack-quantized"},
    }
    rounded, _ = write(tmp_path / "q", groups)
    ours = qk.load_model(tmp_path / "q")
    packed = {n: m.packed for n, m in ours.named_modules() if isinstance(m, qk.QuantLinear)}
    assert {n: p.format for n, p in packed.items()} == {
        n: "mxfp4" if ".mlp." in n else "pack_quantized" for n in rounded
    }
    assert all(torch.equal(p.dequantize(), rounded[n]) for n, p in packed.items())
    qk.save_model(ours, tmp_path / "s")
    assert quantization(tmp_path / "s")["format"] == "mixed-precision"
    assert_same_tensors(tmp_path / "s", tmp_path / "q")


# ---------------------------------------------------------------------- the older key
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_compression_config(nested: bool, tmp_path: Path) -> None:
    """Configs as llm-compressor wrote them in 2024, and SparseML before."""
    rounded, _ = write(tmp_path / "q", {"a": {"targets": ["Linear"], "weights": weights()}})
    old = quantization(tmp_path / "q")
    if nested:
        old = {
            "quantization_config": {**old, "quant_method": "sparseml"},
            "sparsity_config": {"format": "dense"},
        }
    edit(tmp_path / "q", quantization_config=None, compression_config=old)
    ours = qk.load_model(tmp_path / "q")
    assert all(
        torch.equal(ours.get_submodule(n).packed.dequantize(), value)
        for n, value in rounded.items()
    )
    qk.save_model(ours, tmp_path / "s")
    assert "compression_config" not in json.loads((tmp_path / "s/config.json").read_text())
    assert_same_tensors(tmp_path / "s", tmp_path / "q")


def test_quantization_config_goes_before_the_older_key(tmp_path: Path) -> None:
    write(tmp_path / "q", {"a": {"targets": ["Linear"], "weights": weights()}})
    edit(tmp_path / "q", compression_config={"quant_method": "none of ours"})
    assert any(isinstance(m, qk.QuantLinear) for m in qk.load_model(tmp_path / "q").modules())


@pytest.mark.parametrize(("old", "message"), [
    ({"sparsity_config": {"format": "sparse-bitmask"}},
     "sparsity_config.format: expected 'dense', got 'sparse-bitmask'"),
    ({"quant_method": "slimquant_w4a8"}, "quant_method: expected gptq, .* got 'slimquant_w4a8'"),
    ("int4", "compression_config: expected an object, got 'int4'"),
])  # fmt: skip
def test_compression_configs_that_are_refused(old: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "q", {"a": {"targets": ["Linear"], "weights": weights()}})
    edit(tmp_path / "q", quantization_config=None, compression_config=old)
    with pytest.raises(ValueError, match=message):
        qk.load_model(tmp_path / "q")


# ---------------------------------------------------------------------- 8 bits
#: weights, inputs, what our parameters are, whether the int8 codes of activations are defined as
#: theirs are
EIGHT_BITS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], bool]] = {
    "dynamic-asymmetric": (int8(), tokens(symmetric=False), {"symmetric_input": False}, True),
    "weights-asymmetric": (int8(symmetric=False), tokens(), {"symmetric_weight": False}, False),
    "both-asymmetric": (
        int8(symmetric=False), tokens(symmetric=False),
        {"symmetric_weight": False, "symmetric_input": False}, True
    ),
    "static-weights-asymmetric": (
        int8(symmetric=False), int8(strategy="tensor", symmetric=False),
        {"symmetric_weight": False, "symmetric_input": False, "activation": "static"}, True,
    ),
    "static": (int8(), int8(strategy="tensor"), {"activation": "static"}, True),
    "tensor-asymmetric": (
        int8(strategy="tensor", symmetric=False), tokens(symmetric=False),
        {"granularity": "tensor", "symmetric_weight": False, "symmetric_input": False}, True,
    ),
    "groups": (int8(strategy="group", group_size=16), tokens(symmetric=False),
               {"group_size": 16, "symmetric_input": False}, True),
    "groups-asymmetric": (int8(strategy="group", group_size=32, symmetric=False), tokens(),
                          {"group_size": 32, "symmetric_weight": False}, False),
    "w4a8": (weights(), tokens(), {"group_size": 32}, False),
    "weight-only": (int8(), None, {"activation": "none"}, True),
    "weight-only-asymmetric": (int8(symmetric=False), None,
     {"activation": "none", "symmetric_weight": False}, True),
    "weight-only-tensor": (int8(strategy="tensor"), None,
     {"activation": "none", "granularity": "tensor"}, True),
    "weight-only-groups": (int8(strategy="group", group_size=32, symmetric=False), None,
                           {"activation": "none", "group_size": 32, "symmetric_weight": False},
                           True),
    "fp8-group": (fp8(strategy="group", group_size=32), None,
                  {"granularity": "block", "block_rows": 1, "block_columns": 32}, True),
    "fp8-group-dynamic": (
        fp8(strategy="group", group_size=32), fp8(strategy="group", group_size=32, dynamic=True),
        {"granularity": "block", "block_rows": 1, "block_columns": 32, "activation": "dynamic"},
        True,
    ),
    **{
        f"fp8-block-{rows}x{columns}": (
            fp8(strategy="block", block_structure=[rows, columns]), None,
            {"granularity": "block", "block_rows": rows, "block_columns": columns}, True,
        )
        for rows, columns in ((64, 64), (1, 128), (128, 1), (48, 40))
    },
    "fp8-block-dynamic": (
        fp8(strategy="block", block_structure=[64, 32]),
        fp8(strategy="group", group_size=32, dynamic=True),
        {"granularity": "block", "block_rows": 64, "block_columns": 32, "activation": "dynamic"},
        True,
    ),
    "fp8-dynamic": (fp8(), fp8(strategy="token", dynamic=True), {"activation": "dynamic"}, True),
    "fp8-static": (fp8(strategy="tensor"), fp8(strategy="tensor"),
                   {"granularity": "tensor", "activation": "static"}, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_eight_bits(kind: str, tmp_path: Path) -> None:
    weight, inputs, params, same = EIGHT_BITS[kind]
    groups = {"a": {"targets": ["Linear"], "weights": weight, "input_activations": inputs}}
    # Left alone it packs integers into words where no activations are rounded.
    format = "int-quantized" if inputs is None and weight["type"] == "int" else None
    rounded, logits = write(tmp_path / "q", groups, format=format)
    # A sum in another order moves an activation across the middle between two codes now and then;
    # that is a step of at most 2^-3 (float8) in one of 64 features or more of one product.
    within = 2.0**-19 if inputs is None else 2.0**-6
    ours = check(tmp_path / "q", tmp_path / "s", rounded, logits if same else None, within)
    packed = ours.model.layers[0].mlp.up_proj.packed
    assert {**packed.params, **params} == packed.params
    assert (packed.format == "fp8") == kind.startswith("fp8")


@pytest.mark.parametrize(("weight", "inputs", "message"), [
    (int8(), int8(strategy="tensor", dynamic=True),
     r"expected dynamic per token, or static per tensor, got dynamic=True strategy='tensor'"),
    (int8(), tokens(num_bits=4),
     r"input_activations: expected int of 8 bits like the weights, got 'int' of 4"),
    (weights(), fp8(strategy="token", dynamic=True),
     r"input_activations: expected int of 8 bits like the weights, got 'float' of 8"),
    (fp8(), fp8(strategy="token", dynamic=True, symmetric=False),
     r"expected dynamic per token, or static per tensor, and symmetric, got .* symmetric=False"),
    (fp8(symmetric=False), fp8(strategy="token", dynamic=True),
     r"weights.symmetric: expected true with float8, got false"),
    (fp8(strategy="group", group_size=32), fp8(strategy="token", dynamic=True),
     r"expected dynamic per group of 32, and symmetric, got dynamic=True strategy='token'"),
    (fp8(strategy="block", block_structure=[64, 64]),
     fp8(strategy="group", group_size=32, dynamic=True),
     r"input_activations.group_size: expected 64 like the weights, got 32"),
])  # fmt: skip
def test_schemes_that_are_refused(
    weight: dict[str, Any], inputs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Schemes of compressed-tensors that no format here computes: one sentence names the field."""
    from compressed_tensors.quantization import QuantizationConfig

    groups = {"a": {"targets": ["Linear"], "weights": weight, "input_activations": inputs}}
    theirs = QuantizationConfig(config_groups=groups, ignore=["lm_head"]).model_dump()
    stored = "int-quantized" if weight["type"] == "int" else "float-quantized"
    with pytest.raises(ValueError, match=f"here: quantization_config .*{message}"):
        Plan("here", {**theirs, "format": stored})
