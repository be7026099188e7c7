// Instructions that the 32 lanes of a warp execute together.
#pragma once
#include "arithmetic.h"
#include "memory.h"

namespace qk {

QK_DEVICE uint32_t lane_index() { return thread_index() % 32; }
QK_DEVICE uint32_t warp_index() { return thread_index() / 32; }

/// The same, in a way that tells the compiler that all lanes have the same value.
QK_DEVICE uint32_t uniform_warp_index() {
#ifdef __CUDACC__
    return __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
#else
    return warp_index();
#endif
}

/// The value of lane (mine ^ mask).
QK_DEVICE uint32_t shuffle_xor(uint32_t value, uint32_t mask) {
#ifdef __CUDACC__
    return __shfl_xor_sync(0xFFFFFFFF, value, mask);
#else
    return emulation::Machine::get().meet("shfl.bfly", value).lane(lane_index() ^ mask);
#endif
}
QK_DEVICE float shuffle_xor(float value, uint32_t mask) {
    return bits_to_float(shuffle_xor(float_to_bits(value), mask));
}
/// The value of lane `from`.
QK_DEVICE uint32_t shuffle_from(uint32_t value, uint32_t from) {
#ifdef __CUDACC__
    return __shfl_sync(0xFFFFFFFF, value, from);
#else
    return emulation::Machine::get().meet("shfl.idx", value).lane(from);
#endif
}
QK_DEVICE float shuffle_from(float value, uint32_t from) {
    return bits_to_float(shuffle_from(float_to_bits(value), from));
}
/// The value, in a register that stays: the compiler cannot know it, and so not compute it again.
QK_DEVICE uint32_t kept(uint32_t value) {
#ifdef __CUDACC__
    uint32_t same;
    asm volatile("shfl.sync.bfly.b32 %0, %1, 0, 31, 0xFFFFFFFF;" : "=r"(same) : "r"(value));
    return same;
#else
    return value;
#endif
}
/// The same for an address in shared memory.
template <typename P>
QK_DEVICE P* kept(P* p) {
#ifdef __CUDACC__
    const uint32_t at = kept(static_cast<uint32_t>(__cvta_generic_to_shared(p)));
    return static_cast<P*>(__cvta_shared_to_generic(at));
#else
    return p;
#endif
}
/// The same for a value that all lanes have. Other numbers `copy` give other registers.
QK_DEVICE uint32_t kept_in_all(uint32_t value, uint32_t copy = 0) {
#ifdef __CUDACC__
    return shuffle_from(value + lane_index() - copy, copy);
#else
    (void)copy;
    return value;
#endif
}

/// The largest value of the warp's lanes.
QK_DEVICE uint32_t warp_largest(uint32_t value) {
#ifdef __CUDACC__
    return __reduce_max_sync(0xFFFFFFFF, value);
#else
    const auto met = emulation::Machine::get().meet("redux.max", value);
    for (uint32_t i = 0; i < 32; i++) {
        value = met.lane(i) > value ? met.lane(i) : value;
    }
    return value;
#endif
}
/// Bit i: whether lane i's predicate holds.
QK_DEVICE uint32_t ballot(bool predicate) {
#ifdef __CUDACC__
    return __ballot_sync(0xFFFFFFFF, predicate);
#else
    const auto met = emulation::Machine::get().meet("vote.ballot", predicate);
    uint32_t bits = 0;
    for (uint32_t i = 0; i < 32; i++) {
        bits |= uint32_t(met.lane(i)) << i;
    }
    return bits;
#endif
}

/// ldmatrix: loads four 8x8 matrices of 16 bits. Lanes 8i..8i+7 point at the rows of matrix i; lane
/// l gets elements 2(l % 4) and the next of row l / 4 of each.
QK_DEVICE void load_matrix(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC__
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
#else
    emulation::check_aligned(row, 16);
    const auto met = emulation::Machine::get().meet("ldmatrix", row);
    for (uint32_t i = 0; i < 4; i++) {
        const auto* from = static_cast<const uint32_t*>(met.lane(i * 8 + lane_index() / 4));
        emulation::note_shared_read(from + lane_index() % 4, 4);
        out[i] = from[lane_index() % 4];
    }
#endif
}

#ifndef __CUDACC__
template <typename T>
struct MmaOperands {
    uint32_t a[4], b[2];
};
template <typename T>
inline void mma_model(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const MmaOperands<T> mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const auto met = emulation::Machine::get().meet("mma.m16n8k16", mine);
    const uint32_t lane = lane_index(), row = lane / 4, column = lane % 4 * 2;
    double sum[4] = {acc[0], acc[1], acc[2], acc[3]};
    for (uint32_t j = 0; j < 4; j++) {  // lane j of four holds features 2j, 2j+1, 2j+8, 2j+9
        const auto left = met.lane(row * 4 + j);
        for (uint32_t c = 0; c < 2; c++) {
            const auto right = met.lane((column + c) * 4 + j);
            for (uint32_t r = 0; r < 2; r++) {
                for (uint32_t h = 0; h < 2; h++) {
                    const uint32_t w = left.a[h * 2 + r], x = right.b[h];
                    sum[r * 2 + c] += double(to_float(low_of<T>(w))) * to_float(low_of<T>(x)) +
                                      double(to_float(high_of<T>(w))) * to_float(high_of<T>(x));
                }
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        acc[i] = float(sum[i]);
    }
}
#endif
/// mma.sync.m16n8k16, float32 accumulators: acc (16, 8) += a (16, 16) * b (16, 8).
template <typename T>
QK_DEVICE void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
QK_DEVICE void mma<Half>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_model<Half>(acc, a, b0, b1);
#endif
}
template <>
QK_DEVICE void mma<BFloat>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_model<BFloat>(acc, a, b0, b1);
#endif
}

}  // namespace qk
