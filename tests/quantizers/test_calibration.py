"""How `quantize_model` uses calibration data, for every algorithm, against an independent judge.

The judge runs the plain model with the quantized values of all earlier layers put in, records the
inputs of each layer, and sums over tokens in float64 with numpy. In a model whose layers read small
integers these sums are exact in float32, too, in any order: there the algorithm, called with them,
must give exactly the same weights. AWQ and SmoothQuant, which change norms, are written out here
for a Llama.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels import formats
from qkernels.formats import spqr_search
from qkernels.quantizers import algorithms, gptq

from ..tiny import VOCABULARY, tiny_model

Array = np.ndarray[Any, Any]


def tokens(seed: int = 0) -> list[Tensor]:
    """Token ids of different lengths, so that a mean of means is not the mean."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, VOCABULARY, (count,), generator=generator) for count in (40, 90, 11, 60)
    ]


def seen_by(model: nn.Module, names: list[str]) -> dict[str, Array]:
    """The inputs of the layers with these names, float64 (tokens, K), over all calibration data."""
    seen: dict[str, list[Array]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0][0].double().numpy())
        )
        for name in names
    ]
    with torch.no_grad():
        for ids in tokens():
            model(ids[None])
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def output_error(x: Array, weight: Tensor, rounded: Tensor) -> float:
    """Mean over tokens of the squared error of a layer's output."""
    return float(np.square(x @ (weight - rounded).double().numpy().T).sum() / len(x))


# ---------------------------------------------------------------------- layers that read integers
def integers(x: Tensor) -> Tensor:
    return x.round().clamp(-60, 60)


class Block(nn.Module):
    def __init__(self, k: int, inside: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(k, inside), nn.Linear(k, inside)
        self.down_proj = nn.Linear(inside, k)

    def forward(self, x: Tensor) -> Tensor:
        return integers(x + self.down_proj(integers(self.gate_proj(x) + self.up_proj(x))))


class Model(nn.Module):
    """Two blocks that read and write correlated integers, some features larger than others."""

    def __init__(self, k: int = 32, inside: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.config = SimpleNamespace(num_hidden_layers=2, vocab_size=VOCABULARY)
        self.embedding = nn.Embedding(VOCABULARY, k)
        self.layers = nn.ModuleList([Block(k, inside) for _ in range(2)])
        few = torch.randn(VOCABULARY, 10, generator=generator) @ torch.randn(
            10, k, generator=generator
        )
        values = few * torch.rand(k, generator=generator).square() + 0.3 * torch.randn(
            VOCABULARY, k, generator=generator
        )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) / (4 if "up" in name else 6)
                )
            self.embedding.weight.copy_(integers(2 * values))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def hessian_of(x: Array) -> Tensor:
    return torch.from_numpy(x.T @ x / len(x)).float()


def by_gptq(
    weights: list[Tensor], x: list[Array], fmt: str, params: dict[str, Any]
) -> list[Tensor]:
    """GPTQ of several weights at once.

    Rows are independent, but the last bits of a product depend on the number of rows.
    """
    params = {"bits": 4, "symmetric": formats.get(fmt).defaults["symmetric"], **params}
    grid = gptq.gptq(torch.cat(weights), hessian_of(x[0]), **params)
    return list(grid.dequantize().split([w.shape[0] for w in weights]))


def by_spqr(
    weights: list[Tensor], x: list[Array], fmt: str, params: dict[str, Any]
) -> list[Tensor]:
    options = {**formats.get("spqr").defaults, **params}
    stored = {key: options.pop(key) for key in ("checkpoint_format",)}
    out = []
    for weight in weights:
        grid = spqr_search.spqr(weight, hessian_of(x[0]), **options)
        shape = (weight.shape[0], weight.shape[1])
        own = {k: v for k, v in options.items() if k not in ("damp", "threshold")}
        resolved = formats.get("spqr").resolve(shape, {**own, **stored})
        tensors = formats.get("spqr").from_spqr(grid, shape, resolved)  # type: ignore[attr-defined]
        out.append(formats.get("spqr").dequantize(tensors, shape, resolved))
    return out


def by_ldlq(
    weights: list[Tensor], x: list[Array], fmt: str, params: dict[str, Any]
) -> list[Tensor]:
    return [qk.quantize(w, fmt, hessian=hessian_of(x[0]), **params).dequantize() for w in weights]


def by_imatrix(
    weights: list[Tensor], x: list[Array], fmt: str, params: dict[str, Any]
) -> list[Tensor]:
    squares = [torch.from_numpy(np.square(own).mean(0)).float() for own in x]
    return [
        qk.quantize(w, fmt, importance=s).dequantize()
        for w, s in zip(weights, squares, strict=True)
    ]


#: layers by their order in a block; those in one list are quantized before any of them is put in
IN_TURN, AT_ONCE = (
    [["gate_proj", "up_proj"], ["down_proj"]],
    [["gate_proj", "up_proj", "down_proj"]],
)
EXACT = [
    ("gptq", "gptq", {"group_size": 32}, by_gptq),
    ("gptq", "gptq", {"group_size": 32, "bits": 3, "symmetric": False, "damp": 0.3}, by_gptq),
    ("gptq", "gptq", {"group_size": 16, "act_order": True}, by_gptq),
    ("gptq", "gptq", {"group_size": 16, "act_order": True, "static_groups": True}, by_gptq),
    ("pack_quantized", "gptq", {"group_size": 32, "clip_search": True}, by_gptq),
    ("awq", "gptq", {"group_size": 32, "damp": 0.1}, by_gptq),
    ("spqr", "spqr", {}, by_spqr),
    ("spqr", "spqr", {"bits": 4, "group_size": 32, "damp": 1.0, "threshold": 0.05}, by_spqr),
    ("spqr", "spqr", {"act_order": True, "threshold": -1.0}, by_spqr),
    ("quip", "ldlq", {"bits": 2}, by_ldlq),
    ("quip", "ldlq", {"bits": 3, "rescale": True, "seed": 5, "passes": 0}, by_ldlq),
    ("quip_sharp", "ldlq", {"passes": 1}, by_ldlq),
    ("q4_0", "imatrix", {}, by_imatrix),
    ("iq4_nl", "imatrix", {}, by_imatrix),
]


@pytest.mark.parametrize(
    ("name", "algorithm", "params", "direct"),
    EXACT,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_weights_are_those_of_the_algorithm_called_with_what_each_layer_reads(
    name: str, algorithm: str, params: dict[str, Any], direct: Any
) -> None:
    quantized = qk.quantize_model(
        Model(), name, tokens(), algorithm=algorithm, progress=False, **params
    )
    judge = Model()
    gained = []
    for number in range(2):
        for names in AT_ONCE if algorithm == "imatrix" else IN_TURN:
            full = [f"layers.{number}.{leaf}" for leaf in names]
            x = seen_by(judge, full)
            layers = [judge.get_submodule(n) for n in full]
            weights = [layer.weight.detach().clone() for layer in layers]
            packed = [quantized.get_submodule(n).packed for n in full]
            expected = direct(weights, list(x.values()), name, params)
            for n, layer, weight, p, want in zip(
                full, layers, weights, packed, expected, strict=True
            ):
                assert torch.equal(p.dequantize(), want), n
                options = {
                    k: v
                    for k, v in params.items()
                    if k not in algorithms.BY_NAME[algorithm].options
                }
                blind = qk.quantize(weight, name, **options).dequantize()
                # Importance is of single features, the others' judge is the output.
                by = np.diag(np.sqrt(np.square(x[n]).mean(0))) if algorithm == "imatrix" else x[n]
                gained.append(output_error(by, weight, want) / output_error(by, weight, blind))
                layer.weight.data.copy_(want)
    assert max(gained) < 0.97, gained
    assert np.mean(gained) < (0.95 if algorithm == "imatrix" else 0.8), gained


def test_every_algorithm_is_judged_here() -> None:
    assert {case[1] for case in EXACT} | {"awq", "smoothquant", "ranges"} == set(algorithms.BY_NAME)


def test_a_recipe_weighs_each_layer_by_what_it_reads() -> None:
    quantized = qk.quantize_model(Model(256, 96), "q4_k_m", tokens(), progress=False)
    judge, kinds = Model(256, 96), set()
    for number in range(2):
        x = seen_by(judge, [f"layers.{number}.{leaf}" for leaf in AT_ONCE[0]])
        for name in x:
            layer, p = judge.get_submodule(name), quantized.get_submodule(name).packed
            kinds.add(p.format)
            takes = "importance" in formats.get(p.format).quantize_only
            more = (
                {"importance": torch.from_numpy(np.square(x[name]).mean(0)).float()}
                if takes
                else {}
            )
            want = qk.quantize(layer.weight, p.format, **more).tensors["data"]
            assert torch.equal(p.tensors["data"], want), name
            blind = qk.quantize(layer.weight, p.format).tensors["data"]
            assert torch.equal(want, blind) == (p.format == "q8_0"), (
                "whose scale the largest weight sets"
            )
        for name in x:
            judge.get_submodule(name).weight.data.copy_(
                quantized.get_submodule(name).packed.dequantize()
            )
    assert kinds == {"q4_k", "q5_0", "q8_0"}


# ---------------------------------------------------------------------- a Llama, whose norms change
def llama() -> nn.Module:
    """A Llama with as many key heads as query heads, so that o_proj's scales fit into v_proj.

    Its norms give features different sizes.
    """
    model = tiny_model(hidden_size=32, intermediate_size=64, num_key_value_heads=4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.2 + 3 * torch.rand(parameter.shape, generator=generator).square())
    return model


BEFORE = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
FEED_FORWARD = ["mlp.gate_proj", "mlp.up_proj"]
LLAMA = [*ATTENTION, "self_attn.o_proj", *FEED_FORWARD, "mlp.down_proj"]


def put_in(judge: nn.Module, quantized: nn.Module, number: int) -> None:
    """Copy block `number` of the quantized model, dequantized, into the judge."""
    ours, theirs = (m.get_submodule(f"model.layers.{number}") for m in (judge, quantized))
    for name in LLAMA:
        ours.get_submodule(name).weight.data.copy_(theirs.get_submodule(name).packed.dequantize())
    for name in BEFORE.values():
        ours.get_submodule(name).weight.data.copy_(theirs.get_submodule(name).weight)


@pytest.mark.parametrize(("name", "top"), [("w8a8", 127), ("fp8", 448)])
def test_static_ranges_are_the_largest_value_that_each_layer_reads(name: str, top: int) -> None:
    quantized = qk.quantize_model(
        llama(), name, tokens(), algorithm="ranges", activation="static", progress=False
    )
    judge, scales = llama(), []
    for number in range(2):
        x = seen_by(judge, [f"model.layers.{number}.{leaf}" for leaf in LLAMA])
        for n in x:
            p = quantized.get_submodule(n).packed
            scales.append(float(np.float32(np.abs(x[n]).max() / top)))
            assert p.tensors["input_scale"].item() == scales[-1], n
            assert torch.equal(
                p.dequantize(), qk.quantize(judge.get_submodule(n).weight, name).dequantize()
            )
        put_in(judge, quantized, number)
    assert len(set(scales)) == 8, "of inputs, seven layers a block read four"


def searched(weight: Array, x: Array, round_trip: Any) -> Array:
    """AWQ's scales (K) for W (N, K): the power of mean |x|, of 20, with the least output error."""
    best, least = np.ones(x.shape[1]), np.inf
    for step in range(20):
        scale = np.abs(x).mean(0).clip(1e-4) ** (step / 20)
        scale /= np.sqrt(scale.max() * scale.min())
        error = np.square(x @ (weight - round_trip(weight * scale) / scale).T).sum()
        if error < least:
            best, least = scale, error
    return best


def clipped(weight: Array, x: Array, size: int, round_trip: Any) -> Array:
    """W (N, K) with each group's range narrowed to where its part of the output errs least."""
    groups = [slice(begin, begin + size) for begin in range(0, weight.shape[1], size)]
    best, least = weight.copy(), np.full((len(weight), len(groups)), np.inf)
    for step in range(11):
        tried = weight.copy()
        for group in groups:
            limit = np.abs(weight[:, group]).max(1, keepdims=True) * (1 - 0.05 * step)
            tried[:, group] = weight[:, group].clip(-limit, limit)
        rounded = round_trip(tried)
        for g, group in enumerate(groups):
            error = np.square(x[:, group] @ (weight - rounded)[:, group].T).sum(0)
            better = error < least[:, g]
            best[better, group] = tried[better, group]
            least[better, g] = error[better]
    return best


@pytest.mark.parametrize(("name", "params", "size"), [
    ("awq", {"group_size": 32}, 32),
    ("awq", {"group_size": 16, "clip": False}, 16),
    ("gptq", {"bits": 3, "group_size": 32, "symmetric": False}, 32),
    ("nf4", {"block_size": 32, "clip": False}, 32),
], ids=str)  # fmt: skip
def test_awq_scales_and_clips_by_what_each_layer_reads(
    name: str, params: dict[str, Any], size: int
) -> None:
    quantized = qk.quantize_model(
        llama(), name, tokens(), algorithm="awq", progress=False, **params
    )
    own = {key: value for key, value in params.items() if key != "clip"}

    def round_trip(weight: Array) -> Array:
        return (
            qk.quantize(torch.from_numpy(weight).float(), name, **own).dequantize().double().numpy()
        )

    judge, gained, scaled = llama(), [], 0
    for number in range(2):
        block, found = (m.get_submodule(f"model.layers.{number}") for m in (judge, quantized))
        x = seen_by(judge, [f"model.layers.{number}.{leaf}" for leaf in LLAMA])
        x = {leaf: x[f"model.layers.{number}.{leaf}"] for leaf in LLAMA}
        plain = {leaf: block.get_submodule(leaf).weight.detach().double().numpy() for leaf in LLAMA}
        weight, read = dict(plain), dict(x)
        for before, readers in (
            ("input_layernorm", ATTENTION), ("self_attn.v_proj", ["self_attn.o_proj"]),
            ("post_attention_layernorm", FEED_FORWARD), ("mlp.up_proj", ["mlp.down_proj"]),
        ):  # fmt: skip
            scale = searched(
                np.concatenate([weight[n] for n in readers]), x[readers[0]], round_trip
            )
            scaled += bool(scale.std() > 0)
            for n in readers:
                weight[n], read[n] = weight[n] * scale, x[n] / scale
            if before in weight:
                weight[before] = weight[before] / scale[:, None]
            else:
                norm = block.get_submodule(before).weight.detach().double().numpy() / scale
                np.testing.assert_allclose(
                    found.get_submodule(before).weight.detach(), norm, rtol=1e-5
                )
        for leaf in LLAMA:
            kept = params.get("clip") is False or leaf.endswith(("q_proj", "k_proj"))
            want = round_trip(
                weight[leaf] if kept else clipped(weight[leaf], read[leaf], size, round_trip)
            )
            got = found.get_submodule(leaf).packed.dequantize().double().numpy()
            # float32 here and float64 there may fall to different sides of a midpoint or a range,
            # rarely
            same = np.isclose(got, want, rtol=2e-3, atol=1e-6).mean()
            assert same > 0.95, f"{number}.{leaf}: {same}"
            blind = plain[leaf] @ x[leaf].T - round_trip(plain[leaf]) @ x[leaf].T
            gained.append(
                np.square((weight[leaf] - got) @ read[leaf].T).sum() / np.square(blind).sum()
            )
        put_in(judge, quantized, number)
    assert scaled >= 7, "of eight inputs"
    assert np.mean(gained) < 0.9, gained


@pytest.mark.parametrize(("name", "params"), [
    ("w8a8", {}),
    ("w8a8", {"alpha": 0.8, "activation": "static"}),
    ("int8", {"alpha": 0.3}),
    ("fp8", {"activation": "static"}),
], ids=str)  # fmt: skip
def test_smoothquant_evens_out_what_each_layer_reads(name: str, params: dict[str, Any]) -> None:
    quantized = qk.quantize_model(
        llama(), name, tokens(), algorithm="smoothquant", progress=False, **params
    )
    judge, alpha, top = llama(), params.get("alpha", 0.5), 448 if name == "fp8" else 127
    for number in range(2):
        block, found = (m.get_submodule(f"model.layers.{number}") for m in (judge, quantized))
        x = seen_by(judge, [f"model.layers.{number}.{leaf}" for leaf in LLAMA])
        x = {leaf: x[f"model.layers.{number}.{leaf}"] for leaf in LLAMA}
        weight = {
            leaf: block.get_submodule(leaf).weight.detach().double().numpy() for leaf in LLAMA
        }
        for readers in (ATTENTION, FEED_FORWARD):
            largest = np.max([np.abs(weight[n]).max(0) for n in readers], 0)
            scale = np.abs(x[readers[0]]).max(0) ** alpha / largest ** (1 - alpha)
            for n in readers:
                weight[n], x[n] = weight[n] * scale, x[n] / scale
            norm = block.get_submodule(BEFORE[readers[0]]).weight.detach().double().numpy() / scale
            np.testing.assert_allclose(
                found.get_submodule(BEFORE[readers[0]]).weight.detach(), norm, rtol=1e-5
            )
        for leaf in LLAMA:
            p = found.get_submodule(leaf).packed
            want = qk.quantize(torch.from_numpy(weight[leaf]).float(), name).dequantize()
            assert np.isclose(p.dequantize(), want, rtol=1e-4).mean() > 0.99, f"{number}.{leaf}"
            if params.get("activation") == "static":
                scale = np.abs(x[leaf]).max() / top
                np.testing.assert_allclose(p.tensors["input_scale"].item(), scale, rtol=1e-5)
        put_in(judge, quantized, number)
