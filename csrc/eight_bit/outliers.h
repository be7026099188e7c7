// The outlier columns of LLM.int8(): a product in 16 bits of gathered columns.
//
// The quantizing kernel left the list of columns on the device. What codes leave of x in them,
// exactly x for an outlier, whose code is 0, times the codes of W, in chunks of 16 columns of
// mma.m16n8k16.
#pragma once
#include "../ptx/eight_bit.h"
#include "arguments.h"

namespace qk {

constexpr int kColumns = 16;

/// Numbers of two neighbouring columns of the list, -1 past its end.
struct TwoColumns {
    int k[2];
};
QK_DEVICE TwoColumns two_columns(const EightBitArgs& args, int i, int count) {
    TwoColumns both;
    QK_UNROLL
    for (int b = 0; b < 2; b++) {
        both.k[b] = i + b < count ? load_global(args.columns + i + b) : -1;
    }
    return both;
}

/// Codes of row n of W as 16-bit floats, exact.
template <typename T>
QK_DEVICE uint32_t weight_pair(const EightBitArgs& args, int n, const TwoColumns& columns) {
    T both[2] = {};
    QK_UNROLL
    for (int b = 0; b < 2; b++) {
        if (columns.k[b] >= 0 && n < args.n) {
            const uint8_t* at = args.weight + int64_t(n) * args.kp + columns.k[b];
            both[b] = from_float<T>(float(int8_t(load_global(at))));
        }
    }
    return pair(both[0], both[1]);
}
/// What codes leave of row m of x; of outliers alone, everything else 0, with by_element.
template <typename T>
QK_DEVICE uint32_t rest_pair(const EightBitArgs& args, int m, float scale,
                             const TwoColumns& columns) {
    T both[2] = {};
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
            both[b] = from_float<T>(x);
        }
    }
    return pair(both[0], both[1]);
}

QK_DEVICE float scale_of_row(const EightBitArgs& args, int m) {
    return m < args.m ? load_global(args.x_scale + (args.one_scale ? 0 : m)) : 0;
}

/// A number of a vector of the 16-bit type `is_bfloat` tells.
QK_DEVICE float load_16(const void* p, int64_t at, int is_bfloat) {
    return is_bfloat ? to_float(load_global(static_cast<const BFloat*>(p) + at))
                     : to_float(load_global(static_cast<const Half*>(p) + at));
}
QK_DEVICE uint16_t bits_16(float value, int is_bfloat) {
    return is_bfloat ? from_float<BFloat>(value).bits : from_float<Half>(value).bits;
}

}  // namespace qk
