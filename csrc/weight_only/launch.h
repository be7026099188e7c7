// From a call's numbers to a kernel. One source file a decoder instantiates it, so that they
// compile side by side.
#pragma once
#include "../ptx/launch.h"
#include "hopper.h"

namespace qk {

/// 128 rows of x a block where tiles are long, whose values take the registers of half the sums.
template <typename T, int CODE>
constexpr int kHopperColumns = DecoderOf<T, CODE>::kPairs == 8 ? 128 : 256;

template <typename T, int CODE>
std::string launch_hopper(const WeightOnlyCall& call) {
    constexpr int columns = kHopperColumns<T, CODE>;
    HopperArgs args{call.args, {}};
    const Element element = call.is_bfloat ? Element::bfloat : Element::half;
    const std::string error = describe(args.x, element, call.args.x, call.args.x_stride,
                                       call.args.m, int64_t(call.args.x_stride) * 2, columns);
    if (!error.empty()) {
        return error;
    }
    const Grid grid{call.grid_x, 1, kHopperThreads,
                    HopperShared<DecoderOf<T, CODE>, columns>::kBytes};
    void (*const kernels[])(HopperArgs) = {
        weight_only_hopper<T, CODE, 0, columns>, weight_only_hopper<T, CODE, 1, columns>,
        weight_only_hopper<T, CODE, 4, columns>, nullptr, weight_only_hopper<T, CODE, 4, columns>};
    return launch<HopperArgs>(kernels[call.runs], grid, args, call.stream, call.early != 0);
}

template <typename T, int CODE>
std::string launch_weight_only(const WeightOnlyCall& call) {
    if (call.kernel == 2) {
        return launch_hopper<T, CODE>(call);
    }
    const Grid grid{call.grid_x, call.grid_y, kGemvThreads, call.shared};
    void (*const gemv[])(WeightOnlyArgs) = {
        weight_only_gemv<T, CODE, 0>, weight_only_gemv<T, CODE, 1>, weight_only_gemv<T, CODE, 2>,
        nullptr, weight_only_gemv<T, CODE, 4>};
    // A tile's two scales are its four, twice each.
    void (*const gemm[])(WeightOnlyArgs) = {
        weight_only_gemm<T, CODE, 0>, weight_only_gemm<T, CODE, 1>, weight_only_gemm<T, CODE, 4>,
        nullptr, weight_only_gemm<T, CODE, 4>};
    const auto kernel = call.kernel == 0 ? gemv[call.runs] : gemm[call.runs];
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
