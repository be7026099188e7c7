"""`qkernels quantize`: quantizes a model, saves it, loads it back and reports the loss."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common


def register(app: typer.Typer) -> None:
    app.command("quantize")(quantize)


def quantize(
    model: common.ModelArgument,
    format: Annotated[
        str, typer.Option("--format", "-f", help="Storage format; `qkernels info` lists them.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Directory to write, or a file called .gguf.")
    ],
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param", "-p", metavar="KEY=VALUE", help="A parameter of the format; repeat for more."
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip", metavar="PATTERN", help="Leave modules with such names alone, as *.down_proj."
        ),
    ] = None,
    calibration: common.CalibrationOption = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            "--algorithm",
            help="gptq, awq, smoothquant, ranges or imatrix; needs --calibration [format's].",
        ),
    ] = None,
    imatrix: Annotated[
        str | None,
        typer.Option("--imatrix", help="llama.cpp's importance matrix file, for GGUF's types."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", help="Directory that keeps finished blocks, to go on from if interrupted."
        ),
    ] = None,
    samples: common.SamplesOption = 32,
    length: common.LengthOption = 512,
    seed: common.SeedOption = 0,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Reload what was saved and evaluate it.")
    ] = True,
    text: common.TextOption = "macbeth",
    tokens: common.TokensOption = 2048,
    window: common.WindowOption = 512,
    prompt: Annotated[
        str, typer.Option("--prompt", help="Text the reloaded model continues.")
    ] = "The capital of France is",
    device: common.DeviceOption = "auto",
    dtype: common.DtypeOption = None,
    json: common.JsonOption = False,
) -> None:
    """Quantize a model and save it as a Hugging Face directory, or GGUF's types as a .gguf file.

    Weights are rounded to nearest, or with --calibration chosen by the format's algorithm, or the
    one named; -p gives the algorithm's options, too. Then load it back from disk and report its
    size, bits per weight, perplexity before and after, and how it continues a sentence.

    Example: qkernels quantize smollm2-135m -f gptq -p group_size=64 --calibration kjv -o ./smol
    """
    from ..checkpoints import directories
    from ..quantizers.specs import FormatSpec, parse_params

    spec = FormatSpec(format, parse_params(format, param or []))
    source, target = common.model_path(model), Path(output)
    if (
        target.resolve() if is_file(target) else directories.check_target(target)
    ) == source.resolve():
        raise ValueError(f"--output: expected another directory than the model's, got {output}")
    if calibration is None and (algorithm or resume):
        raise ValueError(
            f"--{'algorithm' if algorithm else 'resume'}: expected --calibration with it, got none"
        )
    if imatrix is not None and (calibration or algorithm or resume):
        raise ValueError("--imatrix: expected no --calibration, --algorithm or --resume with it")
    contents = common.read_text(text) if report else ""
    net, tokenizer = common.load(str(source), device, dtype)
    ids = common.text_ids(tokenizer, contents, tokens, text) if report else None

    if is_file(target):  # checked now, before the long work
        from ..checkpoints.gguf import writer as gguf_writer

        gguf_writer.check(net, tokenizer, format)

    from ..models.quantize import model_summary, quantize_model, save_model, shared_copy
    from ..quantizers import ImportanceMatrix

    base = net  # the report compares with the original at the end
    data: Any = None
    if calibration is not None:
        evaluated = text if report else None
        data = common.calibration_ids(tokenizer, calibration, evaluated, samples, length, seed)
    elif imatrix is not None:
        data = ImportanceMatrix.load(imatrix, net)
    if report:
        # AWQ and SmoothQuant change norms and weights in place, so the copy must not share them.
        net = shared_copy(net) if data is None else deepcopy(net)
    options = {"algorithm": algorithm, **spec.params}
    net = quantize_model(net, format, data, resume=resume, skip=skip, **options)
    common.status(f"Saving to {output}")
    save_model(net, target, tokenizer)
    summary = model_summary(net)
    result: dict[str, Any] = {
        "model": model,
        "output": output,
        "format": str(spec),
        "quantized_layers": summary.quantized_layers,
        "bits_per_weight": summary.bits_per_weight,
        "bytes_on_disk": target.stat().st_size
        if is_file(target)
        else directories.directory_bytes(target),
    }
    if report:
        del net
        result |= _report(base, target, ids, window, prompt, device, dtype)
    if json:
        common.write_json(result)
    else:
        _print(result)


def is_file(target: Path) -> bool:
    """Whether `target` is a .gguf file. Raises ValueError if a directory has its name."""
    if target.suffix == ".gguf" and target.is_dir():
        raise ValueError(f"--output: expected a file or nothing at {target}, got a directory")
    return target.suffix == ".gguf"


def _report(
    base: Any, saved: Path, ids: Any, window: int, prompt: str, device: str, dtype: str | None
) -> dict[str, Any]:
    """The part of the result that needs the saved model: its perplexity and a continuation."""
    from ..models.evaluate import perplexity

    net, tokenizer = common.load(str(saved), device, dtype, packed=True)
    with common.progress("Evaluating") as report:
        evaluation = perplexity(net, ids, window, reference=base, progress=report)
    before = evaluation.reference_perplexity
    assert before is not None
    return {
        "tokens": len(ids),
        "perplexity_before": before,
        "perplexity_after": evaluation.perplexity,
        "ratio": evaluation.perplexity / before,
        "kl": evaluation.kl,
        "agreement": evaluation.agreement,
        "prompt": prompt,
        "text": common.generate(net, tokenizer, prompt, 24),
    }


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['output']}: {result['format']}, {result['quantized_layers']} layers at "
        f"{result['bits_per_weight']:.3f} bits per weight, "
        f"{common.human_bytes(result['bytes_on_disk'])} on disk"
    )
    if "text" not in result:
        return
    print(
        f"perplexity {result['perplexity_before']:.3f} before, "
        f"{result['perplexity_after']:.3f} after (x{result['ratio']:.4f}) on {result['tokens']} "
        f"tokens; KL {result['kl']:.5f} nats per token; same top token {result['agreement']:.1%}"
    )
    print(f"{result['prompt']}{result['text']}")
