"""Measure a Llama-shaped model with random weights, by format: tokens per second, and memory.

    python -m bench.llm --size 1b --formats "bf16,gptq:bits=4,group_size=128,nf4" --output llm.json
    TRITON_INTERPRET=1 python -m bench.llm --size tiny     # without a GPU

Decode makes one token at a time with a static key-value cache, in one of three modes:

- "eager", which shows what the host costs;
- "graph", a CUDA graph of the eager model;
- "compile", a CUDA graph of torch.compile's code.

Without a GPU "graph" and "compile" make the same calls, without a graph and without compiled code.
Prefill is eager. bf16 is the model's own nn.Linear.
"""

from __future__ import annotations

import copy
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import qkernels as qk
from qkernels.benchmark import race, timing
from qkernels.quantizers.specs import FormatSpec, parse_specs

from . import supervisor

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


MODES = ("eager", "graph", "compile")


@dataclass
class Row:
    """Results of one format at one batch size.

    prefill: tokens per second. decode: mode -> tokens per second. memory_weights, memory_peak: GiB
    of the weights, and of everything at its highest; None without a GPU.
    """

    format: str
    batch: int
    prompt: int
    prefill: float
    decode: dict[str, float]
    memory_weights: float | None
    memory_peak: float | None


def model_of(size: str, device: str) -> Any:
    """A bfloat16 LlamaForCausalLM of SIZES[size] with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[size], max_position_embeddings=8192, tie_word_embeddings=size != "8b"
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def seconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median time of `repeats` calls; of three, if a call takes longer than a tenth of a second."""
    if device == "cuda":
        samples = [timing._seconds(run)]
        samples += [timing._seconds(run) for _ in range(repeats - 1 if samples[0] < 0.1 else 2)]
        return timing.of_samples(samples).median
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(
    model: Any, label: str, batch: int, prompt: int, device: str, repeats: int, modes: list[str]
) -> Iterator[Row]:
    """Measure one format at one batch size; yields its row, as far as it is known, after each mode.

    Compiling comes last and may take all the time that is left, so the caller keeps each row.
    """
    from transformers import StaticCache

    gib = 2**30
    if device == "cuda":
        # the 16-bit model that was quantized does not count
        torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated() / gib if device == "cuda" else None
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=device)
    model(ids, use_cache=False, logits_to_keep=1)  # compiles kernels, prepacks weights
    prefill = seconds(lambda: model(ids, use_cache=False, logits_to_keep=1), device, repeats)
    token, where = ids[:, :1].clone(), torch.tensor([prompt], device=device)

    def step_of(net: Any) -> Callable[[], Any]:
        # Every step takes a place in the cache: warm-up, capture, and each replay that is timed.
        cache = StaticCache(config=model.config, max_cache_len=prompt + repeats + 16)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def step() -> Any:
            return net(
                token,
                past_key_values=cache,
                use_cache=True,
                position_ids=where[None],
                cache_position=where,
            )

        return step

    decode: dict[str, float] = {}
    for mode in modes:
        step = step_of(compiled(model, device) if mode == "compile" else model)
        for _ in range(2):
            step()
        run = step if device == "cpu" or mode == "eager" else timing.graph_of([step]).replay
        run()
        decode[mode] = batch / seconds(run, device, repeats)
        peak = torch.cuda.max_memory_allocated() / gib if device == "cuda" else None
        yield Row(label, batch, prompt, batch * prompt / prefill, decode, weights, peak)


def compiled(model: Any, device: str) -> Any:
    """The model under torch.compile."""
    torch._dynamo.reset()
    return torch.compile(
        model, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager"
    )


def main(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "1b",
    formats: str = "bf16,gptq:bits=4,group_size=128,nf4,w8a8,fp8:activation=dynamic",
    batches: str = "1,16",
    prompt: int = 1024,
    repeats: int = 10,
    backend: str = "auto",
    modes: Annotated[
        str, typer.Option(help=f"Ways to decode: some of {', '.join(MODES)}.")
    ] = "eager,graph",
    deadline: Annotated[
        float, typer.Option(help="Seconds after which no further format is begun.")
    ] = 1e9,
    output: Annotated[Path | None, typer.Option(help="JSON file; rows in it stay.")] = None,
) -> None:
    if size not in SIZES:
        raise typer.BadParameter(f"--size: expected one of {', '.join(SIZES)}, got {size!r}")
    names = modes.split(",")
    if not set(names) <= set(MODES):
        raise typer.BadParameter(f"--modes: expected some of {', '.join(MODES)}, got {modes!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        prompt, batches = min(prompt, 16), "1"
    rows = _read(output, size)
    left_out: list[str] = []
    start = time.monotonic()
    for spec in parse_specs(formats):
        if time.monotonic() - start > deadline:
            left_out.append(str(spec))
            continue
        model = quantized(size, spec, backend, device)
        for number, batch in enumerate(int(part) for part in batches.split(",")):
            # compiling takes a minute a shape, so only the first batch size is compiled
            tried = [mode for mode in names if mode != "compile" or number == 0]
            for row in measure(model, str(spec), batch, prompt, device, repeats, tried):
                rows = [
                    one for one in rows if (one.format, one.batch) != (row.format, row.batch)
                ] + [row]
                if output is not None:  # now, so that a run that is cut short leaves its rows
                    _write(output, size, rows, left_out)
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    Console(width=150).print(
        table_of(rows, names, f"Llama {size} on {race.environment()['gpu'] or 'no GPU'}")
    )
    if left_out:
        print("no time was left for", ", ".join(left_out))


def _read(output: Path | None, size: str) -> list[Row]:
    """Rows of models of this size that earlier processes left in `output`.

    Each format may have a process of its own.
    """
    if output is None or not output.exists():
        return []
    report = json.loads(output.read_text())
    return [Row(**row) for row in report["results"]] if report["size"] == size else []


def _write(output: Path, size: str, rows: list[Row], left_out: list[str]) -> None:
    report = {
        "environment": race.environment(), "size": size, "left_out": left_out,
        "results": [asdict(row) for row in rows],
    }  # fmt: skip
    supervisor.write(output, json.dumps(report, indent=1) + "\n")


def linear_shapes(size: str) -> list[tuple[int, int]]:
    """(N, K) of the linear layers that are quantized."""
    sizes = SIZES[size]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    heads = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    return [(hidden, hidden), (heads, hidden), (inner, hidden), (hidden, inner)]


def quantized(size: str, spec: FormatSpec, backend: str, device: str) -> Any:
    """A model with random weights in the format; for "bf16", torch's own layers.

    One weight of each shape is quantized and copied to all layers of that shape, because quantizing
    all of them takes minutes on a GPU and the speed does not depend on the values.
    """
    model = model_of(size, device)
    if spec.name == "bf16":
        return model
    params = {
        k: min(v, 32) if k == "group_size" and size == "tiny" else v for k, v in spec.params.items()
    }
    packed: dict[tuple[int, int], qk.PackedWeight] = {}
    for name, linear in list(model.model.named_modules()):
        if not isinstance(linear, torch.nn.Linear):
            continue
        shape = (linear.out_features, linear.in_features)
        if shape not in packed:
            packed[shape] = qk.quantize(linear.weight, spec.name, **params)
        fused = qk.formats.get(spec.name).kernel_layout(packed[shape].params)
        layer = qk.QuantLinear(copy.deepcopy(packed[shape]), backend=backend if fused else "auto")
        model.model.set_submodule(name, layer)
    return model


def table_of(rows: list[Row], modes: list[str], title: str) -> Table:
    """Tokens per second, and in brackets the speed against bf16 at the same batch size."""
    table = Table(
        "format", "batch", "prefill", *(f"decode, {mode}" for mode in modes),
        "weights GiB", "peak GiB", title=f"{title}: tokens per second (x bf16)",
    )  # fmt: skip
    plain = {row.batch: row for row in rows if row.format == "bf16"}
    for row in rows:
        base = plain.get(row.batch)

        def cell(value: float | None, against: float | None) -> str:
            if value is None:
                return ""
            return f"{value:.1f}" if against is None else f"{value:.1f} ({value / against:.2f})"

        decodes = [cell(row.decode.get(m), base.decode.get(m) if base else None) for m in modes]
        memory = ["" if v is None else f"{v:.2f}" for v in (row.memory_weights, row.memory_peak)]
        table.add_row(
            row.format,
            str(row.batch),
            cell(row.prefill, base.prefill if base else None),
            *decodes,
            *memory,
        )
    return table


if __name__ == "__main__":
    typer.run(main)
