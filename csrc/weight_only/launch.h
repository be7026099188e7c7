// From a call's numbers to a kernel. One source file a decoder instantiates it, so that they
// compile side by side.
#pragma once
#include "../ptx/launch.h"
#include "gemm.h"

namespace qk {

template <typename T, int CODE>
std::string launch_weight_only(const WeightOnlyCall& call) {
    void (*kernel)(WeightOnlyArgs);
    if constexpr (DecoderOf<T, CODE>::kOneScale) {
        if (call.runs != 1) {
            return "this decoder is for weights of one scale";
        }
        kernel = call.kernel == 0 ? weight_only_gemv<T, CODE, 1> : weight_only_gemm<T, CODE, 1>;
    } else {
        void (*const gemv[])(WeightOnlyArgs) = {
            weight_only_gemv<T, CODE, 0>, weight_only_gemv<T, CODE, 1>,
            weight_only_gemv<T, CODE, 2>, nullptr, weight_only_gemv<T, CODE, 4>};
        // A tile's two scales are its four, twice each.
        void (*const gemm[])(WeightOnlyArgs) = {
            weight_only_gemm<T, CODE, 0>, weight_only_gemm<T, CODE, 1>,
            weight_only_gemm<T, CODE, 4>, nullptr, weight_only_gemm<T, CODE, 4>};
        kernel = call.kernel == 0 ? gemv[call.runs] : gemm[call.runs];
    }
    const Grid grid{call.grid_x, call.grid_y, kThreads, call.shared};
    return launch<WeightOnlyArgs>(kernel, grid, call.args, call.stream, call.early != 0);
}

/// Text that stays until the next call of this thread; "" if all is well.
template <int CODE>
const char* run_weight_only(const WeightOnlyCall* call) {
    static thread_local std::string error;
    if (call->size != int(sizeof(WeightOnlyCall))) {
        error = "the compiled kernels and the Python code are of different versions";
    } else {
        error = call->is_bfloat ? launch_weight_only<BFloat, CODE>(*call)
                                : launch_weight_only<Half, CODE>(*call);
    }
    return error.c_str();
}

}  // namespace qk

#ifndef __CUDACC__
#include "../emulation/control.h"
#endif
