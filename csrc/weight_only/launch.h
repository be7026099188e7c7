// Finds and launches the kernel for a call. qkernels/backends/cuda/build.py writes a source file
// for each row of kernels in qkernels/layouts/codecs.py, which instantiates `run_weight_only`
// there.
#pragma once
#include "../ptx/launch.h"
#include "decode.h"
#include "gemm.h"
#include "hopper.h"

namespace qk {

using WeightOnlyKernel = void (*)(WeightOnlyArgs);

/// A kernel of hopper.h, and what its launch needs. columns: rows of x of a block; shared: bytes of
/// shared memory.
struct HopperKernel {
    void (*kernel)(HopperArgs);
    int columns, shared;
    bool row_scale;

    template <typename T, typename D, typename S, bool ROW_SCALE = false>
    static HopperKernel of(const WeightOnlyCall& call) {
        return call.columns == 64 ? with_columns<T, D, S, 64, ROW_SCALE>()
                                  : with_columns<T, D, S, kMostColumns<D, S>, ROW_SCALE>();
    }
    template <typename T, typename D, typename S, int COLUMNS, bool ROW_SCALE>
    static HopperKernel with_columns() {
        return {weight_only_hopper<T, D, S, COLUMNS, ROW_SCALE>, COLUMNS,
                HopperShared<D, COLUMNS>::kBytes, ROW_SCALE};
    }
};

/// The decode kernel's scaler for codes that have only scaler S.
template <typename S>
struct DecodeScaler {
    using Type = S;
};
template <>
struct DecodeScaler<Plain<1>> {
    using Type = Grouped<1, kScale>;
};

/// The decode kernel for the rows of x of the call's blocks, or null.
template <typename T, typename D, typename S>
WeightOnlyKernel decode_kernel(const WeightOnlyCall& call) {
    // SpQR's scales of long tiles take too many registers.
    if constexpr (S::kGroups > 0 && !(S::kOutliers && kTile<D> == 256)) {
        if (call.columns == 1 && call.rows == 16 * kRowTiles<D, S, 0>) {
            return weight_only_decode<T, D, S, 0>;
        }
    }
    if constexpr (kTile<D> < 256) {  // longer tiles of 16 rows of x take too much shared memory
        if (call.columns == 16 && call.rows == 32) {
            return weight_only_decode<T, D, S, 2>;
        }
    }
    return call.columns == 8 && call.rows == 32 ? weight_only_decode<T, D, S, 1> : nullptr;
}

/// A scaler as an argument of a function.
template <typename S>
struct ScalerOf {
    using Type = S;
};

/// Kernels of scales of KINDS: `Grouped` for each kind and number of scale groups in a tile, and
/// `Plain` for groups that are too short or do not follow one another along K, and for scales that
/// `Grouped` does not read.
template <int... KINDS>
struct AnyPlain {
    template <typename T, typename D>
    static WeightOnlyKernel find(const WeightOnlyCall& call) {
        return pick<WeightOnlyKernel>(call, true, [&](auto scaler) -> WeightOnlyKernel {
            using S = typename decltype(scaler)::Type;
            return call.kernel == 0 ? decode_kernel<T, D, S>(call) : weight_only_gemm<T, D, S>;
        });
    }
    template <typename T, typename D>
    static HopperKernel find_hopper(const WeightOnlyCall& call) {
        // Float16 has not all scales in bfloat16, and the kernel multiplies in 16 bits.
        const bool fits = std::is_same<T, BFloat>::value || call.args.scale_type == kFloat16;
        return pick<HopperKernel>(call, fits, [&](auto scaler) {
            return HopperKernel::of<T, D, typename decltype(scaler)::Type>(call);
        });
    }

  private:
    /// make(the call's scaler). fits: whether scales with zero points have the dtype for `Grouped`.
    template <typename Result, typename Make>
    static Result pick(const WeightOnlyCall& call, bool fits, Make make) {
        Result result = make(ScalerOf<Plain<0>>());
        (pick_of<KINDS>(result, call, fits, make), ...);
        return result;
    }
    template <int KIND, typename Result, typename Make>
    static void pick_of(Result& result, const WeightOnlyCall& call, bool fits, Make make) {
        if constexpr (KIND == kGroup || KIND == kScale || KIND == kNested) {
            const WeightOnlyArgs& args = call.args;
            const bool zeros = KIND == kGroup;
            if (args.scaling != KIND || args.slice_group != nullptr ||
                (zeros && (!fits || args.scale_type == kFloat32))) {
                return;
            }
            switch (call.scale_groups) {
                case 1:
                    result = make(ScalerOf<Grouped<1, KIND>>());
                    break;
                case 2:
                    result = make(ScalerOf<Grouped<2, KIND>>());
                    break;
                case 4:
                    result = make(ScalerOf<Grouped<4, KIND>>());
                    break;
                default:
                    break;
            }
        }
    }
};

/// Kernels of one scaler, the only one that these codes have in any format. ROW_SCALE: see
/// weight_only_hopper.
template <typename S, bool ROW_SCALE = false>
struct Only {
    template <typename T, typename D>
    static WeightOnlyKernel find(const WeightOnlyCall& call) {
        static_assert(S::kGroups > 0, "");
        if (call.args.scale_group % (kTile<D> / S::kGroups) != 0) {
            return nullptr;
        }
        return call.kernel == 0 ? decode_kernel<T, D, typename DecodeScaler<S>::Type>(call)
                                : WeightOnlyKernel(weight_only_gemm<T, D, S>);
    }
    template <typename T, typename D>
    static HopperKernel find_hopper(const WeightOnlyCall& call) {
        return HopperKernel::of<T, D, S, ROW_SCALE>(call);
    }
};

template <typename T, typename D, typename Scalers>
std::string launch_weight_only(const WeightOnlyCall& call) {
    // The decode or gemm kernel; null if there is none for groups this short. A Hopper call asks
    // only for this check.
    const WeightOnlyKernel kernel = Scalers::template find<T, D>(call);
    if (kernel == nullptr) {
        return "it is made for longer groups than these, or for other blocks";
    }
    if (call.kernel != 2) {
        const Grid grid{call.grid_x, call.grid_y, call.threads, call.shared};
        return launch<WeightOnlyArgs>(kernel, grid, call.args, call.stream, call.pdl != 0);
    }
    const HopperKernel hopper = Scalers::template find_hopper<T, D>(call);
    if (hopper.row_scale != (call.args.is_float != 0)) {
        return "Hopper's kernel has float32 results for weights with transforms alone";
    }
    if (hopper.row_scale && (call.args.group < call.args.k || call.args.bias != nullptr)) {
        return "Hopper's kernel is made for one scale a row of these weights, and for no bias";
    }
    HopperArgs args{call.args, {}};
    const Element element = call.is_bfloat ? Element::bfloat : Element::half;
    const std::string error =
        encode_tensor_map(args.x, element, call.args.x, call.args.x_stride, call.args.m,
                          int64_t(call.args.x_stride) * 2, hopper.columns);
    const Grid grid{call.grid_x, 1, hopper_threads(kHopperConsumers), size_t(hopper.shared)};
    return !error.empty()
               ? error
               : launch<HopperArgs>(hopper.kernel, grid, args, call.stream, call.pdl != 0);
}

/// Returns an error message, which stays valid until the next call of this thread; "" for success.
/// HALF, BFLOAT: the decoder for each type.
template <typename HALF, typename BFLOAT, typename Scalers>
const char* run_weight_only(const WeightOnlyCall* call) {
    static thread_local std::string error;
    if (call->size != int(sizeof(WeightOnlyCall))) {
        error = "the compiled kernels and the Python code are of different versions";
    } else {
        error = call->is_bfloat ? launch_weight_only<BFloat, BFLOAT, Scalers>(*call)
                                : launch_weight_only<Half, HALF, Scalers>(*call);
    }
    return error.c_str();
}

}  // namespace qk

#ifndef __CUDACC__
#include "../emulation/control.h"
#endif
