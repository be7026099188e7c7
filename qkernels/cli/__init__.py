"""The `qkernels` command, one file per verb.

    info.py inspect.py           formats and kernels of this machine; tensors of a model's files
    quantize.py convert.py       quantize a model; move it to another format
    evaluate.py generate.py      `qkernels eval`: perplexity; continue a prompt
    bench.py                     time the kernels
    common.py                    shared options, loading of models and texts, progress, tables, JSON
    samples.py                   a sample model and sample texts, downloaded on first use

torch and transformers are imported only when a verb runs, so that `--help` is quick.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from . import bench, convert, evaluate, generate, info, inspect, quantize
from .samples import SampleError

app = typer.Typer(
    name="qkernels",
    help="Quantize, inspect, evaluate and run language models with quantized weights.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in (info, inspect, quantize, convert, evaluate, generate, bench):
    _verb.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 with one line on stderr for bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show
        return _run(words)


def _run(words: list[str]) -> int:
    """Run the verb; errors that the user can mend become one line on stderr and exit code 2."""
    try:
        code = app(args=words or ["--help"], standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "qkernels":
            raise
        return _fail(
            f"needs the package {error.name}; pip install 'qkernels[hf,gguf]' has all it needs"
        )
    except (ValueError, OSError, SampleError) as error:
        return _fail(_message(error))
    except Exception as error:
        # Usage errors are click's, or those of the click inside typer, so no class fits both.
        if hasattr(error, "format_message"):
            return _fail(_message(error))
        raise


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    """Print a warning to stderr; our own warnings as one line, without file and line number."""
    text = str(message)
    if not text.startswith("qkernels: "):
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    print(text, file=file or sys.stderr)


def _message(error: BaseException) -> str:
    """The error's text in one line."""
    format_message = getattr(error, "format_message", None)
    text = format_message() if callable(format_message) else str(error)
    return " ".join(text.split()) or type(error).__name__


def _fail(message: str, code: int = 2) -> int:
    """Print an error line to stderr; returns the exit code."""
    print(f"qkernels: error: {message}", file=sys.stderr)
    return code
