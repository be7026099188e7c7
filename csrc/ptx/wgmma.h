// wgmma: products of a warpgroup, 64 rows of the first operand by N of the second, asynchronous.
//
// Operands in shared memory are rows of 128 bytes with K innermost, swizzled as copy_box writes
// them. Thread (warp w of four, q, j) has the sums of rows 16w + q and 16w + q + 8: sums[4i + 2h +
// b] is row q + 8h, column 8i + 2j + b. A first operand in registers is that of mma.m16n8k16.
#pragma once
#include <type_traits>

#include "eight_bit.h"
#include "hopper.h"

namespace qk {

/// Matrix descriptor of an operand in shared memory: the address's bits, and the layout of its
/// rows.
struct Operand {
    uint64_t bits;
};
QK_DEVICE Operand operand_at(const void* rows) {
#ifndef __CUDACC__
    return {reinterpret_cast<uint64_t>(rows)};
#else
    // Bits 0-13: address / 16; 32-45: bytes between groups of 8 rows / 16; 62: 128-byte swizzle.
    return {uint64_t(shared_address(rows) >> 4 & 0x3FFF) | uint64_t(1) << 16 |
            uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62};
#endif
}
/// The operand `bytes` further along K.
QK_DEVICE Operand further(Operand o, uint32_t bytes) {
#ifndef __CUDACC__
    return {o.bits + bytes};
#else
    return {o.bits + (bytes >> 4)};
#endif
}

/// Required before a product whose registers other instructions have written.
QK_DEVICE void product_fence() {
#if defined(__CUDACC__) && QK_HOPPER
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#elif defined(__CUDACC__)
    not_for_this_gpu();
#endif
}
QK_DEVICE void product_commit() {
#ifndef __CUDACC__
    emulation::product_commit();
#elif QK_HOPPER
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    not_for_this_gpu();
#endif
}
/// Waits until at most GROUPS of the committed groups are in flight.
template <int GROUPS>
QK_DEVICE void product_wait() {
#ifndef __CUDACC__
    emulation::product_wait(GROUPS);
#elif QK_HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#else
    not_for_this_gpu();
#endif
}

/// After the wait for the products that add to `sums`: the compiler must not move a read of them to
/// before the wait, because it knows of no tie between the two. No instruction.
template <typename Sum, int COUNT>
QK_DEVICE void sums_ready(Sum (&sums)[COUNT]) {
#ifdef __CUDACC__
    QK_UNROLL
    for (int i = 0; i < COUNT; i++) {
        if constexpr (std::is_same<Sum, float>::value) {
            asm volatile("" : "+f"(sums[i])::"memory");
        } else {
            asm volatile("" : "+r"(sums[i])::"memory");
        }
    }
#else
    (void)sums;
#endif
}

#ifndef __CUDACC__
/// The 32 bytes along K of row `row` of an operand, as one product reads them.
inline void operand_row(unsigned char (&out)[32], const void* rows, int row) {
    for (int unit = 0; unit < 2; unit++) {
        const auto* plain = static_cast<const unsigned char*>(rows) + row * 128 + unit * 16;
        const unsigned char* at = emulation::swizzled128(plain);
        emulation::note_shared_read(at, 16);
        memcpy(out + unit * 16, at, 16);
    }
}
/// Adds sum over K of left[row q + 8h] * right[column] to each of this thread's sums. Products are
/// exact in float64, as in the tensor core, which may round their sum differently.
template <int N, int FEATURES, typename Sum, typename Value>
void finish_product(const emulation::Product& p, const double (&left)[2][FEATURES], Value value) {
    Sum* sums = static_cast<Sum*>(p.sums);
    for (int i = 0; i < N / 8 * 2; i++) {
        unsigned char row[32];
        operand_row(row, p.right, i / 2 * 8 + lane_index() % 4 * 2 + i % 2);
        double right[FEATURES];
        for (int k = 0; k < FEATURES; k++) {
            right[k] = value(row, k);
        }
        for (int h = 0; h < 2; h++) {
            Sum& to = sums[i / 2 * 4 + h * 2 + i % 2];
            double sum = p.accumulate ? double(to) : 0;
            for (int k = 0; k < FEATURES; k++) {
                sum += left[h][k] * right[k];
            }
            to = Sum(sum);
        }
    }
}
template <typename T, int N>
void finish_16(const emulation::Product& p) {
    double left[2][16];
    for (uint32_t j = 0; j < 4; j++) {
        const uint32_t* given = emulation::given_by(lane_index() / 4 * 4 + j, p);
        for (int i = 0; i < 4; i++) {
            left[i % 2][i / 2 * 8 + j * 2] = to_float(low_of<T>(given[i]));
            left[i % 2][i / 2 * 8 + j * 2 + 1] = to_float(high_of<T>(given[i]));
        }
    }
    finish_product<N, 16, float>(p, left, [](const unsigned char* row, int k) {
        return double(to_float(T{uint16_t(row[k * 2] | row[k * 2 + 1] << 8)}));
    });
}
template <int KIND_A, int KIND_B, int N>
void finish_8(const emulation::Product& p) {
    double left[2][32];
    for (int h = 0; h < 2; h++) {
        unsigned char row[32];
        operand_row(row, p.left, warp_index() % 4 * 16 + lane_index() / 4 + h * 8);
        for (int k = 0; k < 32; k++) {
            left[h][k] = code_value<KIND_A>(row[k]);
        }
    }
    using Sum = typename MmaCodes<KIND_A, KIND_B>::Sum;
    finish_product<N, 32, Sum>(p, left, [](const unsigned char* row, int k) {
        return double(code_value<KIND_B>(row[k]));
    });
}
#endif

#define QK_8(X, v, i)                                                                      \
    X(v[i]), X(v[i + 1]), X(v[i + 2]), X(v[i + 3]), X(v[i + 4]), X(v[i + 5]), X(v[i + 6]), \
        X(v[i + 7])
#define QK_32(X, v, i) QK_8(X, v, i), QK_8(X, v, i + 8), QK_8(X, v, i + 16), QK_8(X, v, i + 24)
#define QK_64(X, v, i) QK_32(X, v, i), QK_32(X, v, i + 32)
#define QK_FLOAT_SUM(v) "+f"(v)
#define QK_INT_SUM(v) "+r"(v)
#define QK_SUMS_32                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QK_SUMS_64                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
    "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QK_SUMS_128                                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
    "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, " \
    "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
    "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, " \
    "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
    "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "   \
    "%124, %125, %126, %127"

/// sums (64, N) += a (64, 16) * b (N, 16)^T. `a` is in registers, which must not change until the
/// product is waited for.
template <typename T, int N>
QK_DEVICE void product(float (&sums)[N / 2], uint32_t (&a)[4], Operand b) {
    static_assert(N == 64 || N == 128, "");
#ifndef __CUDACC__
    emulation::product_issue(
        {{}, a, sums, nullptr, reinterpret_cast<const void*>(b.bits), true, finish_16<T, N>});
#elif QK_HOPPER
#define QK_PRODUCT(TYPE, COLUMNS, COUNT, A0, A1, A2, A3, B)                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE \
                 " {" QK_SUMS_##COUNT "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B  \
                                      ", 1, 1, 1, 0;"                                 \
                 : QK_PRODUCT_SUMS_##COUNT                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits))
#define QK_PRODUCT_SUMS_32 QK_32(QK_FLOAT_SUM, sums, 0)
#define QK_PRODUCT_SUMS_64 QK_64(QK_FLOAT_SUM, sums, 0)
    constexpr bool is_half = std::is_same<T, Half>::value;
    if constexpr (N == 64 && is_half) {
        QK_PRODUCT("f16", "64", 32, "32", "33", "34", "35", "36");
    } else if constexpr (N == 64) {
        QK_PRODUCT("bf16", "64", 32, "32", "33", "34", "35", "36");
    } else if constexpr (is_half) {
        QK_PRODUCT("f16", "128", 64, "64", "65", "66", "67", "68");
    } else {
        QK_PRODUCT("bf16", "128", 64, "64", "65", "66", "67", "68");
    }
#undef QK_PRODUCT
#undef QK_PRODUCT_SUMS_32
#undef QK_PRODUCT_SUMS_64
#endif
}

/// sums (64, N) [+]= a (64, 32) * b (N, 32)^T of 8-bit codes, both in shared memory. E4M3 by E4M3
/// or E5M2 with N = 128, int8 with N = 256.
template <int KIND_A, int KIND_B, int N>
struct ProductOfCodes {
    using Sum = typename MmaCodes<KIND_A, KIND_B>::Sum;
    static QK_DEVICE void run(Sum (&sums)[N / 2], Operand a, Operand b, bool accumulate) {
#ifndef __CUDACC__
        emulation::product_issue({{},
                                  nullptr,
                                  sums,
                                  reinterpret_cast<const void*>(a.bits),
                                  reinterpret_cast<const void*>(b.bits),
                                  accumulate,
                                  finish_8<KIND_A, KIND_B, N>});
#elif QK_HOPPER
        static_assert(KIND_A == kInt8 ? N == 256 : KIND_A == kE4M3 && N == 128, "");
        if constexpr (KIND_A == kInt8) {
            asm volatile(
                "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
                "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" QK_SUMS_128
                "}, %128, %129, p;\n}"
                : QK_64(QK_INT_SUM, sums, 0), QK_64(QK_INT_SUM, sums, 64)
                : "l"(a.bits), "l"(b.bits), "r"(int(accumulate)));
        } else if constexpr (KIND_B == kE4M3) {
            asm volatile(
                "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" QK_SUMS_64
                "}, %64, %65, p, 1, 1;\n}"
                : QK_64(QK_FLOAT_SUM, sums, 0)
                : "l"(a.bits), "l"(b.bits), "r"(int(accumulate)));
        } else {
            asm volatile(
                "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e5m2 {" QK_SUMS_64
                "}, %64, %65, p, 1, 1;\n}"
                : QK_64(QK_FLOAT_SUM, sums, 0)
                : "l"(a.bits), "l"(b.bits), "r"(int(accumulate)));
        }
#else
        not_for_this_gpu();
#endif
    }
};

#undef QK_8
#undef QK_32
#undef QK_64
#undef QK_FLOAT_SUM
#undef QK_INT_SUM
#undef QK_SUMS_32
#undef QK_SUMS_64
#undef QK_SUMS_128

}  // namespace qk
