// y = x @ W^T of 8-bit codes for many rows of x: tiles of ROWS rows of x by 128 rows of W.
//
// cp.async copies steps of 128 features of x and W to a ring in shared memory, STAGES deep. A row
// of a step is 8 units of 16 bytes; unit u of row r is at u ^ (r % 8), so that the 8 rows that
// ldmatrix reads at a time are in different banks. Eight warps share the tile:
//
//     ROWS   128, 64          32, 16
//     warps  2 x 4            1 x 8        along x, along W
//
// The order of every sum depends only on KP and `k_slice`. It does not depend on ROWS, or on
// whether each split-K slice has its own block or one block computes all slices in sequence (fp8
// with up to 64 ROWS; int8 is exact). So rows get bitwise the same result for every M.
#pragma once
#include "gemv.h"

namespace qk {

constexpr int kTileN = 128, kGemmThreads = 256, kUnits = kStep / 16;
/// Blocks of W that are visited together for each block of x, so that both stay in the L2.
constexpr int kGroupedBlocks = 8;

template <int ROWS>
struct Tiling {
    static constexpr int kRows = ROWS, kColumns = kTileN;
    /// Stride between rows of the result in shared memory, in 16-bit elements.
    static constexpr int kOutStride = kColumns + 8;
    static constexpr int kStages = ROWS == 128 ? 3 : 4;  // 96 KiB at most: sm_120 has 99
    static constexpr int kWarpsM = ROWS >= 64 ? 2 : 1, kWarpsN = 8 / kWarpsM;
    static constexpr int kTilesM = ROWS / kWarpsM / 16, kTilesN = kTileN / kWarpsN / 8;
    static constexpr int kSums = kTilesM * kTilesN * 4;
    static constexpr int kStageBytes = (ROWS + kTileN) * kStep;
    static constexpr size_t kRing = size_t(kStages) * kStageBytes;
    /// The threads that store a tile together.
    static constexpr int kThreads = kGemmThreads;
    static QK_DEVICE int index() { return thread_index(); }
    static QK_DEVICE void sync() { sync_block(); }
    static constexpr size_t kOut = size_t(ROWS) * kOutStride * 2;
    static constexpr size_t kShared = kRing > kOut ? kRing : kOut;
};

/// A work tile: its first row of x and of W, and its number.
struct Tile {
    int m, n, block;
};
/// Work tile number `block`: kGroupedBlocks blocks of W at a time.
template <int ROWS, int COLUMNS>
QK_DEVICE Tile tile_of(const EightBitArgs& args, int block) {
    const int blocks_n = (args.n + COLUMNS - 1) / COLUMNS, blocks_m = (args.m + ROWS - 1) / ROWS;
    const int per_group = kGroupedBlocks * blocks_m;
    const int first = block / per_group * kGroupedBlocks;
    const int grouped = blocks_n - first < kGroupedBlocks ? blocks_n - first : kGroupedBlocks;
    return {block % per_group / grouped * ROWS, (first + block % per_group % grouped) * COLUMNS,
            block};
}

/// Copies COUNT rows of codes of one step to shared memory; zeros past the last row and feature.
template <int COUNT>
QK_DEVICE void copy_rows(unsigned char* to, const uint8_t* from, int first, int rows, int kp,
                         int step) {
    QK_UNROLL
    for (int i = 0; i < COUNT * kUnits; i += kGemmThreads) {
        const int at = i + thread_index(), row = at / kUnits, unit = at % kUnits;
        if (COUNT * kUnits % kGemmThreads == 0 || at < COUNT * kUnits) {
            const int k = step * kStep + unit * 16;
            const bool live = first + row < rows && k < kp;
            const uint8_t* source = live ? from + int64_t(first + row) * kp + k : from;
            copy_async(to + row * kStep + (unit ^ row % 8) * 16, source, live ? 16 : 0);
        }
    }
}

QK_DEVICE const unsigned char* swizzled(const unsigned char* rows, int row, int unit) {
    return rows + row * kStep + (unit ^ row % 8) * 16;
}

template <typename P, typename Sum>
using Sums = Sum[P::kTilesM][P::kTilesN][4];

/// part += 32 features, the k-th of a step in shared memory.
template <int KIND, int ROWS, typename P, typename Sum>
QK_DEVICE void multiply_slice(Sums<P, Sum>& part, const unsigned char* stage, int warp_m,
                              int warp_n, int k) {
    const int lane = lane_index();
    const unsigned char* weights = stage + ROWS * kStep;
    uint32_t a[P::kTilesM][4], b[P::kTilesN / 2][4];
    QK_UNROLL
    for (int i = 0; i < P::kTilesM; i++) {
        load_matrix(a[i], swizzled(stage, warp_m + i * 16 + lane % 16, k * 2 + lane / 16));
    }
    QK_UNROLL
    for (int i = 0; i < P::kTilesN / 2; i++) {
        const int row = warp_n + i * 16 + lane / 16 * 8 + lane % 8;
        load_matrix(b[i], swizzled(weights, row, k * 2 + lane / 8 % 2));
    }
    QK_UNROLL
    for (int i = 0; i < P::kTilesM; i++) {
        QK_UNROLL
        for (int c = 0; c < P::kTilesN; c++) {
            const uint32_t operand[2] = {b[c / 2][c % 2 * 2], b[c / 2][c % 2 * 2 + 1]};
            MmaCodes<KIND == kInt8 ? kInt8 : kE4M3, KIND>::run(part[i][c], a[i], operand);
        }
    }
}
/// part += one step.
template <int KIND, int ROWS, typename P, typename Sum>
QK_DEVICE void multiply_stage(Sums<P, Sum>& part, const unsigned char* stage, int warp_m,
                              int warp_n) {
    // The two sets of sums of fp8 leave no registers to overlap iterations.
    if (ROWS == 128 && KIND != kInt8) {
        QK_NO_UNROLL
        for (int k = 0; k < 4; k++) {
            multiply_slice<KIND, ROWS, P, Sum>(part, stage, warp_m, warp_n, k);
        }
    } else {
        QK_UNROLL
        for (int k = 0; k < 4; k++) {
            multiply_slice<KIND, ROWS, P, Sum>(part, stage, warp_m, warp_n, k);
        }
    }
}

/// Adds all outlier columns of LLM.int8(), in chunks of 16.
template <typename T, typename P>
QK_DEVICE void gemm_outliers(Sums<P, float>& sums, const EightBitArgs& args, int m0, int n0) {
    const int q = lane_index() / 4, j = lane_index() % 4,
              count = load_global(args.columns + args.k);
    // Batch-invariant: one column at a time, so that its position in the list does not matter.
    const int chunk = args.by_element ? 1 : kColumns;
    for (int i = 0; i < count; i += chunk) {
        const int end = i + chunk < count ? i + chunk : count;
        const TwoColumns near = two_columns(args, i + j * 2, end);
        const TwoColumns far = two_columns(args, i + j * 2 + 8, end);
        QK_UNROLL
        for (int t = 0; t < P::kTilesM; t++) {
            const int m = m0 + t * 16 + q;
            const float scale[2] = {scale_of_row(args, m), scale_of_row(args, m + 8)};
            const uint32_t a[4] = {residual_pair<T>(args, m, scale[0], near),
                                   residual_pair<T>(args, m + 8, scale[1], near),
                                   residual_pair<T>(args, m, scale[0], far),
                                   residual_pair<T>(args, m + 8, scale[1], far)};
            QK_UNROLL
            for (int c = 0; c < P::kTilesN; c++) {
                const int n = n0 + c * 8 + q;
                mma<T>(sums[t][c], a, weight_pair<T>(args, n, near), weight_pair<T>(args, n, far));
            }
        }
    }
}

/// Epilogue: scales, adds the bias, rounds, and stores through shared memory `out`, so that each
/// store to a row of y has 16 bytes.
template <int KIND, bool BLOCKS, typename P, typename Sum>
QK_DEVICE void store_tile(const EightBitArgs& args, const Sums<P, Sum>& acc, const Tile& tile,
                          int warp_m, int warp_n, uint16_t* out) {
    const int q = lane_index() / 4, j = lane_index() % 4, m0 = tile.m + warp_m,
              n0 = tile.n + warp_n;
    float values[P::kTilesM][P::kTilesN][4];
    float row_scale[P::kTilesM][2];
    QK_UNROLL
    for (int t = 0; t < P::kTilesM; t++) {
        QK_UNROLL
        for (int h = 0; h < 2; h++) {
            row_scale[t][h] = BLOCKS ? 1 : scale_of_row(args, m0 + t * 16 + q + h * 8);
        }
        QK_UNROLL
        for (int c = 0; c < P::kTilesN; c++) {
            QK_UNROLL
            for (int i = 0; i < 4; i++) {
                const int n = n0 + c * 8 + j * 2 + i % 2;
                values[t][c][i] =
                    n < args.n ? without_zero(args, acc[t][c][i], n) * row_scale[t][i / 2] : 0;
            }
        }
    }
    if (KIND == kInt8 && args.columns != nullptr) {
        if (args.is_bfloat) {
            gemm_outliers<BFloat, P>(values, args, m0, n0);
        } else {
            gemm_outliers<Half, P>(values, args, m0, n0);
        }
    }
    P::sync();  // all threads are done with the last contents of `out`
    QK_UNROLL
    for (int c = 0; c < P::kTilesN; c++) {
        float scale[2] = {}, bias[2] = {};
        QK_UNROLL
        for (int b = 0; b < 2; b++) {
            const int n = n0 + c * 8 + j * 2 + b;
            if (n < args.n) {
                scale[b] = BLOCKS ? 1 : load_global(args.w_scale + n);
                bias[b] = args.bias != nullptr ? load_16(args.bias, n, args.is_bfloat) : 0;
            }
        }
        QK_UNROLL
        for (int t = 0; t < P::kTilesM; t++) {
            QK_UNROLL
            for (int h = 0; h < 2; h++) {
                uint32_t bits = 0;
                QK_UNROLL
                for (int b = 0; b < 2; b++) {
                    const float y = values[t][c][h * 2 + b] * scale[b] + bias[b];
                    bits |= uint32_t(bits_16(y, args.is_bfloat)) << 16 * b;
                }
                const int row = warp_m + t * 16 + q + h * 8, column = warp_n + c * 8 + j * 2;
                store_shared(reinterpret_cast<uint32_t*>(out + row * P::kOutStride + column), bits);
            }
        }
    }
    P::sync();
    auto* y = static_cast<uint16_t*>(args.y);
    for (int i = P::index(); i < P::kRows * (P::kColumns / 8); i += P::kThreads) {
        const int row = i / (P::kColumns / 8), column = i % (P::kColumns / 8) * 8;
        const int m = tile.m + row, n = tile.n + column;
        if (m < args.m && n < args.n) {
            const uint16_t* from = out + row * P::kOutStride + column;
            uint16_t* to = y + int64_t(m) * args.n + n;
            if (args.n % 8 == 0) {
                store_global(reinterpret_cast<Words4*>(to),
                             load_shared(reinterpret_cast<const Words4*>(from)));
            } else {
                for (int e = 0; e < 8 && n + e < args.n; e++) {
                    store_global(to + e, load_shared(from + e));
                }
            }
        }
    }
}

/// to += from, from = 0
template <typename P, typename Sum>
QK_DEVICE void add_all(Sums<P, Sum>& to, Sums<P, Sum>& from) {
    QK_UNROLL
    for (int i = 0; i < P::kSums; i++) {
        const int t = i / (P::kTilesN * 4), c = i / 4 % P::kTilesN, e = i % 4;
        to[t][c][e] += from[t][c][e];
        from[t][c][e] = 0;
    }
}

/// Grid: (tiles, split-K slices or 1). Shared memory: Tiling<ROWS>::kShared.
template <int KIND, bool BLOCKS, int ROWS>
__global__ void __launch_bounds__(kGemmThreads, 1) eight_bit_gemm(EightBitArgs args) {
    using P = Tiling<ROWS>;
    using Sum = typename MmaCodes<KIND == kInt8 ? kInt8 : kE4M3, KIND>::Sum;
    unsigned char* ring = shared_memory();
    const Tile tile = tile_of<ROWS, kTileN>(args, block_index_x());
    const int warp = warp_index(), q = lane_index() / 4;
    const int warp_m = warp / P::kWarpsN * (P::kTilesM * 16),
              warp_n = warp % P::kWarpsN * (P::kTilesN * 8);
    const bool sequential = blocks_y() == 1;  // all split-K slices in this block
    const int steps = (args.kp + kStep - 1) / kStep, begin = block_index_y() * args.k_slice;
    const int end = !sequential && begin + args.k_slice < steps ? begin + args.k_slice : steps;

    const auto copy_weight = [&](int step) {
        unsigned char* stage = ring + (step - begin) % P::kStages * P::kStageBytes;
        copy_rows<kTileN>(stage + ROWS * kStep, args.weight, tile.n, args.n, args.kp, step);
    };
    const auto copy_x = [&](int step) {
        unsigned char* stage = ring + (step - begin) % P::kStages * P::kStageBytes;
        copy_rows<ROWS>(stage, args.x, tile.m, args.m, args.kp, step);
    };
    // The last kernel may write x, but not W, so the first copies of W start before the wait.
    for (int step = begin; step < begin + P::kStages - 1 && step < end; step++) {
        copy_weight(step);
    }
    let_next_kernel_start();
    wait_for_last_kernel();
    for (int step = begin; step < begin + P::kStages - 1; step++) {
        if (step < end) {
            copy_x(step);
        }
        copy_async_commit();
    }

    Sums<P, Sum> acc = {}, total = {};
    for (int step = begin; step < end; step++) {
        copy_async_wait<P::kStages - 2>();
        sync_block();  // all threads have this step, and none still reads the last one
        if (step + P::kStages - 1 < end) {
            copy_weight(step + P::kStages - 1);
            copy_x(step + P::kStages - 1);
        }
        copy_async_commit();
        const unsigned char* stage = ring + (step - begin) % P::kStages * P::kStageBytes;
        if constexpr (KIND == kInt8) {
            multiply_stage<KIND, ROWS, P, Sum>(acc, stage, warp_m, warp_n);
        } else {
            Sums<P, Sum> part = {};
            multiply_stage<KIND, ROWS, P, Sum>(part, stage, warp_m, warp_n);
            const float w_scale =
                BLOCKS ? load_global(args.w_scale + int64_t(tile.n / kStep) * steps + step) : 1;
            QK_UNROLL
            for (int i = 0; i < P::kTilesM * 2; i++) {
                const int t = i / 2, h = i % 2, m = tile.m + warp_m + t * 16 + q + h * 8;
                float scale = 1;
                if (BLOCKS && m < args.m) {
                    scale = w_scale * load_global(args.x_scale + int64_t(step) * args.m + m);
                }
                QK_UNROLL
                for (int c = 0; c < P::kTilesN; c++) {
                    QK_UNROLL
                    for (int e = h * 2; e < h * 2 + 2; e++) {
                        acc[t][c][e] += BLOCKS ? part[t][c][e] * scale : part[t][c][e];
                    }
                }
            }
            if (ROWS < 128 && sequential && ((step + 1) % args.k_slice == 0 || step + 1 == end)) {
                add_all<P, Sum>(total, acc);
            }
        }
    }
    copy_async_wait<0>();

    if (KIND != kInt8 && ROWS < 128 && sequential) {
        add_all<P, Sum>(acc, total);
    }
    Sum(&flat)[P::kSums] = reinterpret_cast<Sum(&)[P::kSums]>(acc);
    if (blocks_y() > 1) {
        sync_block();  // add_slices writes its flag into the ring
    }
    if (add_slices<P::kSums, kGemmThreads, Sum>(flat, args, reinterpret_cast<int*>(ring))) {
        store_tile<KIND, BLOCKS, P, Sum>(args, acc, tile, warp_m, warp_n,
                                         reinterpret_cast<uint16_t*>(ring));
    }
}

}  // namespace qk
