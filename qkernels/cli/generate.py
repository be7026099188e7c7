"""`qkernels generate`: continue a prompt."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from . import common


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    model: common.ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens to add.")
    ] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt in the model's chat template.")
    ] = False,
    device: common.DeviceOption = "auto",
    dtype: common.DtypeOption = None,
    json: common.JsonOption = False,
) -> None:
    """Continue a prompt, greedily.

    Example: qkernels generate ./my-nf4 --prompt "The capital of France is" --max-new-tokens 20
    """
    net, tokenizer = common.load(model, device, dtype, packed=True)
    start = time.perf_counter()
    text = common.generate(net, tokenizer, prompt, max_new_tokens, chat)
    if json:
        seconds = time.perf_counter() - start
        common.write_json(
            {"prompt": prompt, "text": text, "seconds": seconds, "device": str(net.device)}
        )
    else:
        print(text if chat else prompt + text)
