"""Tokens per second of a Llama-shaped model with random weights, by format: prefill and decode, memory held.

    python -m bench.llm --size 1b --formats "bf16,gptq:bits=4,group_size=128,nf4" --output llm.json
    TRITON_INTERPRET=1 python -m bench.llm --size tiny     the same path without a GPU

Decode is one token at a time with a static key-value cache, replayed from a CUDA graph.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import qkernels as qk
from qkernels.benchmark import race, timing
from qkernels.presets import parse_specs

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


@dataclass
class Row:
    """tokens per second; `memory`: GiB of weights and of everything at its highest."""

    format: str
    batch: int
    prompt: int
    prefill: float
    decode: float
    memory_weights: float | None
    memory_peak: float | None


def model_of(size: str, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], max_position_embeddings=8192, tie_word_embeddings=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def seconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    if device == "cuda":
        return timing.of_samples([timing._seconds(run) for _ in range(repeats)]).median
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(model: Any, label: str, batch: int, prompt: int, device: str, repeats: int) -> Row:
    from transformers import StaticCache

    gib = 2**30
    weights = torch.cuda.memory_allocated() / gib if device == "cuda" else None
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=device)
    model(ids, use_cache=False, logits_to_keep=1)  # compiles kernels, prepacks weights
    prefill = seconds(lambda: model(ids, use_cache=False, logits_to_keep=1), device, repeats)
    cache = StaticCache(config=model.config, max_cache_len=prompt + 8)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token, where = ids[:, :1].clone(), torch.tensor([prompt], device=device)

    def step() -> Any:
        return model(
            token, past_key_values=cache, use_cache=True, position_ids=where[None], cache_position=where
        )

    step()
    run = timing.graph_of([step]).replay if device == "cuda" else step
    run()
    decode = seconds(run, device, repeats)
    peak = torch.cuda.max_memory_allocated() / gib if device == "cuda" else None
    return Row(label, batch, prompt, batch * prompt / prefill, batch / decode, weights, peak)


def main(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "1b",
    formats: str = "bf16,gptq:bits=4,group_size=128,nf4,w8a8,fp8:activation=dynamic",
    batches: str = "1,16",
    prompt: int = 1024,
    repeats: int = 10,
    backend: str = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    if size not in SIZES:
        raise typer.BadParameter(f"--size: expected one of {', '.join(SIZES)}, got {size!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        prompt, batches = min(prompt, 16), "1"
    rows = []
    for spec in parse_specs(formats):
        model = model_of(size, device)
        params = {
            k: min(v, 32) if k == "group_size" and size == "tiny" else v for k, v in spec.params.items()
        }
        qk.quantize_model(model, spec.name, progress=False, **params)
        for module in model.modules():
            if isinstance(module, qk.QuantLinear):
                module.backend = (
                    backend if qk.formats.get(spec.name).kernel_layout(module.packed.params) else "auto"
                )
        for batch in (int(part) for part in batches.split(",")):
            rows.append(measure(model, str(spec), batch, prompt, device, repeats))
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    table = Table("format", "batch", "prefill tokens/s", "decode tokens/s", "weights GiB", "peak GiB")
    for row in rows:
        memory = ["" if v is None else f"{v:.2f}" for v in (row.memory_weights, row.memory_peak)]
        table.add_row(row.format, str(row.batch), f"{row.prefill:.0f}", f"{row.decode:.1f}", *memory)
    Console(width=120).print(table)
    if output is not None:
        report = {"environment": race.environment(), "size": size, "results": [asdict(row) for row in rows]}
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
