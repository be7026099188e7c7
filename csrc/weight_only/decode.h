// y = x @ W^T + bias for up to 16 rows of x: as fast as the weight can be read.
//
// A block has 32 or 64 rows of W, operands of 16 rows, and one split-K slice. Its warps take the
// tiles of the slice in turn, each with a pipeline of its own in shared memory, so no warp waits
// for another until the sums are complete:
//
//          K: tiles of a split-K slice         columns = rows of x
//         w0  w1  w2 ... w7  w0  w1 ...        +---+
//       +---+---+---+   +---+---+---+          | x |
//    32 |   |   |   |   |   |   |   |  times   |   |  = 32 x 8 (or 16) sums in float32 a warp
//       +---+---+---+   +---+---+---+          +---+
//
// cp.async copies the packed bytes of a tile and its activations, kDecodeStages tiles of the warp
// at a time. A lane reads only codes that it copied itself. The rows of x, 8 or 16, are the columns
// of mma.m16n8k16; rows that do not exist are copies of another, and their sums are not stored. If
// N is no multiple of them, the last block begins earlier: it computes some rows again, but does
// not store them.
//
// Weights enter the product as `D::raw` makes them: off by a constant, and without zero points. The
// sums are put right once a scale group, by one more product: its first operand has ones in rows
// 0-7, which give the group's sum of x, and the constants in rows 8-15.
//
// With one row of x the columns are slices of 16 features instead: column c has the row's features
// of slices c and c + 8 of a tile, and zeros elsewhere. So the sums of all slices come apart in one
// product, and each lane scales only those of its own two columns, 2j and 2j + 1:
//
//          K: slices of a tile                 columns = slices
//         s0  s1  s2  s3  s4  s5  s6  s7       +---+
//       +---+---+---+---+---+---+---+---+      |x  |
//    16 |   |   |   |   |   |   |   |   | times| x |  = 16 x 8 sums, to be scaled and added
//       +---+---+---+---+---+---+---+---+      |  x|
//
// The sums of warps are added in order; then the block that finishes last adds the split-K slices
// in order. So the order of every sum depends on the weight, the number of slices and that of
// warps, never on M or on timing.
#pragma once
#include "decode_memory.h"
#include "outliers.h"

namespace qk {

/// Operands of 16 rows of W of a warp. COLUMN_TILES: 8 rows of x each; 0 for one row, which leaves
/// registers for more operands, unless the codes take many.
template <typename D, typename S, int COLUMN_TILES>
constexpr int kRowTiles =
    COLUMN_TILES == 0 && D::kHigh == 0 && D::kBook == 0 && !S::kOutliers ? 4 : 2;
/// Whether the compiler has enough registers if an SM is to hold two blocks. Other kernels would
/// spill; elsewhere than on Hopper these, too, by a few bytes.
template <typename D, typename S, int COLUMN_TILES>
constexpr bool kFewRegisters =
    kIsHopper && D::kHigh == 0 && D::kBook == 0 && !S::kHasMin && D::kFactor == 1 &&
    (D::kTable ? S::kGroups == 2 && COLUMN_TILES < 2
               : D::kWidth < 8 && D::kZero == 0 && S::kGroups == 1);

/// Whether every constant that `raw` adds, with kZero, is a number of T.
template <typename T, typename D>
constexpr bool zero_is_exact() {
    for (int s = 0; s < D::kPairs; s++) {
        float value = D::added(s) + D::kZero;
        for (; value >= 2; value /= 2) {
        }
        value *= float(1 << Magic<T>::kMantissa);
        if (value != float(int(value))) {
            return false;
        }
    }
    return true;
}

/// What a decode kernel does for codes D and scales S.
template <typename T, typename D, typename S>
struct Decoding {
    /// Groups that change inside a slice scale each weight, which must be finished before.
    static constexpr bool kRaw = S::kGroups > 0;
    static constexpr bool kZeroInConstants = kRaw && zero_is_exact<T, D>();
    static constexpr bool kConstants =
        kRaw && (D::added(0) != 0 || (D::kZero != 0 && kZeroInConstants));
    static constexpr bool kOnes =
        S::kHasMin || (kRaw && (S::kHasZero || (D::kZero != 0 && !kZeroInConstants)));

    /// Both halves of a register of the constants for slices of pair s.
    static QK_HOST_DEVICE constexpr uint32_t constants(int s) {
        return constant2<T>(D::added(s) + (kZeroInConstants ? D::kZero : 0));
    }
};

/// Bytes at the start of shared memory: the codebook, or the table of pairs.
template <typename T, typename D, typename S>
constexpr bool kHasPairs = Decoding<T, D, S>::kRaw && D::kTable;
template <typename T, typename D, typename S>
constexpr int kDecodeBookBytes = kHasPairs<T, D, S> ? kPairsBytes : kBookBytes<D>;

/// The first operands of the products that put sums right, one for each constant of `D::raw`.
template <typename T, typename D, typename S>
struct Constants {
    uint32_t of[D::kTogether][4];

    QK_DEVICE Constants() {
        constexpr uint32_t one = Magic<T>::kOne;
        QK_UNROLL
        for (int s = 0; s < D::kTogether; s++) {
            const uint32_t constant =
                Decoding<T, D, S>::kConstants ? Decoding<T, D, S>::constants(s) : one;
            QK_UNROLL
            for (int i = 0; i < 4; i++) {
                of[s][i] = kept_in_all(i % 2 == 0 ? one : constant, s * 4 + i);
            }
        }
    }
};

/// Sums of a lane: rows q, q, q + 8 and q + 8 of W times columns 2j, 2j + 1, 2j and 2j + 1.
using Sums = float[4];

/// acc += the sum of a scale group, put right and scaled. sum_x: the group's sum of x; constants:
/// what the constants of `D::raw` have added.
template <typename T, typename D, typename S>
QK_DEVICE void add_group(float& acc, float sum, float sum_x, float constants,
                         const ScaleZero& scale) {
    using Traits = Decoding<T, D, S>;
    if (Traits::kConstants) {
        sum -= constants;
    }
    if (Traits::kRaw && D::kZero != 0 && !Traits::kZeroInConstants) {
        sum -= D::kZero * sum_x;
    }
    if (S::kHasMin) {
        acc -= scale.zero * sum_x;
    } else if (Traits::kRaw && S::kHasZero) {
        sum -= scale.zero * sum_x;
    }
    acc += scale.scale * (Traits::kRaw ? D::kFactor : 1) * sum;
}

/// acc += a tile's weights times its activations. raw: the tile's scales; then those of next_tile.
template <typename T, typename D, typename S, int ROW_TILES, int COLUMN_TILES>
QK_DEVICE void multiply(Sums (&acc)[ROW_TILES][COLUMN_TILES], const WeightOnlyArgs& args,
                        const Ring<D, ROW_TILES, false>& ring, int stage, int tile, int next_tile,
                        const Table& table, typename S::Raw (&raw)[ROW_TILES],
                        const typename S::Rows (&rows)[ROW_TILES],
                        const Constants<T, D, S>& constants) {
    using Traits = Decoding<T, D, S>;
    constexpr int slices = 2 * D::kPairs, groups = S::kGroups > 0 ? S::kGroups : slices;
    constexpr int slices_of_group = slices / groups;
    // Scale groups whose sums of x are in registers at a time.
    constexpr int together = groups * COLUMN_TILES <= 4 ? groups : 4 / COLUMN_TILES;
    const bool by_element = S::kGroups == 0 && args.scale_group < kSlice;
    S scalers[ROW_TILES];
    uint32_t x[COLUMN_TILES][D::kPairs][4];
    QK_UNROLL
    for (int i = 0; i < COLUMN_TILES * D::kPairs; i++) {
        const int c = i / D::kPairs, s = i % D::kPairs;
        load_matrix(x[c][s], ring.matrix[s] + stage + (c > 0 ? ring.next_rows : 0));
    }
    QK_UNROLL
    for (int first = 0; first < groups; first += together) {
        Sums ones[together][COLUMN_TILES] = {};
        if (Traits::kOnes || Traits::kConstants) {
            QK_UNROLL
            for (int i = 0; i < together * slices_of_group * COLUMN_TILES; i++) {
                const int c = i % COLUMN_TILES, g = i / COLUMN_TILES / slices_of_group;
                const int slice = first * slices_of_group + i / COLUMN_TILES, s = slice / 2;
                const uint32_t* b = x[c][s] + slice % 2 * 2;
                mma<T>(ones[g][c], constants.of[s % D::kTogether], b[0], b[1]);
            }
        }
        QK_UNROLL
        for (int r = 0; r < ROW_TILES; r++) {
            if (first == 0) {
                scalers[r].take(args, raw[r], tile);
                S::fetch(raw[r], args, rows[r], next_tile, kTile<D>);
            }
            const Packed<D> packed = ring.packed(stage, r);
            const Values<D> values =
                Traits::kRaw ? raw_values<D>(packed, table) : decode<D>(packed, table);
            QK_UNROLL
            for (int g = 0; g < together; g++) {
                const int group_slice = (first + g) * slices_of_group;
                const int kk = tile * kTile<D> + group_slice * kSlice;
                ScaleZero scales[2] = {{1, 0}, {1, 0}};
                uint32_t offset[2] = {D::offset(0), D::offset(0)};
                if (!by_element) {
                    QK_UNROLL
                    for (int i = 0; i < 2; i++) {
                        scales[i] = scalers[r].get(args, rows[r], i, first + g, kk);
                        offset[i] = D::offset(S::kHasMin ? 0 : scales[i].zero);
                    }
                }
                Sums sums[COLUMN_TILES] = {};
                QK_UNROLL
                for (int i = 0; i < slices_of_group; i++) {
                    const int s = (group_slice + i) / 2, p = (group_slice + i) % 2;
                    uint32_t a[4];
                    QK_UNROLL
                    for (int e = 0; e < 4; e++) {
                        a[e] = values.pairs[e % 2][p][e / 2][s];
                        a[e] = Traits::kRaw ? a[e] : D::finish(a[e], offset[e % 2]);
                    }
                    if constexpr (S::kGroups == 0) {
                        if (by_element) {
                            scale_elements<T>(a, args, rows[r].scales, kk + lane_index() % 4 * 2);
                        }
                    }
                    QK_UNROLL
                    for (int c = 0; c < COLUMN_TILES; c++) {
                        mma<T>(sums[c], a, x[c][s][p * 2], x[c][s][p * 2 + 1]);
                    }
                }
                QK_UNROLL
                for (int i = 0; i < COLUMN_TILES * 4; i++) {
                    const int c = i / 4, e = i % 4;
                    add_group<T, D, S>(acc[r][c][e], sums[c][e], ones[g][c][e % 2],
                                       ones[g][c][2 + e % 2], scales[e / 2]);
                }
            }
        }
    }
}

/// `multiply` for one row of x, whose slices are the columns of `ring.matrix`. acc: the lane's
/// share of the sums of rows q and q + 8.
template <typename T, typename D, typename S, int ROW_TILES>
QK_DEVICE void multiply_row(float (&acc)[ROW_TILES][2], const WeightOnlyArgs& args,
                            const Ring<D, ROW_TILES, true>& ring, int stage, int tile,
                            int next_tile, const Table& table, typename S::Own (&raw)[ROW_TILES],
                            const typename S::Rows (&rows)[ROW_TILES],
                            const Constants<T, D, S>& constants) {
    using Traits = Decoding<T, D, S>;
    constexpr int slices = 2 * D::kPairs, halves = S::own_halves(slices) ? 2 : 1;
    constexpr bool odd = S::own_odd(slices);
    uint32_t x[D::kPairs][4];
    Sums ones[halves] = {};
    QK_UNROLL
    for (int s = 0; s < D::kPairs; s++) {
        load_matrix(x[s], ring.matrix[s] + stage);
    }
    if (Traits::kOnes || Traits::kConstants) {
        QK_UNROLL
        for (int i = 0; i < slices; i++) {
            const uint32_t* b = x[i / 2] + i % 2 * 2;
            mma<T>(ones[i / 8 % halves], constants.of[i / 2 % D::kTogether], b[0], b[1]);
        }
    }
    QK_UNROLL
    for (int r = 0; r < ROW_TILES; r++) {
        ScaleZero scales[2][halves][2];
        QK_UNROLL
        for (int i = 0; i < 2 * halves * (odd ? 2 : 1); i++) {
            const int row = i % 2, half = i / 2 % halves, e = i / 2 / halves;
            scales[row][half][e] = S::own(args, raw[r], row, half, e, tile);
        }
        const Values<D> values = raw_values<D>(ring.packed(stage, r), table);
        Sums sums[halves] = {};
        QK_UNROLL
        for (int i = 0; i < slices; i++) {
            const int s = i / 2, p = i % 2;
            uint32_t a[4];
            QK_UNROLL
            for (int e = 0; e < 4; e++) {
                a[e] = values.pairs[e % 2][p][e / 2][s];
            }
            mma<T>(sums[i / 8 % halves], a, x[s][p * 2], x[s][p * 2 + 1]);
        }
        QK_UNROLL
        for (int half = 0; half < halves; half++) {
            QK_UNROLL
            for (int row = 0; row < 2; row++) {
                const float* sum = sums[half] + row * 2;
                QK_UNROLL
                for (int e = 0; e < (odd ? 2 : 1); e++) {
                    // The lane's two columns have one scale, or one each.
                    const float* one = ones[half];
                    add_group<T, D, S>(acc[r][row], odd ? sum[e] : sum[0] + sum[1],
                                       odd ? one[e] : one[0] + one[1],
                                       odd ? one[2 + e] : one[2] + one[3], scales[row][half][e]);
                }
            }
        }
        sync_warp();  // keeps the compiler from loading codes early, for which it has no registers
        S::fetch_own(raw[r], args, rows[r], next_tile, kTile<D>);
    }
}

/// The sums of output `at` of the rows of W x rows_x of this block: of its warps, and its outliers.
/// sums: shared memory (warps, outputs).
template <typename S, int COLUMNS>
QK_DEVICE float total_of(const float* sums, const float* sparse, int outputs, int at) {
    float total = 0;
    const int warps = threads_x() / 32;
    for (int w = 0; w < warps; w++) {
        total += load_shared(sums + w * outputs + at);
    }
    return S::kOutliers ? total + sparse_total<COLUMNS>(sparse, at) : total;
}

/// The scales that a lane loads of a tile.
template <typename S, bool ONE_ROW>
struct RawScales {
    using Type = typename S::Raw;
    QK_DEVICE static void fetch(Type& raw, const WeightOnlyArgs& args, const typename S::Rows& rows,
                                int tile, int features) {
        S::fetch(raw, args, rows, tile, features);
    }
};
template <typename S>
struct RawScales<S, true> {
    using Type = typename S::Own;
    QK_DEVICE static void fetch(Type& raw, const WeightOnlyArgs& args, const typename S::Rows& rows,
                                int tile, int features) {
        S::fetch_own(raw, args, rows, tile, features);
    }
};

/// Grid: (blocks of 8 COLUMN_TILES rows of x, or of 1 with 0, fastest, and of rows of W; split-K
/// slices).
template <typename T, typename D, typename S, int COLUMN_TILES>
__global__ void __launch_bounds__(256, (kFewRegisters<D, S, COLUMN_TILES> ? 2 : 1))
    weight_only_decode(const __grid_constant__ WeightOnlyArgs args) {
    constexpr bool one_row = COLUMN_TILES == 0;
    constexpr int columns = one_row ? 1 : COLUMN_TILES * 8, features = kTile<D>;
    constexpr int depth = kDecodeStages;
    constexpr int row_tiles = kRowTiles<D, S, COLUMN_TILES>, block_rows = row_tiles * 16;
    const int warps = threads_x() / 32;
    const int blocks_m = (args.m + columns - 1) / columns;
    const int m0 = block_index_x() % blocks_m * columns;
    const int first_row = block_index_x() / blocks_m * block_rows;
    const int n0 = first_row + block_rows <= args.n ? first_row : args.n - block_rows;
    const int rows_x = args.m - m0 < columns ? args.m - m0 : columns;
    const int begin = block_index_y() * args.k_slice;
    const int end = begin + args.k_slice < args.tiles ? begin + args.k_slice : args.tiles;

    // Shared memory: the codebook, sums of warps and a flag, sums of outliers, stages.
    unsigned char* const shared = shared_memory();
    auto* const book = reinterpret_cast<uint32_t*>(shared);
    auto* const sums = reinterpret_cast<float*>(shared + kDecodeBookBytes<T, D, S>);
    auto* const sparse = sums + warps * rows_x * block_rows + 64;
    auto* const stages = reinterpret_cast<unsigned char*>(
        sparse + (S::kOutliers ? kSparseFloats<columns> * int(threads_x()) / 32 : 0));
    const Ring<D, row_tiles, one_row> ring(stages + warp_index() * depth * args.stage_bytes, rows_x,
                                           args.stage_bytes);

    // The last kernel may write x, but not the weight: the copies of the weight start before the
    // wait.
    int tile = begin + int(uniform_warp_index());
    const int count = (end - tile + warps - 1) / warps;  // tiles of this warp, if any
    Source<T, D, row_tiles, COLUMN_TILES> source(args, n0, m0, rows_x, tile, tile + depth * warps);
    QK_UNROLL
    for (int i = 0; i < depth; i++) {
        if (i < count) {
            source.fetch_codes(ring, i * args.stage_bytes);
        }
        copy_async_commit();
    }
    const int row = kept(n0 + lane_index() / 4);
    typename S::Rows rows[row_tiles];
    using Raw = RawScales<S, one_row>;
    typename Raw::Type raw[row_tiles] = {};
    QK_UNROLL
    for (int r = 0; r < row_tiles; r++) {
        rows[r] = typename S::Rows(args, row + r * 16, row + r * 16 + 8);
        if (count > 0) {
            Raw::fetch(raw[r], args, rows[r], tile, features);
        }
    }
    load_book<D>(args, book, threads_x());
    Table table = load_table<D>(args, book);
    if (kHasPairs<T, D, S>) {
        fill_pairs(table, book);
        table.w[0] = kept(lane_index() * 4);
    }
    const Constants<T, D, S> constants;
    let_next_kernel_start();
    wait_for_last_kernel();
    for (int i = 0; i < depth && i < count; i++) {
        auto* const x = reinterpret_cast<Words4*>(ring.x + i * args.stage_bytes);
        if (args.x_chunks) {
            load_chunks<T, features>(&args, x, tile + i * warps, m0, rows_x);
        } else {
            gather_chunks<T, features>(&args, x, tile + i * warps, m0, rows_x);
        }
    }
    if (S::kOutliers) {
        sparse_sums<T, columns>(args, sparse, n0, m0);
    }
    if (kDecodeBookBytes<T, D, S> > 0) {
        sync_block();
    }

    std::conditional_t<one_row, float[row_tiles][2], Sums[row_tiles][COLUMN_TILES + one_row]> acc =
        {};
    int stage = 0;
    for (int left = count; left > 0; left--) {
        copy_async_wait<depth - 1>();
        sync_warp();  // other lanes' copies of x are there, too
        const int next_tile = left > 1 ? tile + warps : tile;
        if constexpr (one_row) {
            multiply_row<T, D, S, row_tiles>(acc, args, ring, stage, tile, next_tile, table, raw,
                                             rows, constants);
        } else {
            multiply<T, D, S, row_tiles, COLUMN_TILES>(acc, args, ring, stage, tile, next_tile,
                                                       table, raw, rows, constants);
        }
        sync_warp();  // no lane still reads the stage
        if (left > depth) {
            source.fetch_codes(ring, stage);
            if (args.x_chunks) {
                source.fetch_x(args, ring, stage, tile + depth * warps);
            } else {
                gather_chunks<T, features>(&args, reinterpret_cast<Words4*>(ring.x + stage),
                                           tile + depth * warps, m0, rows_x);
            }
        }
        copy_async_commit();
        tile += warps;
        stage += args.stage_bytes;
        stage = stage < depth * args.stage_bytes ? stage : 0;
    }

    const int q = lane_index() / 4, j = lane_index() % 4, outputs = rows_x * block_rows;
    if constexpr (one_row) {
        QK_UNROLL
        for (int i = 0; i < row_tiles * 2; i++) {
            float sum = acc[i / 2][i % 2];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (j == 0) {
                store_shared(sums + warp_index() * outputs + i * 8 + q, sum);
            }
        }
    } else {
        QK_UNROLL
        for (int i = 0; i < row_tiles * COLUMN_TILES * 4; i++) {
            const int r = i / (COLUMN_TILES * 4), c = i / 4 % COLUMN_TILES, e = i % 4;
            const int column = c * 8 + j * 2 + e % 2;
            if (column < rows_x) {
                const int at = column * block_rows + r * 16 + q + e / 2 * 8;
                store_shared(sums + warp_index() * outputs + at, acc[r][c][e]);
            }
        }
    }
    sync_block();
    const int k_slices = blocks_y();
    float* const parts = args.partial + int64_t(block_index_x()) * k_slices * columns * block_rows;
    if (k_slices > 1) {
        for (int at = thread_index(); at < outputs; at += threads_x()) {
            store_global(parts + block_index_y() * columns * block_rows + at,
                         total_of<S, columns>(sums, sparse, outputs, at));
        }
        int* const flag = reinterpret_cast<int*>(sums + warps * outputs);
        if (!is_last_part(args.counter + block_index_x(), k_slices, flag, thread_index() == 0,
                          sync_block)) {
            return;
        }
    }
    for (int at = thread_index(); at < outputs; at += threads_x()) {
        float total = 0;
        if (k_slices == 1) {
            total = total_of<S, columns>(sums, sparse, outputs, at);
        }
        for (int s = 0; k_slices > 1 && s < k_slices; s++) {
            total += load_l2(parts + s * columns * block_rows + at);
        }
        const int n = n0 + at % block_rows;
        if (n >= first_row) {
            store_output<T>(args, m0 + at / block_rows, n, total);
        }
    }
}

}  // namespace qk
