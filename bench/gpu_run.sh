#!/usr/bin/env bash
# Everything a machine with a GPU is for: bench/gpu_run.sh OUT [--part PART]...
#   tests  weight_only  eight_bit  gguf  lowbit  peers  model  sanitize  tune
# Each part ends in under 9 minutes, can run alone, and writes into OUT, at most 8 files in all. Needs no
# network: torch, triton and pytest must be there; qkernels itself is used from this checkout. Wheels of
# peers in .whl/ (bench/peers/wheels.sh puts them there) are installed aside.
set -uo pipefail
out=${1:?usage: bench/gpu_run.sh OUT [--part PART]...}
shift
parts=()
while [ "${1:-}" = --part ]; do
    parts+=("${2:?--part needs a name}")
    shift 2
done
[ ${#parts[@]} -gt 0 ] || parts=(tests weight_only eight_bit)
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}

# Installing would need a recent setuptools; a link (ignored by git) gives triton_kernels its name just as well.
[ -e qkernels/triton_kernels ] || ln -s ../triton_kernels qkernels/triton_kernels
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
if compgen -G '.whl/*.whl' >/dev/null && [ ! -d /tmp/site ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site .whl/*.whl
fi
[ -d /tmp/site ] && export PYTHONPATH="$PYTHONPATH:/tmp/site"

race() { # NAME ARGUMENTS...: results, page and log of one race, in three files
    local name=$1
    shift
    timeout 530 "$python" -m bench "$@" --output "/tmp/race-$name" 2>&1 | tee "$out/$name.txt"
    cp "/tmp/race-$name/race.json" "$out/$name.json" && cp "/tmp/race-$name/REPORT.md" "$out/$name.md"
}

nvidia-smi
failed=0
for part in "${parts[@]}"; do
    printf '\n=== %s (%s)\n' "$part" "$(date +%T)"
    case $part in
        tests)
            timeout 530 "$python" -m pytest tests/gpu tests/kernels tests/cuda tests/test_ops.py tests/test_linear.py \
                tests/formats -n 8 -p no:cacheprovider --ignore tests/kernels/test_static.py 2>&1 | tee "$out/tests.txt"
            ;;
        weight_only | eight_bit | gguf | lowbit)
            race "$part" --suite "$part" --shapes square,4096x14336 --rows 1,4,16,64,256,4096 --peers none \
                --backend triton,cuda
            ;;
        peers)
            race peers --suite all --shapes 8192x8192,4096x14336 --rows 1,16,64,256,4096 --peers all
            ;;
        model)
            timeout 530 "$python" -m bench.llm --size 8b --output "$out/llm.json" 2>&1 | tee "$out/llm.txt"
            ;;
        sanitize)
            timeout 530 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m bench --tiny --peers none \
                --rows 1,17 2>&1 | tail -200 | tee "$out/sanitize.txt"
            ;;
        tune)
            QKERNELS_AUTOTUNE=1 QKERNELS_CACHE="$out" race tune --suite weight_only,eight_bit --shapes square \
                --rows 1,64,4096 --peers none
            ;;
        *)
            echo "unknown part $part" >&2
            exit 2
            ;;
    esac || failed=1
done
exit $failed
