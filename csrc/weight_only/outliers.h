// Sparse weights that are added to the decoded ones (SpQR): a few in each row, in 16 bits, as CSR.
// Each split-K slice takes an equal part of them, whatever features they belong to, so all blocks
// have the same work. The order of the sums depends only on the weight and the number of slices.
#pragma once
#include "../ptx/warp.h"
#include "arguments.h"

namespace qk {

/// Outliers of the decode kernel, for 32 rows of W and COLUMNS rows of x: each warp sums a share of
/// every row. A warp's sums are padded, because otherwise all would write to the same banks.
template <int COLUMNS>
constexpr int kSparseFloats = 32 * COLUMNS + 4;

/// Sparse sums of the rows n0.. of W times rows m0.. of x. sums: shared memory, kSparseFloats for
/// each warp.
template <typename T, int COLUMNS>
QK_DEVICE void sparse_sums(const WeightOnlyArgs& args, float* sums, int n0, int m0) {
    const int parts = threads_x() / 32;
    const int part = thread_index() % parts, row = thread_index() / parts;
    float acc[COLUMNS] = {};
    const int end = load_global(args.row_offsets + n0 + row + 1);
    int i = load_global(args.row_offsets + n0 + row) + block_index_y() * parts + part;
    for (; i < end; i += blocks_y() * parts) {
        const uint32_t entry = load_global(args.col_vals + i);
        const float value = to_float(Half{uint16_t(entry >> 16)});
        const T* x = static_cast<const T*>(args.x) + (entry & 0xFFFF);
        QK_UNROLL
        for (int m = 0; m < COLUMNS; m++) {
            if (m0 + m < args.m) {
                acc[m] += value * to_float(load_global(x + int64_t(m0 + m) * args.k));
            }
        }
    }
    QK_UNROLL
    for (int m = 0; m < COLUMNS; m++) {
        store_shared(sums + part * kSparseFloats<COLUMNS> + m * 32 + row, acc[m]);
    }
}

/// Adds the parts of output t of the block.
template <int COLUMNS>
QK_DEVICE float sparse_total(const float* sums, int t) {
    float total = 0;
    const int parts = threads_x() / 32;
    for (int part = 0; part < parts; part++) {
        total += load_shared(sums + part * kSparseFloats<COLUMNS> + t);
    }
    return total;
}

/// For the gemm: adds to a lane's sums of rows `first` and first + 8 of W and m0 + 8c + 2j of x.
/// slice: the split-K slice, of k_slices.
template <typename T, int COUNT>
QK_DEVICE void add_sparse(float (&acc)[COUNT][4], const WeightOnlyArgs& args, int first, int m0,
                          int slice, int k_slices) {
    constexpr int together = 4;  // columns of x in flight at a time
    const int m = m0 + lane_index() % 4 * 2;
    QK_UNROLL
    for (int r = 0; r < 2; r++) {
        const int row = first + r * 8;
        if (row >= args.n) {
            continue;
        }
        const int end = load_global(args.row_offsets + row + 1);
        int i = load_global(args.row_offsets + row) + slice;
        for (; i < end; i += together * k_slices) {
            uint32_t entries[together], x[together][COUNT];
            QK_UNROLL
            for (int o = 0; o < together; o++) {
                entries[o] =
                    i + o * k_slices < end ? load_global(args.col_vals + i + o * k_slices) : 0;
            }
            QK_UNROLL
            for (int o = 0; o < together; o++) {
                const T* column = static_cast<const T*>(args.x_columns) +
                                  int64_t(entries[o] & 0xFFFF) * args.x_rows + m;
                QK_UNROLL
                for (int c = 0; c < COUNT; c++) {
                    const bool live = i + o * k_slices < end && m + c * 8 < args.x_rows;
                    x[o][c] =
                        live ? load_global(reinterpret_cast<const uint32_t*>(column + c * 8)) : 0;
                }
            }
            QK_UNROLL
            for (int o = 0; o < together; o++) {
                const float value = to_float(Half{uint16_t(entries[o] >> 16)});
                QK_UNROLL
                for (int c = 0; c < COUNT; c++) {
                    acc[c][r * 2] += value * to_float(low_of<T>(x[o][c]));
                    acc[c][r * 2 + 1] += value * to_float(high_of<T>(x[o][c]));
                }
            }
        }
    }
}

}  // namespace qk
