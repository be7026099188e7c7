// y = x @ W^T of 8-bit codes for up to 8 or 16 rows of x: W is loaded from memory to registers.
//
// A block has 16 rows of W and one split-K slice; its four warps take steps of 128 features in
// turn. W is the first operand of mma.m16n8k32, and the rows of x are its columns. K is the
// innermost dimension of both, and a sum may take K in any order that is the same for both
// operands. So lane (q, j), q = lane / 4, loads the 16 bytes at feature 16 j of each 64 features,
// of rows q and q + 8 of W and of row q of x, and uses them as operands of two products.
//
//          64 features                          kEightDepth steps are in flight: 128 bytes per lane
//      j=0   j=1   j=2   j=3
//    +-----+-----+-----+-----+
//  q | 16B | 16B | 16B | 16B |   words 0 and 1: first product, words 2 and 3: second
//    +-----+-----+-----+-----+
//
// Sums of warps are added in order; then the block that finishes last adds the split-K slices.
#pragma once
#include "rows.h"

namespace qk {

/// Words between columns in shared memory, so that a warp's stores use all banks.
constexpr int kColumnStride = 20;

/// A lane's codes of W for one step: rows q and q + 8, halves of the step.
struct WeightCodes {
    Words4 w[2][2];
};
QK_DEVICE void load_weight(WeightCodes& to, const EightBitArgs& args, const GemvPlace& at, int step,
                           int end, uint64_t policy) {
    QK_UNROLL
    for (int h = 0; h < 2; h++) {
        const int k = step * kStep + h * 64 + at.j * 16;
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            const int n = at.n + at.q + r * 8;
            to.w[r][h] =
                step < end && k < args.kp && n < args.n
                    ? load_stream(
                          reinterpret_cast<const Words4*>(args.weight + int64_t(n) * args.kp + k),
                          policy)
                    : Words4{};
        }
    }
}

/// acc += one step. An fp8 step is summed separately, and scaled if scales are of blocks.
template <int KIND, bool BLOCKS, typename Rows, typename Sum>
QK_DEVICE void multiply_step(Sum (&acc)[Rows::COLUMNS][4], const WeightCodes& weight,
                             const typename Rows::Part& part, Rows& rows, const EightBitArgs& args,
                             const GemvPlace& at, int step) {
    const StepCodes<Rows::COLUMNS> codes = rows.codes(part, step);
    QK_UNROLL
    for (int c = 0; c < Rows::COLUMNS; c++) {
        Sum part[4] = {};
        QK_UNROLL
        for (int i = 0; i < 4; i++) {
            const int h = i / 2, word = i % 2 * 2;
            const uint32_t a[4] = {weight.w[0][h].w[word], weight.w[1][h].w[word],
                                   weight.w[0][h].w[word + 1], weight.w[1][h].w[word + 1]};
            const uint32_t b[2] = {codes.x[c][h].w[word], codes.x[c][h].w[word + 1]};
            if constexpr (KIND == kInt8) {
                MmaCodes<kInt8, kInt8>::run(acc[c], a, b);
            } else {
                MmaCodes<KIND, kE4M3>::run(part, a, b);
            }
        }
        if constexpr (KIND == kInt8) {
            continue;
        }
        float scale[2] = {1, 1};
        if (BLOCKS) {
            const int steps = (args.kp + kStep - 1) / kStep;
            const float w_scale = load_global(args.w_scale + int64_t(at.n / kStep) * steps + step);
            QK_UNROLL
            for (int b = 0; b < 2; b++) {
                const int m = c * 8 + at.j * 2 + b;
                scale[b] = m < args.m ? w_scale * rows.group_scale(m, step) : 0;
            }
        }
        QK_UNROLL
        for (int i = 0; i < 4; i++) {
            acc[c][i] += BLOCKS ? Sum(part[i] * scale[i % 2]) : part[i];
        }
    }
}

/// Adds this warp's outlier columns: every fourth chunk of 16.
template <typename T, int COLUMNS>
QK_DEVICE void gemv_outliers(float (&sums)[COLUMNS][4], const EightBitArgs& args,
                             const GemvPlace& at) {
    const int count = load_global(args.columns + args.k);
    float scale[COLUMNS];
    QK_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        scale[c] = scale_of_row(args, c * 8 + at.q);
    }
    for (int i = warp_index() * kColumns; i < count; i += kEightWarps * kColumns) {
        const TwoColumns near = two_columns(args, i + at.j * 2, count);
        const TwoColumns far = two_columns(args, i + at.j * 2 + 8, count);
        const int n = at.n + at.q;
        const uint32_t a[4] = {weight_pair<T>(args, n, near), weight_pair<T>(args, n + 8, near),
                               weight_pair<T>(args, n, far), weight_pair<T>(args, n + 8, far)};
        QK_UNROLL
        for (int c = 0; c < COLUMNS; c++) {
            const int m = c * 8 + at.q;
            mma<T>(sums[c], a, residual_pair<T>(args, m, scale[c], near),
                   residual_pair<T>(args, m, scale[c], far));
        }
    }
}

/// Adds the sums of the block's warps in order. Thread t gets outputs t + 128 c: row t % 16 of W
/// and row t / 16 + 8 c of x.
template <int COLUMNS, typename Sum>
QK_DEVICE void add_warps(Sum (&total)[COLUMNS], const Sum (&acc)[COLUMNS][4], Sum* shared,
                         const GemvPlace& at) {
    constexpr int per_warp = COLUMNS * 8 * kColumnStride;
    sync_block();  // no thread still reads `shared`
    QK_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        QK_UNROLL
        for (int i = 0; i < 4; i++) {
            const int column = c * 8 + at.j * 2 + i % 2, row = at.q + i / 2 * 8;
            store_shared(shared + warp_index() * per_warp + column * kColumnStride + row,
                         acc[c][i]);
        }
    }
    sync_block();
    QK_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        const int out = thread_index() + c * kEightThreads;
        total[c] = 0;
        QK_UNROLL
        for (int w = 0; w < kEightWarps; w++) {
            total[c] += load_shared(shared + w * per_warp + out / 16 * kColumnStride + out % 16);
        }
    }
}

/// Adds the split-K slices. Returns whether this block is the last one, which has the totals.
template <int COUNT, int THREADS, typename Sum>
QK_DEVICE bool add_slices(Sum (&total)[COUNT], const EightBitArgs& args, int* last) {
    if (blocks_y() == 1) {
        return true;
    }
    auto* partial = static_cast<Sum*>(args.partial);
    const int64_t stride = int64_t(blocks_x()) * (COUNT * THREADS);
    const int64_t mine = int64_t(block_index_x()) * (COUNT * THREADS) + thread_index();
    QK_UNROLL
    for (int i = 0; i < COUNT; i++) {
        store_global(partial + block_index_y() * stride + mine + i * THREADS, total[i]);
    }
    fence_global();
    sync_block();  // all stores of this block are done before one thread counts it
    if (thread_index() == 0) {
        const int before = atomic_add_acq_rel(args.counter + block_index_x(), 1);
        store_shared(last, int(before == int(blocks_y()) - 1));
    }
    sync_block();
    if (!load_shared(last)) {
        return false;
    }
    QK_UNROLL
    for (int i = 0; i < COUNT; i++) {
        total[i] = 0;
    }
    for (uint32_t s = 0; s < blocks_y(); s++) {
        QK_UNROLL
        for (int i = 0; i < COUNT; i++) {
            total[i] += load_l2(partial + s * stride + mine + i * THREADS);
        }
    }
    if (thread_index() == 0) {
        store_global(args.counter + block_index_x(), 0);  // the next call expects 0
    }
    return true;
}

/// A sum before it is scaled, with the zero point of x subtracted.
template <typename Sum>
QK_DEVICE float without_zero(const EightBitArgs& args, Sum acc, int n) {
    if (args.zero != nullptr) {
        acc -= Sum(int(load_global(args.zero)) * load_global(args.row_sum + n));
    }
    return float(acc);
}

/// Grid: (blocks of 16 rows of W, split-K slices). Shared memory: gemv_shared<Rows>().
template <int COLUMNS>
constexpr size_t kGemvSums = (kEightWarps * COLUMNS * 8 * kColumnStride + 4) * 4;
template <typename Rows>
constexpr size_t gemv_shared() {
    return kGemvSums<Rows::COLUMNS> + Rows::kShared;
}
template <int KIND, bool BLOCKS, typename Rows>
__global__ void __launch_bounds__(kEightThreads) eight_bit_gemv(EightBitArgs args) {
    constexpr int COLUMNS = Rows::COLUMNS;
    using Sum = typename MmaCodes<KIND, KIND == kInt8 ? kInt8 : kE4M3>::Sum;
    const GemvPlace at{int(block_index_x()) * kGemvBlock, int(lane_index() / 4),
                       int(lane_index() % 4)};
    const int steps = (args.kp + kStep - 1) / kStep;
    const int begin = block_index_y() * args.k_slice;
    const int end = begin + args.k_slice < steps ? begin + args.k_slice : steps;
    const int first = begin + warp_index();
    const uint64_t policy = evict_first();

    WeightCodes weight[kEightDepth];
    QK_UNROLL
    for (int d = 0; d < kEightDepth; d++) {
        load_weight(weight[d], args, at, first + d * kEightWarps, end, policy);
    }
    let_next_kernel_start();
    wait_for_last_kernel();
    Rows rows(args, at, shared_memory() + kGemvSums<COLUMNS>);
    typename Rows::Part part[kEightDepth];
    QK_UNROLL
    for (int d = 0; d < kEightDepth; d++) {
        rows.load(part[d], first + d * kEightWarps, end);
    }
    rows.find_scales();
    Sum acc[COLUMNS][4] = {};
    for (int round = first; round < end; round += kEightDepth * kEightWarps) {
        QK_UNROLL
        for (int d = 0; d < kEightDepth; d++) {
            const int step = round + d * kEightWarps, later = step + kEightDepth * kEightWarps;
            if (step < end) {
                multiply_step<KIND, BLOCKS>(acc, weight[d], part[d], rows, args, at, step);
            }
            load_weight(weight[d], args, at, later, end, policy);
            rows.load(part[d], later, end);
        }
    }

    auto* last = reinterpret_cast<int*>(shared_memory());
    Sum total[COLUMNS];
    add_warps<COLUMNS, Sum>(total, acc, reinterpret_cast<Sum*>(last + 4), at);
    if (!add_slices<COLUMNS, kEightThreads, Sum>(total, args, last)) {
        return;
    }
    float outliers[COLUMNS] = {};
    if (KIND == kInt8 && !Rows::kQuantizes && args.columns != nullptr) {
        float sums[COLUMNS][4] = {};
        if (args.is_bfloat) {
            gemv_outliers<BFloat, COLUMNS>(sums, args, at);
        } else {
            gemv_outliers<Half, COLUMNS>(sums, args, at);
        }
        add_warps<COLUMNS, float>(outliers, sums, reinterpret_cast<float*>(last + 4), at);
    }
    QK_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        const int out = thread_index() + c * kEightThreads, n = at.n + out % 16, m = out / 16;
        if (n < args.n && m < args.m) {
            float y = without_zero(args, total[c], n);
            if (!BLOCKS) {
                y = (y * rows.row_scale(m) + outliers[c]) * load_global(args.w_scale + n);
            }
            if (args.bias != nullptr) {
                y += load_16(args.bias, n, args.is_bfloat);
            }
            store_global(static_cast<uint16_t*>(args.y) + int64_t(m) * args.n + n,
                         bits_16(y, args.is_bfloat));
        }
    }
}

}  // namespace qk
