"""Shared by the verbs: options, models and texts, progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

ModelArgument = Annotated[
    str, typer.Argument(help="A Hugging Face directory, a .gguf file, or the sample smollm2-135m.")
]
TextOption = Annotated[
    str,
    typer.Option(
        "--text", help="Evaluation text: a file, or a sample (macbeth, hamlet, kjv, ...)."
    ),
]
TokensOption = Annotated[
    int, typer.Option("--tokens", min=2, help="How many tokens of the text to use.")
]
WindowOption = Annotated[int, typer.Option("--window", min=2, help="Tokens in one context window.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, float16 or bfloat16 for what is not quantized [the file's]."
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration", help="Calibration text: a file, or a sample; not the evaluation text."
    ),
]
SamplesOption = Annotated[
    int, typer.Option("--samples", min=1, help="Windows of calibration text.")
]
LengthOption = Annotated[int, typer.Option("--length", min=2, help="Tokens in one of them.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the choice of calibration windows.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON to stdout instead of text.")]


def model_path(name: str) -> Path:
    """`name` as a path, or the path of that sample model, downloaded on first use."""
    from . import samples

    path = Path(name)
    if path.exists():
        return path
    if name in samples.model_names():
        status(f"Fetching the sample model {name}")
        return samples.model_path(name)
    raise FileNotFoundError(
        f"{name}: expected a model directory, a .gguf file or a sample "
        f"({', '.join(samples.model_names())}), found nothing there"
    )


def read_text(name: str) -> str:
    """The text of the file `name`, or of that sample, downloaded on first use."""
    from . import samples

    path = Path(name)
    if not path.exists():
        if name not in samples.text_names():
            raise FileNotFoundError(
                f"{name}: expected a text file or a sample ({', '.join(samples.text_names())}), "
                "found nothing there"
            )
        status(f"Fetching the sample text {name}")
        path = samples.text_path(name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#x}"
        ) from None


def text_ids(tokenizer: Any, text: str, count: int, name: str) -> torch.Tensor:
    """The first `count` token ids of a text, int64 (count). ValueError if it has fewer."""
    import torch

    # A token seldom has more than 16 characters, so 1,000 tokens do not need a whole book.
    ids = tokenizer(text[: 64 * count + 1000], verbose=False)["input_ids"][:count]
    if len(ids) < count:
        raise ValueError(
            f"{name}: expected at least {count} tokens, got {len(ids)}; lower --tokens"
        )
    return torch.tensor(ids, dtype=torch.int64)


def calibration_ids(
    tokenizer: Any, name: str, evaluation: str | None, samples: int, length: int, seed: int
) -> torch.Tensor:
    """Token ids (samples, length) of a calibration text, which must not be the evaluation text."""
    from ..quantizers import calibration_ids

    if name == evaluation:
        raise ValueError(
            f"--calibration: expected another text than the evaluation's, got {name} for both"
        )
    return calibration_ids(tokenizer, read_text(name), samples, length, seed)


def pick_device(name: str) -> torch.device:
    """The torch device for --device. Raises ValueError if it is unknown or missing."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device: expected one of {torch.cuda.device_count()} GPUs, got {name!r}"
        )
    return device


def pick_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype for --dtype, None for none. Raises ValueError for an unknown name."""
    import torch

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name is not None and name not in dtypes:
        raise ValueError(f"--dtype: expected one of {', '.join(dtypes)}; got {name!r}")
    return None if name is None else dtypes[name]


def load(name: str, device: str, dtype: str | None, *, packed: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) for a MODEL argument.

    packed: keep the tensors of a GGUF file packed. The samples are dequantized anyway, because they
    stand for unquantized models.
    """
    # Checked before the slow imports and the load.
    torch_device, torch_dtype = pick_device(device), pick_dtype(dtype)
    path = model_path(name)
    from ..checkpoints import load_tokenizer
    from ..checkpoints.gguf import reader as gguf
    from ..models.quantize import load_model

    status(f"Loading {path}")
    quiet_transformers()
    if gguf.is_gguf(path):
        import torch

        if packed and Path(name) == path:
            return load_model(path, torch_device, torch_dtype), load_tokenizer(path)
        return gguf.load_dequantized(path, torch_device, torch_dtype or torch.float32)
    tokenizer = load_tokenizer(path)  # first, because it may be missing and is quick to load
    return load_model(path, torch_device, torch_dtype), tokenizer


def quiet_transformers() -> None:
    """Turn off transformers' log messages and progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def generate(model: Any, tokenizer: Any, prompt: str, count: int, chat: bool = False) -> str:
    """Greedy continuation of a prompt by `count` tokens; the prompt is not repeated."""
    import torch

    text = prompt
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("--chat: expected a tokenizer with a chat template, got one without")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
    if inputs["input_ids"].numel() == 0:
        raise ValueError(f"--prompt: expected text, got {prompt!r}")
    ids, mask = (inputs[key].to(model.device) for key in ("input_ids", "attention_mask"))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=pad
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# ---------------------------------------------------------------------- output
def status(message: str) -> None:
    """One line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, or one line if stderr is no terminal; yields a function (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        status(title)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def write_table(
    title: str | None, columns: list[str], rows: list[list[str]], left: int = 1
) -> None:
    """A table on stdout; the first `left` columns are text, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width; with 200 columns rich does not fold the table at 80.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def markdown_table(columns: list[str], rows: list[list[str]], left: int = 1) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *rows])


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError
