"""Whether a format costs a model more than Gaussian noise of the same size in its weights would.

    python -m bench.noise [MODEL] [--formats "fp8,int8" --seeds 3 --markdown]

For each format: the error of its weights, norm(W' - W) / norm(W), the mean over layers; the
perplexity with weights and activations as the format has them; with its weights alone, dequantized;
and with every weight matrix W + noise instead, where the noise is Gaussian, independent of W, and
in each layer exactly as large as the format's error there. If the last two agree, there is nothing
special about the format's errors; what the first has beyond the second is the quantized
activations' share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

COLUMNS = ["format", "weight error", "perplexity", "weights alone", "Gaussian noise", "its seeds"]


@torch.no_grad()
def changed(model: nn.Module, change: Callable[[int, Tensor], Tensor]) -> nn.Module:
    """A copy of `model` with the weight of its i-th linear layer, except the output's, put through
    `change`.
    """
    from qkernels.models.candidates import linears

    model = copy.deepcopy(model)
    for i, (_, layer) in enumerate(linears(model, None)):
        layer.weight.copy_(change(i, layer.weight.float()))
    return model


def noise_like(weight: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of weight's shape whose Frobenius norm is `size` times the weight's."""
    noise = torch.randn(weight.shape, generator=generator)
    return noise * (size * weight.norm() / noise.norm())


def main(
    model: str = "smollm2-135m",
    formats: str = "fp8:granularity=channel,int8,w8a8",
    text: str = "macbeth",
    tokens: Annotated[int, typer.Option(help="Of the text.")] = 2048,
    seeds: Annotated[int, typer.Option(help="Draws of the noise; the table has their mean.")] = 3,
    markdown: bool = False,
) -> None:
    """Perplexity of formats, of their weights alone, and of Gaussian noise as large as their
    errors.
    """
    import qkernels as qk
    from qkernels.cli import common
    from qkernels.models.evaluate import perplexity
    from qkernels.quantizers.specs import parse_specs

    net, tokenizer = common.load(model, "cpu", "float32")
    ids = common.text_ids(tokenizer, common.read_text(text), tokens, text)
    base = perplexity(net, ids).perplexity

    def measured(changed_model: nn.Module) -> float:
        return perplexity(changed_model, ids).perplexity

    def cost(found: float) -> str:
        return f"{found:.3f} ({100 * (found / base - 1):+.2f}%)"

    rows = [["unquantized", "", f"{base:.3f}", "", "", ""]]
    known: dict[
        tuple[float, ...], tuple[float, list[float]]
    ] = {}  # int8 and w8a8 have the same weights
    for spec in parse_specs(formats):
        errors: dict[int, float] = {}

        def dequantized(i: int, weight: Tensor, spec: Any = spec, errors: Any = errors) -> Tensor:
            found = qk.quantize(weight, spec.name, **spec.params).dequantize()
            errors[i] = float((found - weight).norm() / weight.norm())
            return found

        def noisy(seed: int, errors: Any = errors) -> nn.Module:
            generator = torch.Generator().manual_seed(seed)
            return changed(net, lambda i, weight: weight + noise_like(weight, errors[i], generator))

        rounded = changed(net, dequantized)
        sizes = tuple(errors.values())
        if sizes not in known:
            alone = measured(rounded)
            known[sizes] = alone, [measured(noisy(seed)) for seed in range(seeds)]
        alone, noise = known[sizes]
        del rounded
        full = measured(
            qk.quantize_model(copy.deepcopy(net), spec.name, progress=False, **spec.params)
        )
        rows.append(
            [
                str(spec),
                f"{100 * sum(sizes) / len(sizes):.2f}%",
                cost(full),
                cost(alone),
                cost(sum(noise) / seeds),
                " ".join(f"{100 * (found / base - 1):+.2f}%" for found in noise),
            ]
        )
        common.status(" | ".join(rows[-1]))
    if markdown:
        print(common.markdown_table(COLUMNS, rows))
    else:
        common.write_table(f"{model}: {tokens} tokens of {text}", COLUMNS, rows)


if __name__ == "__main__":
    typer.run(main)
