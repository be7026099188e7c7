// How the Hopper kernel scales decoded weights: two neighbouring 16-bit values at a time, rounded
// once.
//
//   bfloat16   scale = high + low, two numbers of T, right to 2^-17. value * low, then one fma with
//              value * high: 2 instructions a pair. Infinite scales give NaN
//   float16    a float16 scale of a file: 1 product a pair
//   else       through float32, because float16 has too few exponents for the parts of any scale,
//              and a minimum would need parts of its own: 5 instructions a pair
#pragma once
#include "tile.h"

namespace qk {

/// How scales of S are applied to values of T: see above.
enum class Scale16 { parts, exact, in_float };
template <typename T, typename S>
constexpr Scale16 scale16() {
    if (S::kHasMin) {
        return Scale16::in_float;
    }
    if (std::is_same<T, BFloat>::value) {
        return Scale16::parts;
    }
    return S::kHalfScales ? Scale16::exact : Scale16::in_float;
}

/// The scale of one row and scale group.
template <typename T, typename S, Scale16 KIND = scale16<T, S>()>
struct PairScale {
    float scale, minimum;
    QK_DEVICE uint32_t of(uint32_t values) const {
        return S::kHasMin ? scaled_less_minimum<T>(values, scale, minimum)
                          : scaled<T>(values, scale, scale);
    }
};
template <typename T, typename S>
struct PairScale<T, S, Scale16::exact> {
    uint32_t scale;
    QK_DEVICE PairScale(float scale, float) : scale(broadcast<T>(scale)) {}
    QK_DEVICE uint32_t of(uint32_t values) const {
        return fma2<T>(values, scale, Magic<T>::kMinusZero);
    }
};
template <typename T, typename S>
struct PairScale<T, S, Scale16::parts> {
    uint32_t high, low;
    QK_DEVICE PairScale(float scale, float) : high(broadcast<T>(scale)) {
        low = broadcast<T>(scale - to_float(low_of<T>(high)));
    }
    QK_DEVICE uint32_t of(uint32_t values) const {
        return fma2<T>(values, high, fma2<T>(values, low, Magic<T>::kMinusZero));
    }
};

}  // namespace qk
