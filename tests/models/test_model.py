"""quantize_model, shared_copy, model_summary, load_model and save_model by their public names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.models.quantize import model_summary, shared_copy

from ..tiny import ids, tiny_model

LINEARS = 14  # seven in each of two layers


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_linear_but_the_output_is_replaced_and_the_logits_stay_close() -> None:
    model = tiny_model()
    before = model(ids(30)[None]).logits
    assert qk.quantize_model(model, "gptq", bits=8, group_size=32, progress=False) is model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, qk.QuantLinear)}
    assert len(layers) == LINEARS
    assert type(model.lm_head) is nn.Linear
    packed = layers["model.layers.1.mlp.down_proj"].packed
    assert (packed.format, packed.shape) == ("gptq", (64, 96))
    assert (packed.params["bits"], packed.params["group_size"]) == (8, 32)
    after = model(ids(30)[None]).logits
    error = (after - before).norm() / before.norm()
    assert 1e-5 < error < 0.05  # rounded, and hardly changed


def test_a_layer_holds_what_quantize_gives() -> None:
    model = tiny_model()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    qk.quantize_model(model, "nf4", progress=False, block_size=32)
    expected = qk.quantize(weight, "nf4", block_size=32).tensors
    got = model.model.layers[0].mlp.up_proj.packed.tensors
    assert _same(got, expected)


def test_skip_patterns_leave_modules_alone() -> None:
    model = tiny_model()
    qk.quantize_model(model, "int8", skip=["*.down_proj", "model.layers.0.*"], progress=False)
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    in_first = {n for n in left if n.startswith("model.layers.0.")}
    assert len(in_first) == 7
    assert left - in_first == {"model.layers.1.mlp.down_proj", "lm_head"}


def test_a_skip_pattern_that_matches_nothing_is_an_error() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"skip: .*'\*\.down_prj'"):
        qk.quantize_model(model, "int8", skip=["*.down_prj"], progress=False)
    assert model_summary(model).quantized_layers == 0


def test_an_untied_output_projection_is_left_alone_too() -> None:
    model = qk.quantize_model(tiny_model(tie_word_embeddings=False), "nf4", progress=False)
    assert type(model.lm_head) is nn.Linear


def test_a_linear_used_twice_is_quantized_once() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": shared})
    qk.quantize_model(model, "int8", progress=False)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], qk.QuantLinear)


def test_biases_are_kept() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8, bias=False))
    bias = model[0].bias.detach().clone()
    qk.quantize_model(model, "w8a8", progress=False)
    assert torch.equal(model[0].bias, bias)
    assert model[1].bias is None


def test_calibration_is_refused_where_nothing_uses_it() -> None:
    with pytest.raises(ValueError, match="calibration: expected None"):
        qk.quantize_model(tiny_model(), "bf16", calibration=["text"])


def test_a_layer_that_does_not_fit_is_named_and_nothing_is_changed() -> None:
    model = tiny_model()
    before = _state(model)
    # 64 divides the hidden size 64, not the feed-forward size 96: only down_proj is wrong.
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp\.down_proj: awq: group_size: .*96.*64"
    ):
        qk.quantize_model(model, "awq", group_size=64, progress=False)
    assert _same(before, _state(model))
    assert model_summary(model).quantized_layers == 0


def test_a_nan_weight_is_named_and_nothing_is_changed() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: nf4: weight: .*1 NaN"):
        qk.quantize_model(model, "nf4", progress=False)
    assert model_summary(model).quantized_layers == 0


@pytest.mark.parametrize(("format", "params", "message"), [
    ("nf5", {}, "format: expected one of"),
    ("nf4", {"group_size": 64}, "unknown parameter 'group_size'"),
    ("awq", {"group_size": "64"}, "group_size: expected an int"),
    ("w8a8", {"activation": "static"}, "q_proj: w8a8: input_scale"),
])  # fmt: skip
def test_bad_format_or_parameter(format: str, params: dict[str, object], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        qk.quantize_model(model, format, progress=False, **params)
    assert model_summary(model).quantized_layers == 0


def test_a_model_with_nothing_to_quantize_is_an_error() -> None:
    model = qk.quantize_model(tiny_model(), "nf4", progress=False)
    with pytest.raises(ValueError, match=r"got none \(1 skipped, 14 quantized already\)"):
        qk.quantize_model(model, "nf4", progress=False)


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    qk.quantize_model(tiny_model(), "int8")
    out, err = capsys.readouterr()
    assert out == ""
    assert "int8" in err


def test_shared_copy_shares_tensors_and_leaves_the_original_alone() -> None:
    model = tiny_model()
    before = model(ids(20)[None]).logits
    copy = shared_copy(model)
    assert copy.model.embed_tokens.weight is model.model.embed_tokens.weight
    qk.quantize_model(copy, "gptq", bits=2, group_size=32, progress=False)
    assert torch.equal(model(ids(20)[None]).logits, before)
    assert not torch.equal(copy(ids(20)[None]).logits, before)


def test_summary_counts_what_is_there() -> None:
    model = tiny_model()
    linear = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
    other = 128 * 64 + 5 * 64
    plain = model_summary(model)
    assert (plain.weights, plain.bits_per_weight, plain.formats) == (linear + other, None, {})
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert plain.total_bytes == 4 * (linear + other) + buffers
    quantized = model_summary(qk.quantize_model(model, "fp8", progress=False))
    rows = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert quantized.weights == linear + other
    assert quantized.quantized_bytes == linear + 4 * rows  # a byte a weight, float32 scale a row
    assert quantized.bits_per_weight == 8 * quantized.quantized_bytes / linear
    assert quantized.total_bytes == 4 * other + buffers + quantized.quantized_bytes
    assert quantized.formats == {"fp8": LINEARS}


def test_load_model_and_save_model(tmp_path) -> None:
    model = qk.quantize_model(tiny_model(), "awq", group_size=32, progress=False)
    qk.save_model(model, tmp_path / "m")
    again = qk.load_model(tmp_path / "m")
    assert torch.equal(again(ids(20)[None]).logits, model(ids(20)[None]).logits)


def test_load_model_of_nothing(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="found nothing"):
        qk.load_model(tmp_path / "absent")
