#!/usr/bin/env bash
# Everything a machine with a GPU is for: bench/gpu_run.sh OUT [--tiny] [--seconds S] [--part PART]...
#   build        compile the CUDA extension, and peers that come as sources
#   smoke        every kernel once, right and right every time, in a minute: what comes first
#   tests        correctness on the GPU          sanitize   compute-sanitizer on small shapes
#   first        4-bit and 8-bit at 8192x8192, both backends: what says most, in three minutes
#   weight_only  eight_bit  gguf  lowbit         races of our kernels against torch bf16
#   peers        the same against everybody else's
#   model        whole models, tokens per second  tune      pick Triton configurations on this GPU
#   early        decoding with kernels that start before the last one is done, and without
# Each part ends in under 9 minutes, can run alone, and leaves one or two files in OUT (JSON or text, and a
# page); what is stopped leaves what it measured so far. Pages with pictures: python -m bench.report OUT/*.json,
# on any machine. Without --part: build tests first.
# All parts of one call together end within S seconds (570: a machine's commands may take 600); what does not
# fit any more is said and left out. So a whole lease is, for example,
#     bench/gpu_run.sh $OUT                                         then, while the machine is warm,
#     bench/gpu_run.sh $OUT --part peers --part sanitize            and
#     bench/gpu_run.sh $OUT --part weight_only --part eight_bit --part gguf --part lowbit
# Needs no network: torch, triton, pytest, typer, ninja and pybind11 must be there; qkernels itself is used
# from this checkout. Wheels of peers in .whl/ (bench/peers/wheels.sh puts them there) are installed aside.
# BENCH_ARGS is added to the arguments of every race, such as "--repeats 5".
# --tiny, for a machine without a GPU: every part walks its path with small shapes, in triton's interpreter.
set -uo pipefail
usage='usage: bench/gpu_run.sh OUT [--tiny] [--seconds S] [--part PART]...'
out=${1:?$usage}
shift
parts=() tiny='' seconds=570
while [ $# -gt 0 ]; do
    case $1 in
        --part) parts+=("${2:?--part needs a name}") && shift 2 ;;
        --seconds) seconds=${2:?--seconds needs a number} && shift 2 ;;
        --tiny) tiny=1 && shift ;;
        *) echo "$usage; got $1" >&2 && exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(build tests first)
for part in "${parts[@]}"; do
    case $part in
        build | smoke | tests | first | weight_only | eight_bit | gguf | lowbit | peers | model | sanitize | tune | early) ;;
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
unset TRITON_INTERPRET
[ -z "$tiny" ] || export TRITON_INTERPRET=1

# Installing would need a recent setuptools; a link (ignored by git) gives triton_kernels its name just as well.
[ -e qkernels/triton_kernels ] || ln -sfn ../triton_kernels qkernels/triton_kernels
# A folder for each set of wheels: another call may bring others.
site=${QKERNELS_SITE:-/tmp/site-$( (cd .whl 2>/dev/null && ls -l) | cksum | cut -d' ' -f1)}
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
pip=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --no-warn-script-location --upgrade --target "$site")
if compgen -G '.whl/*.whl' >/dev/null && [ ! -d "$site" ]; then
    "${pip[@]}" .whl/*.whl || for wheel in .whl/*.whl; do # one that does not fit must not keep the others out
        "${pip[@]}" "$wheel" || echo "not installed: $wheel" >&2
    done
fi
export PYTHONPATH="$PYTHONPATH:$site"

left() { # MOST: seconds for a step that may take MOST, of those that this call still has
    local rest=$((seconds - SECONDS - 10))
    echo $((rest < $1 ? rest : $1))
}

race() { # NAME MOST ARGUMENTS...: results and page of one race within MOST seconds; what it said goes to the console
    local name=$1 most status more
    most=$(left "$2")
    shift 2
    [ -z "$tiny" ] || set -- "$@" --tiny --backend triton
    read -r -a more <<<"${BENCH_ARGS:-}" # the last of an option counts, so these may change what a part races
    set -- "$@" --deadline $((most - 15)) --jobs 12 --name "$name" "${more[@]}"
    # Written as it goes: a race that ran out of time leaves what it had. The race ends by itself.
    timeout -k 10 "$most" "$python" -m bench "$@" --output "$out"
}

# shellcheck disable=SC2329 # called by its name
build() {
    local found=0 source
    if [ -n "$tiny" ]; then
        "$python" -c 'from qkernels.backends.cuda import build; print("CUDA kernels:", build.state())'
        return
    fi
    timeout -k 10 "$(left 240)" "$python" -c \
        'from qkernels.backends.cuda import build; print(build.extension().__file__)' || found=1
    if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("gptqmodel") is None)'; then
        timeout -k 10 "$(left 270)" "$python" -c 'from bench.peers import gptqmodel_; gptqmodel_.build()' \
            >"$scratch/marlin.txt" 2>&1 || { tail -5 "$scratch/marlin.txt" && found=1; }
    fi
    for source in .whl/*.tar.gz; do
        [ -e "$source" ] || continue
        FAST_HADAMARD_TRANSFORM_FORCE_BUILD=TRUE NVCC_THREADS=12 timeout -k 10 "$(left 120)" \
            "${pip[@]}" --no-build-isolation "$source" || { echo "not built: $source" >&2 && found=1; }
    done
    return "$found"
}

# shellcheck disable=SC2329 # called by its name
smoke() {
    local most few=()
    most=$(left 150)
    [ -z "$tiny" ] || few=(--tiny --formats nf4 --backends triton)
    timeout -k 10 "$most" "$python" -m bench.smoke --output "$out" --jobs 14 \
        --seconds $((most - 8)) "${few[@]}"
}

# What a GPU is for, the riskiest first: these files take their tensors to it, the others test on the CPU anyway.
gpu_tests=(tests/gpu tests/kernels/test_launch.py tests/cuda/test_launch.py tests/cuda/test_hopper.py tests/cuda/test_weight_only.py tests/cuda/test_eight_bit.py
    tests/cuda/test_transforms.py tests/cuda/test_slices.py tests/kernels/test_weight_only.py
    tests/kernels/test_eight_bit.py tests/kernels/test_decoders.py tests/kernels/test_activations.py
    tests/kernels/test_incoherent.py tests/kernels/test_experts.py tests/test_fused.py tests/test_linear.py
    tests/kernels/test_graphs.py tests/kernels/test_memory.py tests/kernels/test_batch_invariant.py)

# shellcheck disable=SC2329 # called by its name
tests() {
    local chosen=("${gpu_tests[@]}" -n 10 --maxfail 200) status
    [ -z "$tiny" ] || chosen=(tests/bench/test_bench.py -k shapes)
    # A hung kernel: the timeout ends the worker process, and xdist starts another.
    ! "$python" -c 'import pytest_timeout' 2>/dev/null || chosen+=(--timeout 150 --timeout-method thread)
    # Failures are in this file as they happen: with SIGINT pytest still says what it had.
    export QKERNELS_FAILURES="$out/failures.txt"
    rm -f "$QKERNELS_FAILURES"
    timeout -s INT -k 15 "$(left 300)" "$python" -m pytest "${chosen[@]}" -p no:cacheprovider --tb=short \
        >"$out/tests.txt" 2>&1
    status=$?
    [ ! -e "$QKERNELS_FAILURES" ] || { sort "$QKERNELS_FAILURES" | cut -c1-200 | head -25; }
    tail -1 "$out/tests.txt"
    return "$status"
}

# shellcheck disable=SC2329 # called by its name
sanitize() {
    local tool status=0 found run
    if [ -n "$tiny" ]; then
        "$python" -m bench.sanitized --formats nf4 --backends triton --seconds 60
        return
    fi
    tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    for run in memcheck racecheck; do
        # torch's allocator would hide a read behind a tensor's end in a larger block
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 "$(left 250)" "$tool" --tool "$run" --error-exitcode 9 \
            --print-limit 20 "$python" -m bench.sanitized --seconds "$(left 220)" >"$scratch/$run.txt" 2>&1
        found=$?
        [ "$found" -eq 0 ] || status=$found
        { echo "=== $run ended with $found" && cat "$scratch/$run.txt"; } >>"$out/sanitize.txt"
        echo "$run ended with $found" && grep -E '=========|wrong|Error' "$scratch/$run.txt" | head -15
        tail -2 "$scratch/$run.txt"
    done
    return "$status"
}

# shellcheck disable=SC2329 # called by its name
model() {
    local size=${QKERNELS_MODEL_SIZE:-8b} status=0 # or 1b
    local formats=(bf16 gptq:bits=4,group_size=128 fp8:activation=dynamic w8a8 nf4 q4_k) more=(--modes eager,graph,compile)
    [ -z "$tiny" ] || size=tiny formats=(bf16 nf4 w8a8) more=(--backend triton --modes eager,graph)
    for format in "${formats[@]}"; do # a process each: one that fails stops no other
        [ "$(left 200)" -gt 45 ] || { echo "no time was left for $format" && continue; }
        timeout -k 10 "$(left 200)" "$python" -m bench.llm --size "$size" "${more[@]}" --formats "$format" \
            --output "$out/llm-$size.json" || { echo "$format: ended with $?" && status=1; }
    done
    return "$status"
}

[ -n "$tiny" ] || nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu --format=csv
failed=0
for part in "${parts[@]}"; do
    printf '\n=== %s (%s, %s s used)\n' "$part" "$(date +%T)" "$SECONDS"
    if [ "$(left 100)" -lt 40 ]; then
        echo "no time is left for it in this call"
        failed=1
        continue
    fi
    case $part in
        build | smoke | tests | sanitize | model) "$part" ;;
        first)
            race first 300 --suite gptq:bits=4,group_size=128,w8a8,nf4,fp8:activation=dynamic --shapes square \
                --rows 1,16,64,4096 --peers torch --backend cuda,triton
            ;;
        weight_only | eight_bit)
            race "$part" 500 --suite "$part" --shapes square,4096x14336 --rows 1,4,16,64,256,4096 --peers none \
                --backend triton,cuda
            ;;
        gguf)
            race gguf 500 --suite gguf --shapes square,4096x14336 --rows 1,16,64,256,4096 --peers none \
                --backend triton,cuda
            ;;
        lowbit)
            race lowbit 500 --suite lowbit --shapes square --rows 1,16,64,256,4096 --peers none \
                --backend triton,cuda,reference
            ;;
        peers) race peers 520 --suite peers --shapes square --rows 1,16,64,256,4096 --peers all --backend triton,cuda ;;
        early)
            race early 250 --suite gptq:bits=4,group_size=128,q4_k,w8a8,quip_sharp --shapes square,4096x14336 \
                --rows 1,16 --peers none --backend triton
            QKERNELS_EARLY=0 race early-off 250 --suite gptq:bits=4,group_size=128,q4_k,w8a8,quip_sharp --shapes square,4096x14336 \
                --rows 1,16 --peers none --backend triton
            ;;
        tune)
            timeout -k 10 "$(left 530)" "$python" -m bench.tune ${tiny:+--tiny} --seconds "$(left 500)" \
                --output "$out/tuned.jsonl"
            ;;
    esac || failed=1
    printf '%s: %s s used\n' "$part" "$SECONDS"
done
exit $failed
