"""Test whether a format costs a model more than Gaussian noise of the same size in its weights.

    python -m bench.noise [MODEL] [--formats "fp8,int8" --seeds 3 --markdown]

For each format the table has

- the error of its weights, norm(W' - W) / norm(W), as the mean over layers;
- the perplexity with weights and activations in the format;
- the perplexity with its weights alone, dequantized ("weights alone");
- the perplexity with weights W + noise, where the noise is Gaussian, independent of W, and in each
  layer exactly as large as the format's error there ("Gaussian noise").

If the last two agree, there is nothing special about the format's errors. The quantized activations
cost the difference between the first perplexity and the second.
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
    """A copy of `model` in which `change(i, weight)` replaces the weight of the i-th linear layer.

    The output layer (lm_head) stays.
    """
    from qkernels.models.candidates import linears

    model = copy.deepcopy(model)
    for i, (_, layer) in enumerate(linears(model, None)):
        layer.weight.copy_(change(i, layer.weight.float()))
    return model


def noise_like(weight: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of the weight's shape; its Frobenius norm is `size` times the weight's."""
    noise = torch.randn(weight.shape, generator=generator)
    return noise * (size * weight.norm() / noise.norm())


def main(
    model: str = "smollm2-135m",
    formats: str = "fp8:granularity=channel,int8,w8a8",
    text: str = "macbeth",
    tokens: Annotated[int, typer.Option(help="Tokens of the text.")] = 2048,
    seeds: Annotated[int, typer.Option(help="Draws of the noise; the table has their mean.")] = 3,
    markdown: bool = False,
) -> None:
    """Compare the perplexity of formats with that of Gaussian noise as large as their errors."""
    import qkernels as qk
    from qkernels.cli import common
    from qkernels.models.evaluate import perplexity
    from qkernels.quantizers.specs import parse_specs

    net, tokenizer = common.load(model, "cpu", "float32")
    ids = common.text_ids(tokenizer, common.read_text(text), tokens, text)
    base = perplexity(net, ids).perplexity

    def measured(changed_model: nn.Module) -> float:
        return perplexity(changed_model, ids).perplexity

    def cost(value: float) -> str:
        return f"{value:.3f} ({100 * (value / base - 1):+.2f}%)"

    rows = [["unquantized", "", f"{base:.3f}", "", "", ""]]
    # by the errors of the layers, because int8 and w8a8 have the same weights
    perplexities: dict[tuple[float, ...], tuple[float, list[float]]] = {}
    for spec in parse_specs(formats):
        errors: dict[int, float] = {}

        def dequantized(i: int, weight: Tensor, spec: Any = spec, errors: Any = errors) -> Tensor:
            rounded = qk.quantize(weight, spec.name, **spec.params).dequantize()
            errors[i] = float((rounded - weight).norm() / weight.norm())
            return rounded

        def noisy(seed: int, errors: Any = errors) -> nn.Module:
            generator = torch.Generator().manual_seed(seed)
            return changed(net, lambda i, weight: weight + noise_like(weight, errors[i], generator))

        rounded = changed(net, dequantized)
        sizes = tuple(errors.values())
        if sizes not in perplexities:
            alone = measured(rounded)
            perplexities[sizes] = alone, [measured(noisy(seed)) for seed in range(seeds)]
        alone, noise = perplexities[sizes]
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
                " ".join(f"{100 * (value / base - 1):+.2f}%" for value in noise),
            ]
        )
        common.status(" | ".join(rows[-1]))
    if markdown:
        print(common.markdown_table(COLUMNS, rows))
    else:
        common.write_table(f"{model}: {tokens} tokens of {text}", COLUMNS, rows)


if __name__ == "__main__":
    typer.run(main)
