"""The importance matrix, and llama.cpp's mixtures of block types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qkernels as qk
from qkernels.formats.gguf import recipes

from ..tiny import ids, tiny_model


def test_importance_is_the_mean_square_of_each_layer_s_inputs() -> None:
    model, tokens = tiny_model(), ids(60).view(3, 20)
    seen = []
    layer = model.model.layers[0].mlp.up_proj
    hook = layer.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].reshape(-1, 64))
    )
    with torch.no_grad():
        for row in tokens:
            model(row[None])
    hook.remove()
    importance = torch.cat(seen).double().square().mean(0).float()
    # up_proj of the first block, attention left alone: it reads what it read in the plain model.
    weight = layer.weight.detach().clone()
    found = qk.quantize_model(model, "q4_0", tokens, skip="*self_attn*", progress=False)
    want = qk.quantize(weight, "q4_0", importance=importance)
    assert torch.equal(
        found.model.layers[0].mlp.up_proj.packed.tensors["data"], want.tensors["data"]
    )
    assert not torch.equal(want.tensors["data"], qk.quantize(weight, "q4_0").tensors["data"])


def test_file_of_llama_cpp(tmp_path: Path) -> None:
    """Written, read by the package gguf with llama.cpp's names, read back, and used."""
    import gguf

    model, tokens = tiny_model(hidden_size=256, intermediate_size=96), ids(60).view(3, 20)
    found = qk.ImportanceMatrix.collect(model, tokens)
    layer = model.model.layers[1].mlp.down_proj
    seen = []
    hook = layer.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].reshape(-1, 96))
    )
    with torch.no_grad():
        for row in tokens:
            model(row[None])
    hook.remove()
    want = torch.cat(seen).double().square().mean(0).float()
    torch.testing.assert_close(found.means["model.layers.1.mlp.down_proj"], want)

    path = tmp_path / "tiny.imatrix"
    found.save(path, model, chunk=20)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    theirs = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert theirs["blk.1.ffn_down.weight.counts"].item() == 60
    torch.testing.assert_close(theirs["blk.1.ffn_down.weight.in_sum2"][0], want * 60)

    again = qk.ImportanceMatrix.load(path, model)
    assert again.tokens == 60
    for name, mean in again.means.items():
        torch.testing.assert_close(mean, found.means[name], rtol=1e-6, atol=0)
    assert set(found.means) - set(again.means) <= {"lm_head"}
    weight = layer.weight.detach().clone()
    own = qk.quantize(weight, "q4_0", importance=again.means["model.layers.1.mlp.down_proj"])
    qk.quantize_model(model, "q4_0", again, progress=False, skip="*q_proj")
    assert torch.equal(
        model.model.layers[1].mlp.down_proj.packed.tensors["data"], own.tensors["data"]
    )
    mixed = qk.quantize_model(
        tiny_model(hidden_size=256, intermediate_size=96), "q4_k_m", again, progress=False
    )
    assert mixed.model.layers[1].mlp.down_proj.packed.format == "q8_0"


def test_bad_importance_matrices(tmp_path: Path) -> None:
    import gguf

    model = tiny_model()
    with pytest.raises(ValueError, match="got an importance matrix"):
        qk.quantize_model(model, "nf4", qk.ImportanceMatrix({}, 1), progress=False)
    with pytest.raises(
        ValueError, match=r"expected an entry for model\.layers\.0\.self_attn\.q_proj, got none"
    ):
        qk.quantize_model(model, "q4_0", qk.ImportanceMatrix({}, 1), progress=False)
    wrong = {name: torch.ones(3) for name, _ in model.named_modules()}
    with pytest.raises(ValueError, match=r"q_proj: expected 64 values, got \(3,\)"):
        qk.quantize_model(model, "q4_0", qk.ImportanceMatrix(wrong, 1), progress=False)
    path = tmp_path / "x.imatrix"

    def written(tensors: dict[str, torch.Tensor], kind: str = "imatrix") -> Path:
        writer = gguf.GGUFWriter(str(path), arch="imatrix")
        writer.add_type(kind)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    sums, counts = "blk.0.ffn_up.weight.in_sum2", "blk.0.ffn_up.weight.counts"
    one, good = torch.ones(1, 1), torch.ones(1, 64)
    for tensors, kind, message in [
        ({sums: good, counts: one}, "model", "general.type: expected 'imatrix', got 'model'"),
        ({"other": one}, "imatrix", "expected entries for layers of this model, got 1 others"),
        ({sums: good}, "imatrix", r"counts: expected float32 of shape \(1, 1\), got none"),
        ({sums: good, counts: one * 0}, "imatrix", r"counts: expected 1 to \d+ inputs, got 0"),
        ({sums: good, counts: one * 0.5}, "imatrix", r"counts: expected 1 to \d+ inputs, got 0.5"),
        (
            {sums: good, counts: one * 3e38},
            "imatrix",
            r"counts: expected 1 to \d+ inputs, got 3e\+38",
        ),
        (
            {sums: good, counts: one * float("inf")},
            "imatrix",
            "counts: expected finite values >= 0",
        ),
        (
            {sums: good, counts: torch.ones(1, 3)},
            "imatrix",
            r"counts: expected .* \(1, 1\), got F32 \(1, 3\)",
        ),
        (
            {sums: good, counts: torch.ones(1, 64)},
            "imatrix",
            r"counts: expected .* got F32 \(1, 64\)",
        ),
        (
            {sums: good, counts: torch.ones(3, 1)},
            "imatrix",
            r"counts: expected .* got F32 \(3, 1\)",
        ),
        (
            {sums: torch.ones(3, 64), counts: one},
            "imatrix",
            r"in_sum2: expected .* got F32 \(3, 64\)",
        ),
        (
            {sums: torch.ones(1, 128), counts: one},
            "imatrix",
            r"in_sum2: expected .* \(1, 64\), got F32 \(1, 128\)",
        ),
        (
            {sums: torch.ones(1, 1), counts: one},
            "imatrix",
            r"in_sum2: expected .* got F32 \(1, 1\)",
        ),
        (
            {sums: torch.ones(64, 1), counts: one},
            "imatrix",
            r"in_sum2: expected .* got F32 \(64, 1\)",
        ),
        ({sums: -good, counts: one}, "imatrix", "in_sum2: expected finite values >= 0"),
        ({sums: good.half(), counts: one}, "imatrix", "in_sum2: expected float32 of shape"),
    ]:
        with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
            qk.ImportanceMatrix.load(written(tensors, kind), model)
    # ggml writes no outer dimensions of 1, so this is what llama.cpp's own files look like
    for shape in ((), (1,), (1, 1, 1)):
        plain = {sums: 6 * torch.ones(*shape, 64), counts: 3 * torch.ones(*shape, 1)}
        found = qk.ImportanceMatrix.load(written(plain), model)
        assert found.tokens == 3
        assert torch.equal(found.means["model.layers.0.mlp.up_proj"], torch.full((64,), 2.0))
    whole = written({sums: good, counts: one}).read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="imatrix"):
        qk.ImportanceMatrix.load(path, model)


def test_layers_with_more_bits() -> None:
    # 32 layers: the first 4, the last 4, and every third from the sixth on.
    chosen = [i for i in range(32) if recipes.more_bits(i, 32)]
    assert chosen == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    chosen = [i for i in range(30) if recipes.more_bits(i, 30)]
    assert chosen == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]


@pytest.mark.parametrize(("recipe", "name", "k", "layers", "want"), [
    ("q4_k_m", "model.layers.5.self_attn.q_proj", 512, 32, "q4_k"),
    ("q4_k_m", "model.layers.5.self_attn.v_proj", 512, 32, "q4_k"),
    ("q4_k_m", "model.layers.6.self_attn.v_proj", 512, 32, "q6_k"),
    ("q4_k_m", "model.layers.31.mlp.down_proj", 512, 32, "q6_k"),
    ("q4_k_m", "model.layers.31.mlp.down_proj", 96, 32, "q8_0"),
    ("q4_k_m", "model.layers.5.mlp.up_proj", 96, 32, "q5_0"),
    ("q5_k_m", "model.layers.5.mlp.up_proj", 512, 32, "q5_k"),
    ("q5_k_m", "model.layers.5.mlp.up_proj", 96, 32, "q5_1"),
    ("q4_k_m", "model.layers.5.mlp.up_proj", 40, 32, "fp16"),
    ("q4_k_m", "model.layers.11.self_attn.v_proj", 8192, 80, "q5_k"),
])  # fmt: skip
def test_type_of_a_layer(recipe: str, name: str, k: int, layers: int, want: str) -> None:
    assert recipes._type_of(recipe, name, k, layers) == want


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_mixture_of_formats_in_one_model(calibrated: bool) -> None:
    model = tiny_model(hidden_size=256, intermediate_size=96)
    qk.quantize_model(model, "q4_k_m", ids(40).view(2, 20) if calibrated else None, progress=False)
    block = model.model.layers[1]
    assert block.self_attn.q_proj.packed.format == "q4_k"
    assert block.self_attn.v_proj.packed.format == "q6_k"
    assert block.mlp.down_proj.packed.format == "q8_0"
    assert bool(torch.isfinite(model(ids(20)[None]).logits).all())


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match="q4_k_m: group_size: expected none, because a recipe chooses"
    ):
        qk.quantize_model(tiny_model(), "q4_k_m", group_size=32, progress=False)
    with pytest.raises(ValueError, match="algorithm: expected one of imatrix for q4_0, got 'gptq'"):
        qk.quantize_model(tiny_model(), "q4_0", ids(40), algorithm="gptq", progress=False)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        qk.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 8)), "q4_k_m", progress=False)
