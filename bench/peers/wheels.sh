#!/usr/bin/env bash
# Fetch peers into a folder (ignored by git) for a machine without network:
#     bench/peers/wheels.sh [--only NAME,NAME...] [--list] [FOLDER]        FOLDER: .whl
# For Python 3.12 on x86-64 Linux, without what that machine has: torch, triton, transformers, pytest with xdist
# and timeout, hypothesis, typer, ninja, pybind11, nvcc. Names are those of bench/peers (bitsandbytes, torchao,
# humming, gemlite, gptqmodel, spqr_quant, fast_hadamard). What has no wheel is carried as sources, which
# `bench/gpu_run.sh OUT --part build` compiles. PyPI's sources of fast-hadamard-transform lack the kernels: where
# FAST_HADAMARD is a folder with a checkout of its repository, that is packed instead. The last line says whether it all fits into one call of 64 MiB
# with this checkout; --only leaves the large ones (bitsandbytes: 41 MiB) for a call of their own.
# DeepGEMM is not here: PyPI's deep-gemm is an old one without the headers it compiles with.
set -euo pipefail
cd "$(dirname "$0")/../.."

peers=(bitsandbytes torchao humming gemlite gptqmodel spqr_quant fast_hadamard)
packages_of() { # what a peer needs, as NAME==VERSION or NAME
    case $1 in
        bitsandbytes) echo "bitsandbytes==0.50.2" ;;
        torchao) echo "torchao==0.18.0" ;;
        humming) echo "humming-kernels==0.1.19" ;;
        gemlite) echo "gemlite==0.6.0.post2" ;;
        gptqmodel) echo "gptqmodel==7.7.0 logbar device-smi tokenicer defuser threadpoolctl dill" ;;
        spqr_quant) echo "spqr-quant==0.2.0" ;;
        fast_hadamard) echo "fast-hadamard-transform==1.1.0" ;;
        *) return 1 ;;
    esac
}

folder=.whl only=
while [ $# -gt 0 ]; do
    case $1 in
        --only) only=${2:?--only needs names} && shift 2 ;;
        --list) for peer in "${peers[@]}"; do echo "$peer: $(packages_of "$peer")"; done && exit 0 ;;
        -*) echo "unknown option $1" >&2 && exit 2 ;;
        *) folder=$1 && shift ;;
    esac
done
[ -z "$only" ] || IFS=, read -r -a peers <<<"$only"
mkdir -p "$folder"

platforms=()
for tag in manylinux_2_35 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 \
    manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
pip=("${PYTHON:-python3}" -m pip)
wheel() {
    "${pip[@]}" download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d "$folder" "$1" 2>/dev/null
}
pure() { # sources without a compiled part become a wheel here
    case $1 in gemlite* | gptqmodel* | logbar | device-smi | tokenicer | defuser) ;; *) return 1 ;; esac
    "${pip[@]}" wheel -q --no-deps -w "$folder" "$1" 2>/dev/null
}
sources() { # whose set-up would look for nvcc here
    FAST_HADAMARD_TRANSFORM_SKIP_CUDA_BUILD=TRUE "${pip[@]}" download -q --no-deps --no-binary :all: \
        --no-build-isolation -d "$folder" "$1" 2>/dev/null
}

failed=()
for peer in "${peers[@]}"; do
    wanted=$(packages_of "$peer") || { echo "no peer $peer; --list names them" >&2 && exit 2; }
    for package in $wanted; do
        if [ "$peer" = fast_hadamard ] && [ -n "${FAST_HADAMARD:-}" ]; then
            tar -C "$(dirname "$FAST_HADAMARD")" --exclude .git -czf "$folder/fast_hadamard_transform.tar.gz" \
                "$(basename "$FAST_HADAMARD")" && echo "$peer: $FAST_HADAMARD" && continue
        fi
        if wheel "$package" || pure "$package" || sources "$package"; then
            echo "$peer: $package"
        else
            failed+=("$package")
            echo "$peer: NOT FETCHED: $package" >&2
        fi
    done
done

echo
(cd "$folder" && du -h --apparent-size -- * | sort -h)
carried=$(find "$folder" -type f -printf '%s\n' | awk '{sum += $1} END {print sum + 0}')
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 -r stat -c %s 2>/dev/null |
    awk '{sum += $1} END {print sum + 0}')
total=$(((carried + tree) >> 20))
verdict="fits into"
[ "$total" -lt 64 ] || verdict="IS TOO LARGE FOR"
echo "$folder $((carried >> 20)) MiB + checkout $((tree >> 20)) MiB = $total MiB: $verdict one call of 64 MiB"
[ ${#failed[@]} -eq 0 ] || { echo "not fetched: ${failed[*]}" >&2 && exit 1; }
