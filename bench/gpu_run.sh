#!/usr/bin/env bash
# Everything a machine with a GPU is for: bench/gpu_run.sh OUT [--tiny] [--part PART]...
#   build        compile the CUDA extension, and peers that come as sources
#   tests        correctness on the GPU          sanitize   compute-sanitizer on small shapes
#   weight_only  eight_bit  gguf  lowbit         races of our kernels against torch bf16, with pictures
#   peers        the same against everybody else's
#   model        whole models, tokens per second  tune      pick Triton configurations on this GPU
# Each part ends in under 9 minutes, can run alone, and leaves at most two files in OUT (JSON or text, and a
# page), so that three parts fit what a machine sends back at once. Without --part: build tests weight_only.
# Needs no network: torch, triton and pytest must be there; qkernels itself is used from this checkout. Wheels
# of peers in .whl/ (bench/peers/wheels.sh puts them there) are installed aside.
# BENCH_ARGS is added to the arguments of every race, such as "--repeats 5".
# --tiny, for a machine without a GPU: every part walks its path with small shapes, in triton's interpreter.
set -uo pipefail
usage='usage: bench/gpu_run.sh OUT [--tiny] [--part PART]...'
out=${1:?$usage}
shift
parts=() tiny=
while [ $# -gt 0 ]; do
    case $1 in
        --part) parts+=("${2:?--part needs a name}") && shift 2 ;;
        --tiny) tiny=1 && shift ;;
        *) echo "$usage; got $1" >&2 && exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(build tests weight_only)
for part in "${parts[@]}"; do
    case $part in
        build | tests | weight_only | eight_bit | gguf | lowbit | peers | model | sanitize | tune) ;;
        *) echo "$usage; no part $part" >&2 && exit 2 ;;
    esac
done
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if [ -z "$tiny" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu_run.sh: no CUDA device is visible; --tiny walks the same path on the CPU" >&2
    exit 3
fi
[ -z "$tiny" ] || export TRITON_INTERPRET=1

# Installing would need a recent setuptools; a link (ignored by git) gives triton_kernels its name just as well.
[ -e qkernels/triton_kernels ] || ln -s ../triton_kernels qkernels/triton_kernels
site=${QKERNELS_SITE:-/tmp/site}
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
pip=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site")
if compgen -G '.whl/*.whl' >/dev/null && [ ! -d "$site" ]; then
    "${pip[@]}" .whl/*.whl
fi
export PYTHONPATH="$PYTHONPATH:$site"

race() { # NAME ARGUMENTS...: results and page of one race; what it said goes to the console
    local name=$1 status more
    shift
    [ -z "$tiny" ] || set -- "$@" --tiny
    read -r -a more <<<"${BENCH_ARGS:-}" # the last of an option counts, so these may change what a part races
    set -- "$@" "${more[@]}"
    timeout 530 "$python" -m bench "$@" --output "$scratch/$name"
    status=$?
    # A race that ran out of time leaves what it had.
    [ ! -e "$scratch/$name/race.json" ] || cp "$scratch/$name/race.json" "$out/$name.json"
    [ ! -e "$scratch/$name/REPORT.md" ] || cp "$scratch/$name/REPORT.md" "$out/$name.md"
    for picture in "$scratch/$name"/*.png; do
        [ ! -e "$picture" ] || { mkdir -p "$out/pictures" && cp "$picture" "$out/pictures/$name-$(basename "$picture")"; }
    done
    return "$status"
}

# shellcheck disable=SC2329 # called by its name
build() {
    local found=0 source
    if [ -n "$tiny" ]; then
        "$python" -c 'from qkernels.backends.cuda import build; print("CUDA kernels:", build.state())'
        return
    fi
    timeout 300 "$python" -c 'from qkernels.backends.cuda import build; print(build.extension().__file__)' || found=1
    for source in .whl/*.tar.gz; do
        [ -e "$source" ] || continue
        FAST_HADAMARD_TRANSFORM_FORCE_BUILD=TRUE timeout 200 "${pip[@]}" --no-build-isolation "$source" ||
            { echo "not built: $source" >&2 && found=1; }
    done
    return "$found"
}

# shellcheck disable=SC2329 # called by its name
tests() {
    local chosen=(tests/gpu tests/kernels tests/cuda tests/test_ops.py tests/test_linear.py tests/formats
        -n 8 --ignore tests/kernels/test_static.py)
    [ -z "$tiny" ] || chosen=(tests/bench/test_bench.py -k shapes)
    timeout 530 "$python" -m pytest "${chosen[@]}" -p no:cacheprovider 2>&1 | tee "$out/tests.txt"
}

# shellcheck disable=SC2329 # called by its name
sanitize() {
    local tool=(compute-sanitizer --tool memcheck --error-exitcode 9)
    [ -z "$tiny" ] || tool=()
    timeout 530 "${tool[@]}" "$python" -m bench --suite gptq:bits=4,nf4,w8a8,q4_k --shapes 72x512 --peers none \
        --rows 1,17 --repeats 1 ${tiny:+--tiny} 2>&1 | tail -200 | tee "$out/sanitize.txt"
}

[ -n "$tiny" ] || nvidia-smi
[ -n "$tiny" ] || nvidia-smi >"$out/gpu.txt"
failed=0
for part in "${parts[@]}"; do
    printf '\n=== %s (%s)\n' "$part" "$(date +%T)"
    case $part in
        build | tests | sanitize) "$part" ;;
        weight_only | eight_bit)
            race "$part" --suite "$part" --shapes square,4096x14336 --rows 1,4,16,64,256,4096 --peers none \
                --backend triton,cuda
            ;;
        gguf) race gguf --suite gguf --shapes square,4096x14336 --rows 1,4,16,64,256,4096 --peers none ;;
        lowbit)
            race lowbit --suite lowbit --shapes square,4096x14336 --rows 1,4,16,64,256,4096 --peers none \
                --backend triton,reference
            ;;
        peers) race peers --suite all --shapes square --rows 1,16,64,256,4096 --peers all ;;
        model)
            size=${QKERNELS_MODEL_SIZE:-8b} # or 1b
            model=(--size "$size" --deadline 400 --modes eager,graph,compile)
            [ -z "$tiny" ] || size=tiny model=(--size tiny --backend triton --modes eager,graph --formats bf16,nf4,w8a8)
            timeout 530 "$python" -m bench.llm "${model[@]}" --output "$out/llm-$size.json"
            ;;
        tune)
            QKERNELS_AUTOTUNE=1 QKERNELS_CACHE="$scratch/cache" race tune --suite weight_only,eight_bit --shapes square \
                --rows 1,64,4096 --peers none
            # one file, not one a problem
            [ ! -d "$scratch/cache/tune" ] || cat "$scratch"/cache/tune/*.json >"$out/tuned.jsonl"
            ;;
    esac || failed=1
done
exit $failed
