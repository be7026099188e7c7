// From a call's numbers to a kernel. One source file a decoder instantiates it, so that they
// compile side by side.
#pragma once
#include "../ptx/launch.h"
#include "gemm.h"

namespace qk {

using WeightOnlyKernel = void (*)(WeightOnlyArgs);

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
};

/// One scaler only, the one that the codes' formats have.
template <typename S>
struct Only {
    template <typename T, int CODE>
    static WeightOnlyKernel find(const WeightOnlyCall& call) {
        static_assert(S::kRuns > 0, "");
        if (call.args.run % (kTile<DecoderOf<T, CODE>> / S::kRuns) != 0) {
            return nullptr;
        }
        return call.kernel == 0 ? WeightOnlyKernel(weight_only_gemv<T, CODE, S>)
                                : WeightOnlyKernel(weight_only_gemm<T, CODE, S>);
    }
};

/// Text that stays until the next call of this thread; "" if all is well.
template <int CODE, typename Scalers = AnyPlain>
const char* run_weight_only(const WeightOnlyCall* call) {
    static thread_local std::string error;
    if (call->size != int(sizeof(WeightOnlyCall))) {
        error = "the compiled kernels and the Python code are of different versions";
        return error.c_str();
    }
    const auto kernel = call->is_bfloat ? Scalers::template find<BFloat, CODE>(*call)
                                        : Scalers::template find<Half, CODE>(*call);
    if (kernel == nullptr) {
        error = "it is made for longer groups than these";
        return error.c_str();
    }
    const Grid grid{call->grid_x, call->grid_y, kGemvThreads, call->shared};
    error = launch<WeightOnlyArgs>(kernel, grid, call->args, call->stream, call->early != 0);
    return error.c_str();
}

}  // namespace qk

#ifndef __CUDACC__
#include "../emulation/control.h"
#endif
