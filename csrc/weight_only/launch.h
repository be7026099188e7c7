// From a call's numbers to a kernel. One source file a decoder instantiates it, so that they
// compile side by side.
#pragma once
#include "../ptx/launch.h"
#include "hopper.h"

namespace qk {

using WeightOnlyKernel = void (*)(WeightOnlyArgs);

/// One of the kernels of hopper.h, with what its launch needs to know.
struct HopperKernel {
    void (*kernel)(HopperArgs);
    int columns, shared;
    bool whole;

    template <typename T, int CODE, typename S, bool WHOLE = false>
    static HopperKernel of() {
        using D = DecoderOf<T, CODE>;
        constexpr int columns = kHopperColumns<D, S>;
        return {weight_only_hopper<T, CODE, S, WHOLE>, columns, HopperShared<D, columns>::kBytes,
                WHOLE};
    }
};

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
        return call.kernel == 0 ? gemv[call.scale_groups] : gemm[call.scale_groups];
    }
    template <typename T, int CODE>
    static HopperKernel find_hopper(const WeightOnlyCall& call) {
        return call.scale_groups == 0   ? HopperKernel::of<T, CODE, Plain<0>>()
               : call.scale_groups == 1 ? HopperKernel::of<T, CODE, Plain<1>>()
                                        : HopperKernel::of<T, CODE, Plain<4>>();
    }
};

/// One scaler only, the one that the codes' formats have. WHOLE: weights with one scale a row and
/// transforms, as the kernel of hopper.h wants to know.
template <typename S, bool WHOLE = false>
struct Only {
    template <typename T, int CODE>
    static WeightOnlyKernel find(const WeightOnlyCall& call) {
        static_assert(S::kGroups > 0, "");
        if (call.args.scale_group % (kTile<DecoderOf<T, CODE>> / S::kGroups) != 0) {
            return nullptr;
        }
        return call.kernel == 0 ? WeightOnlyKernel(weight_only_gemv<T, CODE, S>)
                                : WeightOnlyKernel(weight_only_gemm<T, CODE, S>);
    }
    template <typename T, int CODE>
    static HopperKernel find_hopper(const WeightOnlyCall&) {
        return HopperKernel::of<T, CODE, S, WHOLE>();
    }
};

template <typename T, int CODE, typename Scalers>
std::string launch_weight_only(const WeightOnlyCall& call) {
    // The scalers find a kernel of the other two, or say that they have none for such groups.
    const WeightOnlyKernel kernel = Scalers::template find<T, CODE>(call);
    if (kernel == nullptr) {
        return "it is made for longer groups than these";
    }
    if (call.kernel != 2) {
        const Grid grid{call.grid_x, call.grid_y, kGemvThreads, call.shared};
        return launch<WeightOnlyArgs>(kernel, grid, call.args, call.stream, call.pdl != 0);
    }
    const HopperKernel hopper = Scalers::template find_hopper<T, CODE>(call);
    if (hopper.whole != (call.args.is_float != 0)) {
        return "Hopper's kernel has float32 results for weights with transforms alone";
    }
    if (hopper.whole && (call.args.group < call.args.k || call.args.bias != nullptr)) {
        return "Hopper's kernel is made for one scale a row of these weights, and for no bias";
    }
    HopperArgs args{call.args, {}};
    const Element element = call.is_bfloat ? Element::bfloat : Element::half;
    const std::string error =
        describe(args.x, element, call.args.x, call.args.x_stride, call.args.m,
                 int64_t(call.args.x_stride) * 2, hopper.columns);
    const Grid grid{call.grid_x, 1, kHopperThreads, size_t(hopper.shared)};
    return !error.empty()
               ? error
               : launch<HopperArgs>(hopper.kernel, grid, args, call.stream, call.pdl != 0);
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
