// Instructions on 8-bit codes, and a few others that only the 8-bit kernels use.
#pragma once
#include <cmath>

#include "warp.h"

/// A loop that is not unrolled, because that would take too many registers.
#ifdef __CUDACC__
#define QK_NO_UNROLL _Pragma("unroll 1")
#else
#define QK_NO_UNROLL
#endif

namespace qk {

/// Kinds of 8-bit codes. qkernels/backends/cuda/eight_bit.py has the same numbers.
enum Kind : int { kInt8, kE4M3, kE5M2 };

// ---------------------------------------------------------------- words of the L2
QK_DEVICE uint32_t load_l2(const uint32_t* p) {
#ifdef __CUDACC__
    uint32_t value;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
#else
    return load_global(p);
#endif
}
QK_DEVICE int load_l2(const int* p) { return int(load_l2(reinterpret_cast<const uint32_t*>(p))); }

/// *p |= bits, atomically.
QK_DEVICE void atomic_or(uint32_t* p, uint32_t bits) {
#ifdef __CUDACC__
    asm volatile("red.relaxed.gpu.global.or.b32 [%0], %1;" ::"l"(p), "r"(bits) : "memory");
#else
    emulation::check_aligned(p, 4);
    emulation::check_global(p, 4, true, true);
    *p |= bits;
#endif
}

// ---------------------------------------------------------------- numbers
QK_HOST_DEVICE float round_even(float f) { return rintf(f); }

QK_HOST_DEVICE int count_ones(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}
/// Index of the lowest bit that is set.
QK_HOST_DEVICE int lowest_one(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __ffs(static_cast<int>(bits)) - 1;
#else
    return __builtin_ctz(bits);
#endif
}

/// float32 -> E4M3FN code by integer arithmetic: nearest, half to even, saturating, NaN stays NaN.
QK_HOST_DEVICE uint32_t e4m3_code(float value) {
    const uint32_t bits = float_to_bits(value), size = bits & 0x7FFFFFFF, sign = bits >> 24 & 0x80;
    if (size > 0x7F800000) {
        return sign | 0x7F;
    }
    if (size < 0x3C800000) {  // below 2^-6 codes are multiples of 2^-9, as floats from 2^14 on are
        return sign | (float_to_bits(bits_to_float(size) + 16384.0f) - 0x46800000);
    }
    const uint32_t code = ((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - (120 << 3);
    return sign | (code < 0x7E ? code : 0x7E);
}
/// Two E4M3FN codes, `low` in the lower byte.
QK_HOST_DEVICE uint32_t e4m3_codes(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
#else
    return e4m3_code(low) | e4m3_code(high) << 8;
#endif
}

/// The value of lane (mine - distance), or this lane's own value if there is no such lane.
QK_DEVICE int shuffle_up(int value, uint32_t distance) {
#ifdef __CUDACC__
    return __shfl_up_sync(0xFFFFFFFF, value, distance);
#else
    const uint32_t lane = lane_index();
    return emulation::Machine::get()
        .meet("shfl.up", value)
        .lane(lane < distance ? lane : lane - distance);
#endif
}

// ---------------------------------------------------------------- products of codes
#ifndef __CUDACC__
template <int KIND>
inline float code_value(uint32_t code) {
    code &= 0xFF;
    if (KIND == kInt8) {
        return int8_t(code);
    }
    if (KIND == kE5M2) {
        return to_float(Half{uint16_t(code << 8)});
    }
    if ((code & 0x7F) == 0x7F) {
        return NAN;
    }
    return to_float(Half{uint16_t((code & 0x80) << 8 | (code & 0x7F) << 7)}) * 256;
}

struct CodeOperands {
    uint32_t a[4], b[2];
};
/// The sum in float64 (exact for integers), rounded once.
template <int KIND_A, int KIND_B, typename Sum>
inline void mma_codes_model(Sum (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const CodeOperands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const auto met = emulation::Machine::get().meet("mma.m16n8k32", mine);
    const uint32_t lane = lane_index(), row = lane / 4, column = lane % 4 * 2;
    double sum[4] = {double(acc[0]), double(acc[1]), double(acc[2]), double(acc[3])};
    for (uint32_t j = 0; j < 4; j++) {  // lane j of four holds features 4j.. and 16 + 4j..
        const CodeOperands left = met.lane(row * 4 + j);
        for (uint32_t c = 0; c < 2; c++) {
            const CodeOperands right = met.lane((column + c) * 4 + j);
            for (uint32_t r = 0; r < 2; r++) {
                for (uint32_t h = 0; h < 2; h++) {
                    for (uint32_t i = 0; i < 32; i += 8) {
                        sum[r * 2 + c] += double(code_value<KIND_A>(left.a[h * 2 + r] >> i)) *
                                          code_value<KIND_B>(right.b[h] >> i);
                    }
                }
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        acc[i] = Sum(sum[i]);
    }
}
#endif

/// Four codes -> values exact in float16, features 0 and 1 in `low`. NaN stays NaN.
template <int KIND>
QK_HOST_DEVICE void code_halves(uint32_t codes, uint32_t& low, uint32_t& high) {
    uint32_t pairs[2] = {prmt(codes, 0, 0x1404), prmt(codes, 0, 0x3424)};
    QK_UNROLL
    for (int i = 0; i < 2 && KIND == kE4M3; i++) {
        // A shift right by one bit leaves 2^-8 of the value. The addition carries into the top bit
        // of the exponent only for the bits of NaN.
        uint32_t moved = (pairs[i] & 0x7F007F00) >> 1;
        moved |= (moved + 0x00800080) & 0x40004000;
        pairs[i] = fma2<Half>(moved | (pairs[i] & 0x80008000), 0x5C005C00, 0x80008000);
    }
    low = pairs[0];
    high = pairs[1];
}

/// The product of fp8 codes as products of float16, for GPUs without fp8. The order of the 32
/// features differs from the instruction's, but is the same for both operands.
template <int KIND_A, int KIND_B>
QK_DEVICE void mma_codes_as_half(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    QK_UNROLL
    for (int h = 0; h < 2; h++) {
        uint32_t left[4], right[2];
        code_halves<KIND_A>(a[h * 2], left[0], left[2]);
        code_halves<KIND_A>(a[h * 2 + 1], left[1], left[3]);
        code_halves<KIND_B>(b[h], right[0], right[1]);
        mma<Half>(acc, left, right[0], right[1]);
    }
}

/// mma.sync.m16n8k32: acc (16, 8) += a (16, 32) * b (32, 8). int8 in int32, fp8 in float32.
template <int KIND_A, int KIND_B>
struct MmaCodes;
template <>
struct MmaCodes<kInt8, kInt8> {
    using Sum = int;
    static QK_DEVICE void run(int (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
        mma_codes_model<kInt8, kInt8>(acc, a, b);
#endif
    }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define QK_MMA_FP8(A, B)                                                                \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32." A "." B                       \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif
template <int KIND_A, int KIND_B>
struct MmaCodes {
    using Sum = float;
    static QK_DEVICE void run(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
        if constexpr (KIND_A == kE4M3 && KIND_B == kE4M3) {
            QK_MMA_FP8("e4m3", "e4m3");
        } else if constexpr (KIND_A == kE4M3) {
            QK_MMA_FP8("e4m3", "e5m2");
        } else {
            QK_MMA_FP8("e5m2", "e4m3");
        }
#elif defined(__CUDACC__) || (defined(QK_EMULATED_ARCH) && QK_EMULATED_ARCH < 890)
        mma_codes_as_half<KIND_A, KIND_B>(acc, a, b);
#else
        mma_codes_model<KIND_A, KIND_B>(acc, a, b);
#endif
    }
};
#undef QK_MMA_FP8

}  // namespace qk
