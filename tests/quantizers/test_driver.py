"""Calibrated quantization of whole models: the function is preserved, resume, bad input."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import qkernels as qk
from qkernels.quantizers import architectures, calibration, driver

from ..tiny import VOCABULARY, ids, tiny_model, tiny_tokenizer


def batches(samples: int = 4, length: int = 48) -> torch.Tensor:
    return ids(samples * length).view(samples, length)


def logits(model: nn.Module, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(40, seed=5)[None] if tokens is None else tokens).logits


CASES = [
    ("gptq", None, {"bits": 4, "group_size": 32}),
    (
        "gptq",
        "gptq",
        {"bits": 3, "group_size": 32, "symmetric": False, "act_order": True, "damp": 0.05},
    ),
    ("gptq", "gptq", {"bits": 4, "group_size": 32, "act_order": True, "static_groups": True}),
    ("gptq", "awq", {"bits": 3, "group_size": 32, "symmetric": False}),
    # a short last group where there are 96 features, and only that one at 128
    ("gptq", "gptq", {"bits": 4, "group_size": 64, "symmetric": False}),
    ("gptq", "gptq", {"bits": 4, "group_size": 64, "act_order": True}),
    ("gptq", "awq", {"bits": 4, "group_size": 64, "symmetric": False}),
    (
        "pack_quantized",
        "gptq",
        {"bits": 4, "group_size": 128, "act_order": True, "static_groups": True},
    ),
    ("awq", None, {"group_size": 32}),
    ("awq", "gptq", {"group_size": 32, "clip_search": True}),
    ("nf4", None, {"block_size": 32}),
    ("nf4", None, {"block_size": 64}),  # blocks that go on in the next row
    ("spqr", None, {"bits": 3}),
    (
        "spqr",
        "spqr",
        {"bits": 4, "group_size": 32, "act_order": True, "threshold": 0.1, "damp": 0.5},
    ),
    ("quip", "ldlq", {"bits": 4, "seed": 3, "rescale": True}),
    ("quip_sharp", None, {"bits": 4, "passes": 1}),
    ("w8a8", None, {"alpha": 0.6}),
    ("w8a8", None, {"activation": "static"}),
    ("w8a8", "ranges", {"activation": "static"}),
    ("int8", None, {}),
    ("fp8", None, {"activation": "static", "granularity": "tensor"}),
    ("fp8", "smoothquant", {"activation": "dynamic", "alpha": 1}),
]


@pytest.mark.parametrize(("name", "algorithm", "params"), CASES, ids=str)
def test_every_algorithm_keeps_the_model_working(
    name: str, algorithm: str | None, params: dict[str, object], tmp_path: Path
) -> None:
    model = tiny_model()
    want = logits(model)
    qk.quantize_model(model, name, batches(), algorithm=algorithm, progress=False, **params)
    layers = [m for m in model.modules() if isinstance(m, qk.QuantLinear)]
    assert len(layers) == 14
    assert {layer.packed.format for layer in layers} == {name}
    found = logits(model)
    similarity = torch.nn.functional.cosine_similarity(found, want, dim=-1)
    bits = 8 if name in ("w8a8", "int8", "fp8") else params.get("bits", 4)
    assert similarity.mean() > {8: 0.96, 4: 0.85, 3: 0.5}[bits]  # random weights do not compress
    qk.save_model(model, tmp_path / "saved", tiny_tokenizer())
    assert torch.equal(logits(qk.load_model(tmp_path / "saved")), found)


def llama(**changes: object) -> nn.Module:
    return tiny_model(num_key_value_heads=4, **changes)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "llama": lambda: llama(attention_bias=True),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SMALL, intermediate_size=96, num_key_value_heads=4)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, intermediate_size=96, num_key_value_heads=4)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SMALL, intermediate_size=96, num_key_value_heads=4, head_dim=16)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64, pad_token_id=1)
    ),
}


@pytest.mark.parametrize("algorithm", [None, "gptq", "awq"])
def test_gpt2_whose_linears_are_transposed(algorithm: str | None) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1 if parameter.dim() == 1 else 0, 0.2)
    want = logits(model)
    calibration = None if algorithm is None else batches()
    qk.quantize_model(
        model, "gptq", calibration, algorithm=algorithm, bits=8, group_size=32, progress=False
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, qk.QuantLinear)}
    assert len(layers) == 8
    assert layers["transformer.h.0.attn.c_attn"].packed.shape == (192, 64)
    similarity = torch.nn.functional.cosine_similarity(logits(model), want, dim=-1)
    assert similarity.min() > 0.99


@pytest.mark.parametrize("kind", MODELS)
def test_folding_scales_preserves_the_function(kind: str) -> None:
    """Each rule of each architecture: divide by scales before, multiply after, same logits."""
    model = MODELS[kind]().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1 if parameter.dim() == 1 else 0, 0.1)
    want = logits(model)
    architecture = architectures.of(model)
    folded = 0
    for _, block in architectures.blocks_of(model):
        for rule in architecture.rules:
            layers = [block.get_submodule(name) for name in rule.layers]
            scale = torch.rand(layers[0].in_features, dtype=torch.float64) * 3 + 0.2
            folded += architectures.fold(block.get_submodule(rule.before), scale, layers)
    assert folded == 8
    # The RMSNorm of transformers rounds its input to float32 even in a float64 model. So the last
    # bit of a float64 may become a step between two float32 values: at most 2^-23 of a normalized
    # value, and those are below 8. Eight such steps are allowed: 8e-6. One layer that misses its
    # scale shows 8e-3 at least (seen in 50 models).
    tolerance = 8 * 8 * 2**-23
    torch.testing.assert_close(logits(model), want, rtol=tolerance, atol=tolerance)


def test_grouped_query_attention_is_not_folded_into_values() -> None:
    block = architectures.blocks_of(tiny_model())[0][1]
    scale = torch.ones(64) * 2
    assert not architectures.fold(block.self_attn.v_proj, scale, [block.self_attn.o_proj])


def test_unknown_architecture() -> None:
    model = tiny_model()
    model.config.model_type = "mystery"
    with pytest.raises(
        ValueError, match=r"model: expected one of the types gpt2, llama, .*, got 'mystery'"
    ):
        qk.quantize_model(copy.deepcopy(model), "awq", batches(), group_size=32, progress=False)
    # GPTQ needs no such knowledge: it finds the blocks by itself.
    qk.quantize_model(model, "gptq", batches(), group_size=32, progress=False)
    assert any(isinstance(m, qk.QuantLinear) for m in model.modules())


def test_layers_outside_the_blocks_are_rounded() -> None:
    model = tiny_model(tie_word_embeddings=False)
    model.extra = nn.Linear(64, 64)
    qk.quantize_model(model, "gptq", batches(), group_size=32, progress=False)
    assert isinstance(model.extra, qk.QuantLinear)


# ---------------------------------------------------------------------- statistics
def test_statistics_are_those_of_all_tokens() -> None:
    x = torch.randn(3, 5, 8)
    seen = calibration.Statistics(8, torch.device("cpu"), hessian=True)
    for part in x:
        seen.add(part)
    flat = x.view(15, 8)
    torch.testing.assert_close(seen.hessian, flat.T @ flat / 15)
    torch.testing.assert_close(seen.mean_abs, flat.abs().mean(0))
    assert torch.equal(seen.max_abs, flat.abs().amax(0))
    scale = torch.rand(8) + 0.5
    seen.rescale(scale)
    torch.testing.assert_close(seen.hessian, (flat / scale).T @ (flat / scale) / 15)
    torch.testing.assert_close(seen.mean_abs, (flat / scale).abs().mean(0))


def test_groups_share_their_input_and_come_in_order() -> None:
    model = tiny_model()
    block = model.model.layers[0]
    inputs = calibration.BlockInputs(model, block, list(batches().split(1)))
    wanted = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    assert inputs.groups(block, wanted) == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_inputs_of_the_second_block_are_the_outputs_of_the_first() -> None:
    model = tiny_model()
    tokens = batches(2)
    seen = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for batch in tokens.split(1):
        logits(model, batch)
    hook.remove()
    with torch.no_grad():
        inputs = calibration.BlockInputs(model, model.model.layers[0], list(tokens.split(1)))
        inputs.advance(model.model.layers[0])
    for (args, _), want in zip(inputs._calls, seen, strict=True):
        torch.testing.assert_close(args[0], want)


# ---------------------------------------------------------------------- resuming
def test_resume_gives_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, params in (("awq", {"group_size": 32}), ("w8a8", {})):
        whole = qk.quantize_model(tiny_model(), name, batches(), progress=False, **params)
        folder = tmp_path / name
        real = driver.replace
        calls = []

        def interrupt(root, n, linear, packed, calls=calls, real=real):
            calls.append(n)
            if len(calls) > 9:  # in the second block
                raise KeyboardInterrupt
            real(root, n, linear, packed)

        monkeypatch.setattr(driver, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            qk.quantize_model(
                tiny_model(), name, batches(), resume=folder, progress=False, **params
            )
        monkeypatch.setattr(driver, "replace", real)
        (folder / "block-1.safetensors").unlink()  # as if it had stopped before writing it
        resumed = qk.quantize_model(
            tiny_model(), name, batches(), resume=folder, progress=False, **params
        )
        state, again = whole.state_dict(), resumed.state_dict()
        assert state.keys() == again.keys()
        assert all(torch.equal(state[key], again[key]) for key in state)


def test_resume_refuses_another_job(tmp_path: Path) -> None:
    qk.quantize_model(
        tiny_model(), "awq", batches(), resume=tmp_path / "r", progress=False, group_size=32
    )
    for change in (
        {"format": "gptq", "group_size": 32},
        {"format": "awq", "group_size": 16},
        {"format": "awq", "group_size": 32, "clip": False},
    ):
        with pytest.raises(ValueError, match="resume: expected finished blocks of the same job"):
            qk.quantize_model(
                tiny_model(), calibration=batches(), resume=tmp_path / "r", progress=False, **change
            )
    with pytest.raises(ValueError, match=r"but calibration was .* is .* now"):
        qk.quantize_model(
            tiny_model(), "awq", batches(2), resume=tmp_path / "r", progress=False, group_size=32
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "novel.txt").write_text("x")
    with pytest.raises(ValueError, match="resume: expected an empty directory"):
        qk.quantize_model(tiny_model(), "awq", batches(), resume=tmp_path / "full", group_size=32)


def test_resume_refuses_a_damaged_block(tmp_path: Path) -> None:
    options = {"resume": tmp_path / "r", "progress": False, "group_size": 32}
    qk.quantize_model(tiny_model(), "gptq", batches(), **options)
    file = tmp_path / "r" / "block-0.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"block-0.safetensors: expected a finished block"):
        qk.quantize_model(tiny_model(), "gptq", batches(), **options)
    (tmp_path / "r" / "resume.json").write_text("{")
    with pytest.raises(ValueError, match=r"resume.json: expected JSON"):
        qk.quantize_model(tiny_model(), "gptq", batches(), **options)


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "fp4", "algorithm": "gptq"},
         "algorithm: expected one of awq for fp4, got 'gptq'"),
        ({"format": "bf16"}, "calibration: expected None, because bf16"),
        ({"format": "gptq", "damp": "much"}, "gptq: damp: expected a float, got 'much'"),
        ({"format": "gptq", "alpha": 0.5}, "gptq: unknown parameter 'alpha'"),
        ({"format": "gptq", "group_size": 32, "calibration": "a text"},
         "calibration: expected token ids"),
        ({"format": "gptq", "group_size": 32, "calibration": []},
         "calibration: expected token ids"),
        ({"format": "gptq", "group_size": 32, "calibration": torch.ones(2, 8)},
         r"calibration\[0\]: expected integers"),
        ({"format": "gptq", "group_size": 32, "calibration": torch.full((1, 4), 999)},
         r"calibration\[0\]: expected ids in \[0, 128\)"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        qk.quantize_model(model, **{"calibration": batches(), "progress": False, **arguments})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_algorithm_without_calibration() -> None:
    with pytest.raises(
        ValueError, match="algorithm: expected None without calibration data, got 'gptq'"
    ):
        qk.quantize_model(tiny_model(), "gptq", algorithm="gptq", group_size=32)


def test_calibration_ids() -> None:
    text = "".join(chr(32 + i % 90) for i in range(500))
    found = qk.calibration_ids(tiny_tokenizer(), text, samples=3, length=20, seed=1)
    assert found.shape == (3, 20)
    assert torch.equal(
        found, qk.calibration_ids(tiny_tokenizer(), text, samples=3, length=20, seed=1)
    )
    assert not torch.equal(
        found, qk.calibration_ids(tiny_tokenizer(), text, samples=3, length=20, seed=2)
    )
    with pytest.raises(
        ValueError, match="calibration text: expected more than 600 tokens, got 500"
    ):
        qk.calibration_ids(tiny_tokenizer(), text, length=600)


def test_memory_holds_one_block_of_activations() -> None:
    model = tiny_model(num_hidden_layers=6)
    sizes = []
    real = calibration.BlockInputs.advance

    def spy(self: calibration.BlockInputs, block: nn.Module) -> None:
        real(self, block)
        sizes.append(sum(args[0].numel() for args, _ in self._calls))

    calibration.BlockInputs.advance = spy  # type: ignore[method-assign]
    try:
        qk.quantize_model(model, "gptq", batches(), group_size=32, progress=False)
    finally:
        calibration.BlockInputs.advance = real  # type: ignore[method-assign]
    assert sizes == [4 * 48 * 64] * 5
    assert isinstance(model, LlamaForCausalLM)
