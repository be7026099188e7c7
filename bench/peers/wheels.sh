#!/usr/bin/env bash
# Fetch peers into .whl/ (ignored by git) for a machine without network: bench/peers/wheels.sh [FOLDER]
# For Python 3.12 on x86-64 Linux, without what they need: torch and triton are there already.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.whl}
mkdir -p "$folder"
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
for name in bitsandbytes==0.50.2 humming-kernels==0.1.19 torchao==0.18.0 pytest-xdist execnet hypothesis sortedcontainers \
    safetensors typer rich markdown-it-py mdurl pygments; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d "$folder" "$name" || echo "not fetched: $name" >&2
done
# Source packages of pure Python become wheels here.
python3 -m pip wheel -q --no-deps --no-build-isolation -w "$folder" gemlite==0.6.0.post2 ||
    python3 -m pip wheel -q --no-deps -w "$folder" gemlite==0.6.0.post2
du -sh "$folder"
