"""`qkernels eval`: perplexity of a model as it is, and quantized to a list of formats."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import common

COLUMNS = ["format", "bits/weight", "perplexity", "ratio", "KL", "same top token", "seconds"]


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: common.ModelArgument,
    formats: Annotated[
        str | None,
        typer.Option(
            "--formats",
            help="Quantize to these: all, low-bit, or a list such as "
            '"nf4,gptq:bits=3,group_size=32".',
        ),
    ] = None,
    calibration: common.CalibrationOption = None,
    samples: common.SamplesOption = 32,
    length: common.LengthOption = 512,
    seed: common.SeedOption = 0,
    against: Annotated[
        str | None, typer.Option("--against", help="Compare with this model instead: a MODEL.")
    ] = None,
    text: common.TextOption = "macbeth",
    tokens: common.TokensOption = 2048,
    window: common.WindowOption = 512,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write a Markdown table.")] = False,
    device: common.DeviceOption = "auto",
    dtype: common.DtypeOption = None,
    json: common.JsonOption = False,
) -> None:
    """Measure perplexity of a model as it is and, with --formats, rounded to each format.

    KL is the mean divergence from the model as it is (or from --against), in nats per token: a
    finer measure than perplexity. A format with an algorithm, as in "gptq:bits=3,algorithm=gptq",
    is made with the --calibration text.

    Example: qkernels eval smollm2-135m --formats "nf4,awq:group_size=64" --text macbeth --markdown
    """
    from ..quantizers.specs import parse_specs

    if formats is not None and against is not None:
        raise ValueError(
            "--against: expected no --formats beside it; each is compared with MODEL itself"
        )
    specs = parse_specs(formats) if formats is not None else []
    contents = common.read_text(text)
    net, tokenizer = common.load(model, device, dtype, packed=not specs)
    ids = common.text_ids(tokenizer, contents, tokens, text)
    data = None
    if any("algorithm" in spec.params for spec in specs):
        if calibration is None:
            raise ValueError(
                "--calibration: expected a text, for the formats with an algorithm, got none"
            )
        data = common.calibration_ids(tokenizer, calibration, text, samples, length, seed)
    if specs:
        _check_unquantized(net, model)
        results = [_measure("unquantized", net, ids, window)]
        results += [_quantized(spec, net, ids, window, data) for spec in specs]
    else:
        other = None if against is None else common.load(against, device, dtype, packed=True)[0]
        results = [_measure(_describe(net), net, ids, window, other)]
        if other is not None:
            results.insert(0, _measure(str(against), other, ids, window))
    first = results[0]["perplexity"]
    for result in results:
        result["ratio"] = result["perplexity"] / first
    used = {
        "model": model,
        "text": text,
        "tokens": len(ids),
        "window": window,
        "device": str(net.device),
    }
    if json:
        common.write_json({**used, "results": results})
        return
    rows = [_cells(result) for result in results]
    if markdown:
        print(common.markdown_table(COLUMNS, rows))
    else:
        title = f"{model}: {len(ids)} tokens of {text} in windows of {window}, on {net.device}"
        common.write_table(title, COLUMNS, rows)


def _check_unquantized(net: Any, name: str) -> None:
    from ..models.quantize import model_summary

    kinds = model_summary(net).formats
    if kinds:
        raise ValueError(
            f"{name}: --formats: expected an unquantized model, got one in {', '.join(kinds)}"
        )


def _describe(net: Any) -> str:
    """The formats of a model's layers, or "unquantized"."""
    from ..models.quantize import model_summary

    return " + ".join(model_summary(net).formats) or "unquantized"


def _quantized(spec: Any, net: Any, ids: Any, window: int, calibration: Any) -> dict[str, Any]:
    """The result of a copy of `net` quantized as `spec` says, compared with `net`."""
    from copy import deepcopy

    from ..models.quantize import quantize_model, shared_copy

    if "algorithm" in spec.params:  # algorithms may change norms, so the copy must not share them
        copy = quantize_model(deepcopy(net), spec.name, calibration, **spec.params)
    else:
        copy = quantize_model(shared_copy(net), spec.name, **spec.params)
    return _measure(str(spec), copy, ids, window, net)


def _measure(label: str, net: Any, ids: Any, window: int, reference: Any = None) -> dict[str, Any]:
    """The result of one model, with `label` as its format."""
    from dataclasses import asdict

    from ..models.evaluate import perplexity
    from ..models.quantize import model_summary

    with common.progress(f"Evaluating {label}") as report:
        evaluation = asdict(perplexity(net, ids, window, reference=reference, progress=report))
    return {"format": label, "bits_per_weight": model_summary(net).bits_per_weight, **evaluation}


def _cells(result: dict[str, Any]) -> list[str]:
    def cell(key: str, form: str) -> str:
        return "" if result[key] is None else format(result[key], form)

    return [
        result["format"],
        cell("bits_per_weight", ".3f"),
        cell("perplexity", ".3f"),
        cell("ratio", ".4f"),
        cell("kl", ".5f"),
        cell("agreement", ".1%"),
        cell("seconds", ".1f"),
    ]
