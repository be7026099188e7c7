// Finds and launches the kernel for a call. One source file per kind of code instantiates it, so
// that the files compile in parallel.
#pragma once
#include "../ptx/launch.h"
#include "hopper.h"
#include "quantize.h"

namespace qk {

template <int KIND, bool BLOCKS, typename Rows>
std::string launch_gemv(const EightBitCall& call) {
    const uint32_t blocks = (call.args.n + kGemvBlock - 1) / kGemvBlock;
    const Grid grid{blocks, call.split, kEightThreads, gemv_shared<Rows>()};
    return launch(eight_bit_gemv<KIND, BLOCKS, Rows>, grid, call.args, call.stream, call.pdl != 0);
}
/// The GEMV that quantizes x: one row, up to 4, and up to 8 with scales of tokens.
template <int KIND, bool BLOCKS, typename T, int GRANULARITY>
std::string launch_quantizing(const EightBitCall& call) {
    constexpr bool INT8 = KIND == kInt8;
    if (call.args.m == 1) {
        return launch_gemv<KIND, BLOCKS, QuantizedRows<T, INT8, GRANULARITY, 1>>(call);
    }
    if (call.args.m <= 4) {
        return launch_gemv<KIND, BLOCKS, QuantizedRows<T, INT8, GRANULARITY, 4>>(call);
    }
    if constexpr (GRANULARITY == kToken) {
        if (call.args.m <= 8) {
            return launch_gemv<KIND, BLOCKS, QuantizedRows<T, INT8, GRANULARITY, 8>>(call);
        }
    }
    return "x has more rows than the GEMV quantizes";
}
template <int KIND, bool BLOCKS, typename T>
std::string launch_quantizing(const EightBitCall& call) {
    if constexpr (BLOCKS) {
        return launch_quantizing<KIND, BLOCKS, T, kGroup128>(call);
    } else {
        return call.args.one_scale ? launch_quantizing<KIND, BLOCKS, T, kTensor>(call)
                                   : launch_quantizing<KIND, BLOCKS, T, kToken>(call);
    }
}

template <int KIND, bool BLOCKS, int ROWS>
std::string launch_gemm(const EightBitCall& call) {
    const uint32_t blocks_n = (call.args.n + kTileN - 1) / kTileN;
    const uint32_t blocks_m = (call.args.m + ROWS - 1) / ROWS;
    const Grid grid{blocks_n * blocks_m, call.split, kGemmThreads, Tiling<ROWS>::kShared};
    return launch(eight_bit_gemm<KIND, BLOCKS, ROWS>, grid, call.args, call.stream, call.pdl != 0);
}

template <int KIND, bool BLOCKS>
std::string launch_hopper(const EightBitCall& call) {
    using P = HopperTiling<KIND>;
    EightBitHopperArgs all{call.args, {}, {}};
    const EightBitArgs& a = call.args;
    std::string error = encode_tensor_map(all.x, Element::byte, a.x, a.kp, a.m, a.kp, kHopperM);
    if (error.empty()) {
        error =
            encode_tensor_map(all.weight, Element::byte, a.weight, a.kp, a.n, a.kp, P::kColumns);
    }
    if (!error.empty()) {
        return error;
    }
    return launch(eight_bit_hopper<KIND, BLOCKS>, {call.split, 1, hopper_threads(2), P::kShared},
                  all, call.stream, call.pdl != 0);
}

template <int KIND, bool BLOCKS>
std::string launch_eight_bit(const EightBitCall& call) {
    if (call.rows == 0) {
        return launch_hopper<KIND, BLOCKS>(call);
    }
    if (call.is_gemv && call.args.x == nullptr) {
        return call.args.is_bfloat ? launch_quantizing<KIND, BLOCKS, BFloat>(call)
                                   : launch_quantizing<KIND, BLOCKS, Half>(call);
    }
    if (call.is_gemv) {
        return call.rows == 8 ? launch_gemv<KIND, BLOCKS, StoredRows<1>>(call)
                              : launch_gemv<KIND, BLOCKS, StoredRows<2>>(call);
    }
    return call.rows == 16   ? launch_gemm<KIND, BLOCKS, 16>(call)
           : call.rows == 32 ? launch_gemm<KIND, BLOCKS, 32>(call)
           : call.rows == 64 ? launch_gemm<KIND, BLOCKS, 64>(call)
                             : launch_gemm<KIND, BLOCKS, 128>(call);
}

/// Whether the caller's struct has this build's size; otherwise `error` says so.
template <typename Call>
bool of_this_version(const Call& call, std::string& error) {
    const bool same = call.size == int(sizeof(Call));
    error = same ? "" : "the compiled kernels and the Python code are of different versions";
    return same;
}

/// Returns an error message, which stays valid until the next call of this thread; "" for success.
template <int KIND>
const char* run_eight_bit(const EightBitCall* call) {
    static thread_local std::string error;
    if (of_this_version(*call, error)) {
        if constexpr (KIND == kInt8) {  // which has no scales of blocks
            error = launch_eight_bit<KIND, false>(*call);
        } else {
            error = call->blocks ? launch_eight_bit<KIND, true>(*call)
                                 : launch_eight_bit<KIND, false>(*call);
        }
    }
    return error.c_str();
}

template <bool INT8, int GRANULARITY>
std::string launch_quantize(const QuantizeCall& call) {
    const Grid grid{uint32_t(call.args.m), 1, kRowThreads, kQuantizeShared};
    const auto kernel = call.args.is_bfloat ? quantize_kernel<BFloat, INT8, GRANULARITY>
                                            : quantize_kernel<Half, INT8, GRANULARITY>;
    return launch(kernel, grid, call.args, call.stream, call.pdl != 0);
}

}  // namespace qk

#ifndef __CUDACC__
#include "../emulation/control.h"
#endif
