// The outlier columns of LLM.int8(): a 16-bit product of gathered columns.
//
// quantize.h wrote the list of columns to device memory. In these columns the residual of x (x
// minus its dequantized code; exactly x for an outlier, whose code is 0) is multiplied by the codes
// of W, in chunks of 16 columns, the K of mma.m16n8k16.
#pragma once
#include "../ptx/eight_bit.h"
#include "arguments.h"

namespace qk {

constexpr int kColumns = 16;

/// Two neighbouring columns of the list, -1 past its end.
struct TwoColumns {
    int k[2];
};
QK_DEVICE TwoColumns two_columns(const EightBitArgs& args, int i, int count) {
    TwoColumns columns;
    QK_UNROLL
    for (int b = 0; b < 2; b++) {
        columns.k[b] = i + b < count ? load_global(args.columns + i + b) : -1;
    }
    return columns;
}

/// Codes of row n of W as 16-bit floats, exact.
template <typename T>
QK_DEVICE uint32_t weight_pair(const EightBitArgs& args, int n, const TwoColumns& columns) {
    T values[2] = {};
    QK_UNROLL
    for (int b = 0; b < 2; b++) {
        if (columns.k[b] >= 0 && n < args.n) {
            const uint8_t* at = args.weight + int64_t(n) * args.kp + columns.k[b];
            values[b] = from_float<T>(float(int8_t(load_global(at))));
        }
    }
    return pair(values[0], values[1]);
}
/// The residual of row m of x; with by_element x itself for outliers, and 0 for everything else.
template <typename T>
QK_DEVICE uint32_t residual_pair(const EightBitArgs& args, int m, float scale,
                                 const TwoColumns& columns) {
    T values[2] = {};
    QK_UNROLL
    for (int b = 0; b < 2; b++) {
        if (columns.k[b] >= 0 && m < args.m) {
            const int k = columns.k[b];
            float x =
                to_float(load_global(static_cast<const T*>(args.x16) + int64_t(m) * args.k + k));
            if (args.by_element) {
                x = fabsf(x) >= args.threshold ? x : 0;
            } else {
                x -= float(int8_t(load_global(args.x + int64_t(m) * args.kp + k))) * scale;
            }
            values[b] = from_float<T>(x);
        }
    }
    return pair(values[0], values[1]);
}

QK_DEVICE float scale_of_row(const EightBitArgs& args, int m) {
    return m < args.m ? load_global(args.x_scale + (args.one_scale ? 0 : m)) : 0;
}

/// Loads an element of the 16-bit type that `is_bfloat` says.
QK_DEVICE float load_16(const void* p, int64_t at, int is_bfloat) {
    return is_bfloat ? to_float(load_global(static_cast<const BFloat*>(p) + at))
                     : to_float(load_global(static_cast<const Half*>(p) + at));
}
QK_DEVICE uint16_t bits_16(float value, int is_bfloat) {
    return is_bfloat ? from_float<BFloat>(value).bits : from_float<Half>(value).bits;
}

}  // namespace qk
