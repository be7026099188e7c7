"""`qkernels convert`: converts a model to another storage format, without loss where possible."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_EXPLAINED = {
    "exact": "carried over exactly: the same codes, scales and zero points",
    "requantized": "dequantized and rounded again, which costs accuracy",
    "dequantized": "dequantized to plain 16-bit weights",
    "quantized": "rounded to nearest from plain weights",
    "kept": "kept as they are",
}


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    model: common.ModelArgument,
    output: Annotated[str, typer.Argument(help="Directory to write.")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format", "-f", help="Storage format; fp16 and bf16 dequantize [keep the model's]."
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param", "-p", metavar="KEY=VALUE", help="A parameter of the format; repeat for more."
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest weights file, as 500MB or 5GB.")
    ] = "5GB",
    device: common.DeviceOption = "cpu",
    dtype: common.DtypeOption = None,
    json: common.JsonOption = False,
) -> None:
    """Convert a model to another storage format, or write it in shards of another size.

    GPTQ, AWQ, pack_quantized and the int8 formats hold integer grids: codes, scales and zero points
    go from one to another without loss where the target can hold them. Otherwise layers are
    dequantized and rounded again, and the report says how many, why, and by how much they changed.
    A GGUF file without --format becomes a directory that holds its tensors bit for bit, which
    load_model and vLLM read.

    Example: qkernels convert ./my-model-gptq ./my-model-awq --format awq
    """
    from ..checkpoints import directories, save
    from ..quantizers.specs import parse_params

    params = parse_params(format, param or []) if format else {}
    if param and not format:
        raise ValueError("--param: expected --format with it, got none")
    limit = shard_bytes(max_shard_size)
    source, target = common.model_path(model), Path(output)
    if directories.check_target(target) == source.resolve():
        raise ValueError(f"OUTPUT: expected another directory than the model's, got {output}")
    net, tokenizer = _load(source, device, dtype, packed=format is None and source == Path(model))
    layers: list[dict[str, Any]] = []
    if format is not None:
        with common.progress(f"Converting to {format}") as report:
            layers = _convert(net, format, params, report)
    common.status(f"Saving to {output}")
    save(net, target, tokenizer, limit)
    counts = Counter(layer["how"] for layer in layers)
    errors = [layer["error"] for layer in layers if layer["how"] == "requantized"]
    result = {
        "model": model,
        "output": output,
        "format": format,
        "layers": len(layers),
        **{how: counts[how] for how in _EXPLAINED},
        "reasons": dict(Counter(layer["reason"] for layer in layers if layer["reason"])),
        "mean_error": sum(errors) / len(errors) if errors else 0.0,
        "max_error": max(errors, default=0.0),
        "lossless": not (counts["requantized"] or counts["quantized"] or counts["dequantized"]),
        "bytes_on_disk": directories.directory_bytes(target)
        if target.is_dir()
        else target.stat().st_size,
    }
    if json:
        common.write_json({**result, "modules": layers})
    else:
        _print(result)


def _load(source: Path, device: str, dtype: str | None, *, packed: bool) -> tuple[Any, Any]:
    """(model, tokenizer or None); converting weights needs no tokenizer.

    packed: keep the tensors of a GGUF file bit for bit, in a directory with our own config.
    """
    from ..checkpoints import load_tokenizer
    from ..checkpoints.gguf import reader as gguf
    from ..models.quantize import load_model

    if gguf.is_gguf(source):
        return common.load(str(source), device, dtype, packed=packed)
    common.status(f"Loading {source}")
    common.quiet_transformers()
    try:
        tokenizer = load_tokenizer(source)
    except ValueError:
        tokenizer = None
    return load_model(source, common.pick_device(device), common.pick_dtype(dtype)), tokenizer


def _convert(net: Any, format: str, params: dict[str, Any], report: Any) -> list[dict[str, Any]]:
    """Convert or quantize the model in place; one object for each layer, as in `Conversion`."""
    from dataclasses import asdict

    from ..models.convert import convert_model
    from ..models.quantize import quantize_model
    from ..nn.linear import QuantLinear

    if any(isinstance(module, QuantLinear) for module in net.modules()):
        conversions = convert_model(net, format, report, **params)
        return [asdict(conversion) for conversion in conversions]
    quantize_model(net, format, progress=False, **params)
    names = [name for name, module in net.named_modules() if isinstance(module, QuantLinear)]
    plain = {"source": "plain", "target": format, "how": "quantized", "reason": "", "error": None}
    return [{"name": name, **plain} for name in names]


def shard_bytes(text: str) -> int:
    """ "500MB" -> 500_000_000. Raises ValueError for a text that is no size."""
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"--max-shard-size: expected a size as 500MB or 5GB, got {text!r}")
    return size


def _print(result: dict[str, Any]) -> None:
    size = common.human_bytes(result["bytes_on_disk"])
    if result["format"] is None:
        print(f"{result['output']}: the same weights, {size} on disk")
        return
    print(f"{result['output']}: {result['layers']} layers in {result['format']}, {size} on disk")
    for how, explanation in _EXPLAINED.items():
        if result[how]:
            print(f"  {result[how]} {explanation}")
    for reason, count in result["reasons"].items():
        print(f"    {count} because {reason}")
    if result["requantized"]:
        print(
            f"    relative error of a weight: mean {result['mean_error']:.4f}, "
            f"largest {result['max_error']:.4f}"
        )
    print("lossless" if result["lossless"] else "not lossless")
