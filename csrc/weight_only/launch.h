// From a call's numbers to a kernel. One source file a decoder instantiates it, so that they
// compile side by side.
#pragma once
#include "../ptx/launch.h"
#include "hopper.h"

namespace qk {

using WeightOnlyKernel = void (*)(WeightOnlyArgs);
using HopperKernel = void (*)(HopperArgs);

/// 128 rows of x a block where tiles are long, whose values take the registers of half the sums.
template <typename T, int CODE>
constexpr int kHopperColumns = DecoderOf<T, CODE>::kPairs == 8 ? 128 : 256;

/// The scalers of `Plain`, by how many scales a tile has.
struct AnyPlain {
    template <typename T, int CODE>
    static WeightOnlyKernel find(const WeightOnlyCall& call) {
        const WeightOnlyKernel gemv[] = {
            weight_only_gemv<T, CODE, Plain<0>>, weight_only_gemv<T, CODE, Plain<1>>,
            weight_only_gemv<T, CODE, Plain<2>>, nullptr, weight_only_gemv<T, CODE, Plain<4>>};
        // A tile's two scales are its four, twice each.
        const WeightOnlyKernel gemm[] = {
            weight_only_gemm<T, CODE, Plain<0>>, weight_only_gemm<T, CODE, Plain<1>>,
            weight_only_gemm<T, CODE, Plain<4>>, nullptr, weight_only_gemm<T, CODE, Plain<4>>};
        return call.kernel == 0 ? gemv[call.runs] : gemm[call.runs];
    }
    template <typename T, int CODE>
    static HopperKernel find_hopper(const WeightOnlyCall& call) {
        constexpr int columns = kHopperColumns<T, CODE>;
        const HopperKernel kernels[] = {weight_only_hopper<T, CODE, Plain<0>, columns>,
                                        weight_only_hopper<T, CODE, Plain<1>, columns>,
                                        weight_only_hopper<T, CODE, Plain<4>, columns>, nullptr,
                                        weight_only_hopper<T, CODE, Plain<4>, columns>};
        return kernels[call.runs];
    }
};

/// One scaler only, the one that the codes' formats have. HOPPER: whether with the kernel of
/// hopper.h.
template <typename S, bool HOPPER = !S::kOutliers>
struct Only {
    static_assert(S::kRuns > 0, "");

    /// Whether the weight's runs are whole ones of the scaler.
    template <typename T, int CODE>
    static bool fits(const WeightOnlyCall& call) {
        return call.args.run % (kTile<DecoderOf<T, CODE>> / S::kRuns) == 0;
    }
    template <typename T, int CODE>
    static WeightOnlyKernel find(const WeightOnlyCall& call) {
        if (!fits<T, CODE>(call)) {
            return nullptr;
        }
        return call.kernel == 0 ? WeightOnlyKernel(weight_only_gemv<T, CODE, S>)
                                : WeightOnlyKernel(weight_only_gemm<T, CODE, S>);
    }
    template <typename T, int CODE>
    static HopperKernel find_hopper(const WeightOnlyCall& call) {
        if constexpr (HOPPER) {
            if (fits<T, CODE>(call)) {
                return weight_only_hopper<T, CODE, S, kHopperColumns<T, CODE>>;
            }
        }
        return nullptr;
    }
};

constexpr const char* kUnfit =
    "it is not made for this weight: shorter groups, outliers, or transforms";

template <typename T, int CODE, typename Scalers>
std::string launch_hopper(const WeightOnlyCall& call) {
    constexpr int columns = kHopperColumns<T, CODE>;
    const HopperKernel kernel = Scalers::template find_hopper<T, CODE>(call);
    if (kernel == nullptr) {
        return kUnfit;
    }
    HopperArgs args{call.args, {}};
    const Element element = call.is_bfloat ? Element::bfloat : Element::half;
    const std::string error = describe(args.x, element, call.args.x, call.args.x_stride,
                                       call.args.m, int64_t(call.args.x_stride) * 2, columns);
    if (!error.empty()) {
        return error;
    }
    const Grid grid{call.grid_x, 1, kHopperThreads,
                    HopperShared<DecoderOf<T, CODE>, columns>::kBytes};
    return launch<HopperArgs>(kernel, grid, args, call.stream, call.early != 0);
}

template <typename T, int CODE, typename Scalers>
std::string launch_weight_only(const WeightOnlyCall& call) {
    if (call.kernel == 2) {
        return launch_hopper<T, CODE, Scalers>(call);
    }
    const WeightOnlyKernel kernel = Scalers::template find<T, CODE>(call);
    if (kernel == nullptr) {
        return kUnfit;
    }
    const Grid grid{call.grid_x, call.grid_y, kGemvThreads, call.shared};
    return launch<WeightOnlyArgs>(kernel, grid, call.args, call.stream, call.early != 0);
}

/// Text that stays until the next call of this thread; "" if all is well.
template <int CODE, typename Scalers = AnyPlain>
const char* run_weight_only(const WeightOnlyCall* call) {
    static thread_local std::string error;
    if (call->size != int(sizeof(WeightOnlyCall))) {
        error = "the compiled kernels and the Python code are of different versions";
    } else {
        error = call->is_bfloat ? launch_weight_only<BFloat, CODE, Scalers>(*call)
                                : launch_weight_only<Half, CODE, Scalers>(*call);
    }
    return error.c_str();
}

}  // namespace qk

#ifndef __CUDACC__
#include "../emulation/control.h"
#endif
