// Arithmetic on registers: bit logic, bytes, 16-bit floats in pairs.
#pragma once
#include <type_traits>

#include "target.h"

namespace qk {

/// lop3: any function of three bits, TABLE's bit (4a + 2b + c).
template <int TABLE>
QK_HOST_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return d;
#else
    uint32_t d = 0;
    for (int i = 0; i < 8; i++) {
        if (TABLE >> i & 1) {
            d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        }
    }
    return d;
#endif
}
/// (a & b) | c
constexpr int kAndOr = (0xF0 & 0xCC) | 0xAA;

/// prmt: byte i of the result is byte (nibble i of `pick`) & 7 of {b, a}.
QK_HOST_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t pick) {
#ifdef __CUDA_ARCH__
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(pick));
    return d;
#else
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t d = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t nibble = pick >> 4 * i & 15;
        uint32_t byte = bytes >> 8 * (nibble & 7) & 0xFF;
        if (nibble & 8) {
            byte = byte & 0x80 ? 0xFF : 0;  // copies of the sign
        }
        d |= byte << 8 * i;
    }
    return d;
#endif
}

/// The high 32 bits of a product.
QK_HOST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return __umulhi(a, b);
#else
    return uint32_t(uint64_t(a) * b >> 32);
#endif
}

QK_HOST_DEVICE float bits_to_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
QK_HOST_DEVICE uint32_t float_to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

QK_HOST_DEVICE float to_float(float v) { return v; }
QK_HOST_DEVICE float to_float(BFloat v) { return bits_to_float(uint32_t(v.bits) << 16); }
QK_HOST_DEVICE float to_float(Half v) {
#ifdef __CUDA_ARCH__
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
#else
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7FFF;
    if (rest >= 0x7C00) {
        return bits_to_float(sign | 0x7F800000 | rest << 13);
    }
    // One exact multiplication adjusts the exponent, and makes subnormal numbers right, too.
    const float f = bits_to_float(rest << 13) * bits_to_float((127 + 112) << 23);
    return bits_to_float(sign | float_to_bits(f));
#endif
}

/// Round to nearest, ties to even.
template <typename T>
QK_HOST_DEVICE T from_float(float f);
template <>
QK_HOST_DEVICE BFloat from_float<BFloat>(float f) {
#ifdef __CUDA_ARCH__
    BFloat v;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
    return v;
#else
    const uint32_t bits = float_to_bits(f);
    if (f != f) {
        return {uint16_t(bits >> 16 | 0x40)};
    }
    return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
#endif
}
template <>
QK_HOST_DEVICE Half from_float<Half>(float f) {
#ifdef __CUDA_ARCH__
    Half v;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
    return v;
#else
    const uint32_t bits = float_to_bits(f), rest = bits & 0x7FFFFFFF;
    const uint16_t sign = bits >> 16 & 0x8000;
    if (rest > 0x7F800000) {
        return {uint16_t(sign | 0x7FFF)};
    }
    if (rest >= 0x47800000) {
        return {uint16_t(sign | 0x7C00)};
    }
    if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits
        const float shifted = bits_to_float(rest) + 0.5f;
        return {uint16_t(sign | (float_to_bits(shifted) - 0x3F000000))};
    }
    const uint32_t rounded = rest - (112u << 23) + 0xFFF + (rest >> 13 & 1);
    return {uint16_t(sign | rounded >> 13)};
#endif
}

/// Two neighbouring elements in one register, `low` first.
template <typename T>
QK_HOST_DEVICE uint32_t pair(T low, T high) {
    return low.bits | uint32_t(high.bits) << 16;
}
template <typename T>
QK_HOST_DEVICE T low_of(uint32_t bits) {
    return {uint16_t(bits & 0xFFFF)};
}
template <typename T>
QK_HOST_DEVICE T high_of(uint32_t bits) {
    return {uint16_t(bits >> 16)};
}

/// Two float32, rounded to nearest even, as a pair.
template <typename T>
QK_HOST_DEVICE uint32_t round_pair(float low, float high);
template <>
QK_HOST_DEVICE uint32_t round_pair<Half>(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
#else
    return pair(from_float<Half>(low), from_float<Half>(high));
#endif
}
template <>
QK_HOST_DEVICE uint32_t round_pair<BFloat>(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
#else
    return pair(from_float<BFloat>(low), from_float<BFloat>(high));
#endif
}

#ifndef __CUDA_ARCH__
template <typename T>
inline uint32_t fma2_model(uint32_t a, uint32_t b, uint32_t c) {
    // In float64, then rounded to float32 and to T: exact for all values that decoders use.
    const double low =
        double(to_float(low_of<T>(a))) * to_float(low_of<T>(b)) + to_float(low_of<T>(c));
    const double high =
        double(to_float(high_of<T>(a))) * to_float(high_of<T>(b)) + to_float(high_of<T>(c));
    return pair(from_float<T>(float(low)), from_float<T>(float(high)));
}
#endif
/// a * b + c for both halves, rounded once.
template <typename T>
QK_HOST_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
QK_HOST_DEVICE uint32_t fma2<Half>(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return fma2_model<Half>(a, b, c);
#endif
}
template <>
QK_HOST_DEVICE uint32_t fma2<BFloat>(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return fma2_model<BFloat>(a, b, c);
#endif
}

/// The larger sizes |.| of the lower and of the upper halves of `sizes` and of `values`. `sizes`
/// has no signs; NaN is largest.
template <typename T>
QK_HOST_DEVICE uint32_t larger_sizes(uint32_t sizes, uint32_t values) {
    values &= 0x7FFF7FFF;
#ifdef __CUDA_ARCH__
    uint32_t d;
    if (std::is_same<T, BFloat>::value) {
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(sizes), "r"(values));
    } else {
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(sizes), "r"(values));
    }
    return d;
#else
    // Without signs the bits of 16-bit floats have the order of the numbers.
    const uint32_t low = (values & 0xFFFF) > (sizes & 0xFFFF) ? values : sizes;
    const uint32_t high = values >> 16 > sizes >> 16 ? values : sizes;
    return (low & 0xFFFF) | (high & 0xFFFF0000);
#endif
}

}  // namespace qk
