"""Measure how activation outliers harm 8-bit formats, and how SmoothQuant and LLM.int8() help.

    python -m bench.outliers [MODEL] [--factor 200 --channels 1 --markdown]

Large models have a few features whose activations are 20 to 100 times as large as the others
(Dettmers et al. 2022, arXiv 2208.07339). Small models do not, so this script plants some: it
multiplies a few features of a norm's weight by `factor`, and divides the same columns of the linear
layers that read the norm by it. The model's outputs stay the same, and its activations become hard
to quantize.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
import typer
from torch import nn

from qkernels.quantizers import architectures

COLUMNS = ["format", "perplexity", "ratio", "with outliers", "ratio"]
#: format, arguments of quantize_model, whether it needs calibration data
FORMATS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("w8a8", {}, False),
    ("w8a8", {"algorithm": "smoothquant", "alpha": 0.5}, True),
    ("w8a8", {"algorithm": "smoothquant", "alpha": 0.8}, True),
    ("w8a8", {"algorithm": "ranges", "activation": "static"}, True),
    ("w8a8", {"algorithm": "smoothquant", "activation": "static", "alpha": 0.5}, True),
    ("int8", {}, False),
    ("fp8", {"activation": "dynamic"}, False),
    ("fp8", {"algorithm": "smoothquant", "activation": "dynamic", "alpha": 0.5}, True),
)


@torch.no_grad()
def plant(model: nn.Module, factor: float = 200.0, channels: int = 1, seed: int = 0) -> nn.Module:
    """Plant outliers in `channels` features after each norm of `model`, in place.

    The outputs of the model stay the same.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, block in architectures.blocks_of(model):
        for rule in architectures.of(model).rules:
            before = block.get_submodule(rule.before)
            if isinstance(before, nn.Linear):
                continue
            layers = [block.get_submodule(name) for name in rule.layers]
            features = before.weight.shape[0]
            scale = torch.ones(features)
            scale[torch.randperm(features, generator=generator)[:channels]] = 1 / factor
            assert architectures.fold(before, scale, layers)
    return model


def main(
    model: str = "smollm2-135m",
    factor: float = 200.0,
    channels: int = 1,
    calibration: str = "kjv",
    text: str = "macbeth",
    tokens: Annotated[int, typer.Option(help="Tokens of the text.")] = 2048,
    samples: int = 16,
    markdown: bool = False,
) -> None:
    """Perplexity of 8-bit formats on MODEL, and on a copy with planted activation outliers."""
    from qkernels import quantize_model
    from qkernels.cli import common
    from qkernels.models.evaluate import perplexity
    from qkernels.quantizers.specs import FormatSpec

    plain, tokenizer = common.load(model, "auto", None)
    spiked = plant(copy.deepcopy(plain), factor, channels)
    ids = common.text_ids(tokenizer, common.read_text(text), tokens, text)
    data = common.calibration_ids(tokenizer, calibration, text, samples, 512, 0)
    models = (plain, spiked)
    base = [perplexity(net, ids).perplexity for net in models]
    rows = [["unquantized", f"{base[0]:.3f}", "1.0000", f"{base[1]:.3f}", "1.0000"]]
    for name, arguments, calibrated in FORMATS:
        cells = [str(FormatSpec(name, arguments))]
        for net, unquantized in zip(models, base, strict=True):
            quantized = quantize_model(
                copy.deepcopy(net), name, data if calibrated else None, **arguments
            )
            value = perplexity(quantized, ids).perplexity
            cells += [f"{value:.3f}", f"{value / unquantized:.4f}"]
        rows.append(cells)
    if markdown:
        print(common.markdown_table(COLUMNS, rows))
    else:
        common.write_table(f"{factor:g}x in {channels} features of each norm", COLUMNS, rows)


if __name__ == "__main__":
    typer.run(main)
