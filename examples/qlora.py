"""QLoRA on the CPU or a GPU: train LoRA adapters on top of an NF4 model. Needs `pip install peft`.

    python examples/qlora.py --steps 40 --report bench/results/qlora.md

Fine-tunes SmolLM2-135M on Hamlet, except its last part, which measures what the model learnt.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import qkernels as qk
from qkernels import checkpoints
from qkernels.cli import samples
from qkernels.integrations.peft import with_quant_linear


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="a sample, a model directory or a .gguf file"
    )
    parser.add_argument("--text", default="hamlet", help="a sample or a text file")
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    torch.manual_seed(0)

    path = (
        samples.model_path(args.model) if args.model in samples.model_names() else Path(args.model)
    )
    text = samples.text_path(args.text) if args.text in samples.text_names() else Path(args.text)
    tokenizer = checkpoints.load_tokenizer(path)
    ids = torch.tensor(tokenizer(text.read_text(), verbose=False)["input_ids"])
    windows = ids[: len(ids) // args.length * args.length].view(-1, args.length).to(args.device)
    held_out = windows[-16:]
    training = windows[:-16]

    model = qk.load_model(path, device=args.device)
    qk.quantize_model(model, args.format)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    model = get_peft_model(model, with_quant_linear(config, model))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=0)

    before = evaluate(model, held_out)
    losses = []
    start = time.perf_counter()
    for step in range(args.steps):
        batch = training[torch.randint(len(training), (args.batch,))]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    seconds = time.perf_counter() - start
    after = evaluate(model, held_out)

    packed = qk.models.quantize.model_summary(model)
    fifth = max(1, args.steps // 5)
    means = [
        sum(losses[i : i + fifth]) / len(losses[i : i + fifth]) for i in range(0, args.steps, fifth)
    ]
    lines = [
        "# QLoRA fine-tune",
        "",
        f"`python examples/qlora.py --model {args.model} --text {args.text} --format {args.format} "
        f"--steps {args.steps} --batch {args.batch} --length {args.length} --rank {args.rank} --lr "
        f"{args.lr}`",
        "",
        f"{args.model}, {packed.quantized_layers} linears in {args.format} "
        f"({packed.bits_per_weight:.3f} bits per weight, frozen), "
        f"{sum(p.numel() for p in trainable):,} trained parameters; torch {torch.__version__} on "
        f"{args.device}, {seconds / args.steps:.1f} s a step.",
        "",
        "| steps | mean training loss |",
        "| --- | ---: |",
        *(
            f"| {i * fifth + 1} to {min(args.steps, (i + 1) * fifth)} | {mean:.4f} |"
            for i, mean in enumerate(means)
        ),
        "",
        f"Loss on {held_out.numel()} tokens at the end of the text, which training does not see: "
        f"{before:.4f} before, {after:.4f} after.",
    ]
    report = "\n".join(lines) + "\n"
    print(report)
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(report)


@torch.no_grad()
def evaluate(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Mean loss per token, computed four windows at a time."""
    model.eval()
    losses = [model(part, labels=part).loss.item() * len(part) for part in windows.split(4)]
    model.train()
    return sum(losses) / len(windows)


if __name__ == "__main__":
    main()
