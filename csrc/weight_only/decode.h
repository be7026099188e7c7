// y = x @ W^T + bias for up to 16 rows of x: as fast as the weight can be read.
//
// A block has 32 or 64 rows of W (kRows), operands of 16 rows each, and one split-K slice. Its
// warps take the tiles of the slice in turn, each with a pipeline of its own in shared memory, so
// no warp waits for another until the sums are complete:
//
//          K: tiles of a split-K slice         columns = rows of x
//         w0  w1  w2 ... w7  w0  w1 ...        +---+
//       +---+---+---+   +---+---+---+          | x |
//    32 |   |   |   |   |   |   |   |  times   |   |  = 32 x 8 (or 16) sums in float32 a warp
//       +---+---+---+   +---+---+---+          +---+
//
// cp.async copies the packed bytes of a tile and its activations, kDecodeStages tiles of the warp at a
// time. A lane reads only codes that it copied itself. The rows of x, 8 or 16, are the columns of
// mma.m16n8k16; rows that do not exist are copies of another, and their sums are not stored. If N
// is no multiple of kRows, the last block begins earlier: it computes some rows again, but does not
// store them.
//
// Weights enter the product as `D::raw` makes them: off by a constant, and without zero points. The
// sums are put right once a scale group, by one more product: its first operand has ones in rows
// 0-7, which give the group's sum of x, and the constants in rows 8-15.
//
// The sums of warps are added in order; then the block that finishes last adds the split-K slices
// in order. So the order of every sum depends on the weight, the number of slices and that of
// warps, never on M or on timing.
#pragma once
#include "outliers.h"
#include "tile.h"

namespace qk {

/// Tiles of a warp that are in shared memory at a time.
constexpr int kDecodeStages = 3;

/// Operands of 16 rows of W of a warp. More of them share the work for x, but need registers.
template <typename D, typename S, int COLUMN_TILES>
constexpr int kRowTiles =
    COLUMN_TILES == 1 && S::kGroups > 0 && S::kGroups <= 2 && D::kHigh == 0 && D::kBook == 0 ? 4
                                                                                             : 2;

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
    static constexpr bool kConstants = kRaw && D::added(0) + D::kZero != 0 && D::added(0) != 0;
    static constexpr bool kOnes =
        S::kHasMin || (kRaw && (S::kHasZero || (D::kZero != 0 && !kZeroInConstants)));

    /// Both halves of a register of the constants for slices of pair s.
    static QK_HOST_DEVICE constexpr uint32_t constants(int s) {
        return constant2<T>(D::added(s) + (kZeroInConstants ? D::kZero : 0));
    }
};

/// Index of chunk c of row m of x in a stage. Rows turn their chunks, so that `load_matrix` reads
/// from all banks.
template <int CHUNKS>
QK_DEVICE int chunk_at(int m, int c) {
    return m * CHUNKS + (c ^ m % 8);
}

/// Copies the activations of a tile for `rows` rows m0.. of x with one warp. x has whole chunks.
template <typename T, int TILE>
QK_DEVICE void load_chunks(const WeightOnlyArgs* args, Words4* to, int tile, int m0, int rows) {
    constexpr int chunks = TILE / 8, step = 32 / chunks, together = 4;
    const int c = lane_index() % chunks, kk = tile * TILE + c * 8;
    const T* from = static_cast<const T*>(args->x) + int64_t(m0) * args->k + kk;
    for (int m = lane_index() / chunks; m < rows; m += step * together) {
        Words4 words[together] = {};
        QK_UNROLL
        for (int i = 0; i < together; i++) {
            if (m + i * step < rows && kk < args->k) {
                words[i] = load_global(
                    reinterpret_cast<const Words4*>(from + int64_t(m + i * step) * args->k));
            }
        }
        QK_UNROLL
        for (int i = 0; i < together; i++) {
            if (m + i * step < rows) {
                store_shared(to + chunk_at<chunks>(m + i * step, c), words[i]);
            }
        }
    }
}
/// The same for any x, one feature at a time.
template <typename T, int TILE>
QK_NOINLINE void gather_chunks(const WeightOnlyArgs* args, Words4* to, int tile, int m0, int rows) {
    constexpr int chunks = TILE / 8;
    const int c = lane_index() % chunks;
    for (int m = lane_index() / chunks; m < rows; m += 32 / chunks) {
        Words4 words;
        QK_UNROLL
        for (int w = 0; w < 4; w++) {
            words.w[w] = activations<T>(*args, m0 + m, tile * TILE + c * 8 + w * 2);
        }
        store_shared(to + chunk_at<chunks>(m, c), words);
    }
}

/// Shared memory of a tile of a warp: codes, their high bits, and rows of x.
template <typename D, int ROW_TILES>
struct StageBytes {
    static constexpr int kCodes = ROW_TILES * 16 * 64, kHigh = ROW_TILES * 16 * 16 * D::kHigh;
    static constexpr int kX = kTile<D> * 2;  // of a row
};

/// The memory of a warp's pipeline: its first stage; stages follow one another.
template <typename D, int ROW_TILES>
struct Ring {
    using Bytes = StageBytes<D, ROW_TILES>;
    static constexpr int kChunks = kTile<D> / 8;  // of a row of x, 16 bytes each
    /// A lane's own codes and high bits, and the warp's chunks of x.
    unsigned char *codes, *high, *x;
    /// The chunks of x that the lane names to `load_matrix`, for each pair of slices; rows that do
    /// not exist are copies. next_rows: bytes to those of rows 8-15.
    unsigned char* matrix[D::kPairs];
    int next_rows;

    QK_DEVICE Ring(unsigned char* warp, int rows_x)
        : codes(kept(warp + lane_index() * 16)),
          high(warp + Bytes::kCodes + lane_index() * int(sizeof(HighWords<D>))),
          x(kept(warp + Bytes::kCodes + Bytes::kHigh)) {
        if (D::kHigh > 0) {
            high = kept(high);
        }
        const int row = lane_index() % 8, m = row < rows_x ? row : 0;
        QK_UNROLL
        for (int s = 0; s < D::kPairs; s++) {
            matrix[s] = kept(x + chunk_at<kChunks>(m, s * 4 + lane_index() / 8) * 16);
        }
        next_rows = kept(m + 8 < rows_x ? 8 * kChunks * 16 : 0);
    }

    /// The codes of rows q and q + 8 of operand r, in a stage that begins after `stage` bytes.
    QK_DEVICE Packed<D> packed(int stage, int r) const {
        Packed<D> packed = {};
        QK_UNROLL
        for (int i = 0; i < 2; i++) {
            const int at = (r * 2 + i) * 32;
            packed.low[i] = load_shared(reinterpret_cast<const Words4*>(codes + stage) + at);
            if (D::kHigh > 0) {
                packed.high[i] =
                    load_shared(reinterpret_cast<const HighWords<D>*>(high + stage) + at);
            }
        }
        return packed;
    }
};

/// Where a lane's next tile is in global memory.
template <typename T, typename D, int ROW_TILES, int COLUMN_TILES>
class Source {
  public:
    static constexpr int kChunks = kTile<D> / 8;

    /// n0, m0: the block's first rows of W and of x. tile, x_tile: the first tile of the weight and
    /// of x that is copied.
    QK_DEVICE Source(const WeightOnlyArgs& args, int n0, int m0, int rows_x, int tile, int x_tile)
        : policy_(evict_first()), rows_x_(kept_in_all(rows_x)) {
        const int64_t unit =
            (int64_t(tile) * args.n + n0 + lane_index() / 4) * 4 + lane_index() % 4;
        codes_ = args.qdata + unit;
        high_ = static_cast<const HighWords<D>*>(args.qhigh) + unit;
        kk_ = x_tile * kTile<D> + int(lane_index() % kChunks) * 8;
        m_ = lane_index() / kChunks;
        at_ = kept(chunk_at<kChunks>(m_, lane_index() % kChunks));
        x_ = static_cast<const T*>(args.x) + int64_t(m0 + m_) * args.k + kk_;
    }

    /// Starts the copies of the codes, and moves on to the warp's next tile. warps: of the block.
    QK_DEVICE void fetch_codes(const WeightOnlyArgs& args, const Ring<D, ROW_TILES>& ring,
                               int stage, int warps) {
        auto* codes = reinterpret_cast<Words4*>(ring.codes + stage);
        auto* high = reinterpret_cast<HighWords<D>*>(ring.high + stage);
        QK_UNROLL
        for (int r = 0; r < ROW_TILES * 2; r++) {
            copy_async_stream(codes + r * 32, codes_ + r * 32, policy_);
            if (D::kHigh > 0) {
                copy_async_stream(high + r * 32, high_ + r * 32, policy_);
            }
        }
        codes_ += int64_t(args.n) * (4 * warps);
        if (D::kHigh > 0) {
            high_ += int64_t(args.n) * (4 * warps);
        }
    }

    /// The same for activations. They must be in kernel order, in whole chunks.
    QK_DEVICE void fetch_x(const WeightOnlyArgs& args, const Ring<D, ROW_TILES>& ring, int stage,
                           int warps) {
        constexpr int step = 32 / kChunks;
        auto* x = reinterpret_cast<Words4*>(ring.x + stage);
        const uint32_t live = kk_ < args.k ? 16 : 0;
        copy_async_l1(x + at_, x_, live, m_ < rows_x_);
        if (args.m > step) {
            const T* from = x_;
            QK_UNROLL
            for (int i = 1; i < COLUMN_TILES * 8 / step; i++) {
                from += int64_t(step) * args.k;
                copy_async_l1(x + (at_ ^ i * step % 8) + i * 32, from, live,
                              m_ + i * step < rows_x_);
            }
        }
        x_ += warps * kTile<D>;
        kk_ += warps * kTile<D>;
    }

  private:
    const Words4* codes_;
    const HighWords<D>* high_;
    const T* x_;
    uint64_t policy_;
    int kk_, rows_x_;
    int m_, at_;  // the lane's first row of x, and the place of its chunk in a stage
};

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
                of[s][i] = kept_in_all(i % 2 == 0 ? one : constant);
            }
        }
    }
};

/// Sums of a lane: rows q, q, q + 8 and q + 8 of W times columns 2j, 2j + 1, 2j and 2j + 1.
using Sums = float[4];

/// acc += the sums of a scale group, put right and scaled. ones: the product of `Constants`.
template <typename T, typename D, typename S>
QK_DEVICE void add_group(Sums& acc, const Sums& group, const Sums& ones,
                         const ScaleZero (&scales)[2]) {
    using Traits = Decoding<T, D, S>;
    QK_UNROLL
    for (int i = 0; i < 4; i++) {
        const ScaleZero& scale = scales[i / 2];
        const float sum_x = ones[i % 2];
        float sum = group[i];
        if (Traits::kConstants) {
            sum -= ones[2 + i % 2];
        }
        if (Traits::kRaw && D::kZero != 0 && !Traits::kZeroInConstants) {
            sum -= D::kZero * sum_x;
        }
        if (S::kHasMin) {
            acc[i] -= scale.zero * sum_x;
        } else if (Traits::kRaw && S::kHasZero) {
            sum -= scale.zero * sum_x;
        }
        acc[i] += scale.scale * sum;
    }
}

/// acc += a tile's weights times its activations.
template <typename T, typename D, typename S, int ROW_TILES, int COLUMN_TILES>
QK_DEVICE void multiply(Sums (&acc)[ROW_TILES][COLUMN_TILES], const WeightOnlyArgs& args,
                        const Ring<D, ROW_TILES>& ring, int stage, int tile, const Table& table,
                        S (&scalers)[ROW_TILES], const typename S::Rows (&rows)[ROW_TILES],
                        const Constants<T, D, S>& constants) {
    using Traits = Decoding<T, D, S>;
    constexpr int slices = 2 * D::kPairs, groups = S::kGroups > 0 ? S::kGroups : slices;
    constexpr int slices_of_group = slices / groups;
    // Scale groups whose sums of x are in registers at a time.
    constexpr int together = groups * COLUMN_TILES <= 4 ? groups : 4 / COLUMN_TILES;
    const bool by_element = S::kGroups == 0 && args.scale_group < kSlice;
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
            const Packed<D> packed = ring.packed(stage, r);
            Values<D> values;
            QK_UNROLL
            for (int i = 0; i < 8; i++) {
                const int row = i / 4, p = i / 2 % 2, h = i % 2;
                const uint32_t high = high_bits<D>(packed.high[row], p, h);
                const uint32_t low = packed.low[row].w[p * 2 + h];
                if (Traits::kRaw) {
                    D::raw(low, high, table, values.pairs[row][p][h]);
                } else {
                    D::split(low, high, table, values.pairs[row][p][h]);
                }
            }
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
                        scales[i].scale *= Traits::kRaw ? D::kFactor : 1;
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
                for (int c = 0; c < COLUMN_TILES; c++) {
                    add_group<T, D, S>(acc[r][c], sums[c], ones[g][c], scales);
                }
            }
        }
    }
}

/// The sums of output `at` of 16 ROW_TILES x rows_x of this block: of its warps, and its outliers.
/// sums: shared memory (warps, rows_x, 16 ROW_TILES).
template <typename S, int COLUMN_TILES>
QK_DEVICE float total_of(const float* sums, const float* sparse, int outputs, int at) {
    float total = 0;
    const int warps = threads_x() / 32;
    for (int w = 0; w < warps; w++) {
        total += load_shared(sums + w * outputs + at);
    }
    return S::kOutliers ? total + sparse_total<COLUMN_TILES * 8>(sparse, at) : total;
}

/// Grid: (blocks of 8 COLUMN_TILES rows of x, fastest, and of rows of W; split-K slices).
template <typename T, typename D, typename S, int COLUMN_TILES>
__global__ void __launch_bounds__(256, (kRowTiles<D, S, COLUMN_TILES> > 2 ? 1 : 2))
    weight_only_decode(const __grid_constant__ WeightOnlyArgs args) {
    constexpr int columns = COLUMN_TILES * 8, features = kTile<D>;
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
    auto* const sums = reinterpret_cast<float*>(shared + kBookBytes<D>);
    auto* const sparse = sums + warps * rows_x * block_rows + 64;
    auto* const stages = reinterpret_cast<unsigned char*>(
        sparse + (S::kOutliers ? kSparseFloats<columns> * int(threads_x()) / 32 : 0));
    const Ring<D, row_tiles> ring(stages + warp_index() * kDecodeStages * args.stage_bytes, rows_x);

    // The last kernel may write x, but not the weight: the copies of the weight start before the
    // wait.
    int tile = begin + int(uniform_warp_index());
    const int count = (end - tile + warps - 1) / warps;  // tiles of this warp, if any
    Source<T, D, row_tiles, COLUMN_TILES> source(args, n0, m0, rows_x, tile,
                                                 tile + kDecodeStages * warps);
    QK_UNROLL
    for (int i = 0; i < kDecodeStages; i++) {
        if (i < count) {
            source.fetch_codes(args, ring, i * args.stage_bytes, warps);
        }
        copy_async_commit();
    }
    const int row = kept(n0 + lane_index() / 4);
    typename S::Rows rows[row_tiles];
    typename S::Raw raw[row_tiles] = {};
    QK_UNROLL
    for (int r = 0; r < row_tiles; r++) {
        rows[r] = typename S::Rows(args, row + r * 16, row + r * 16 + 8);
        if (count > 0) {
            S::fetch(raw[r], args, rows[r], tile, features);
        }
    }
    load_book<D>(args, book, threads_x());
    const Table table = load_table<D>(args, book);
    const Constants<T, D, S> constants;
    let_next_kernel_start();
    wait_for_last_kernel();
    for (int i = 0; i < kDecodeStages && i < count; i++) {
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
    if (D::kBook > 0) {
        sync_block();
    }

    Sums acc[row_tiles][COLUMN_TILES] = {};
    int stage = 0;
    for (int left = count; left > 0; left--) {
        copy_async_wait<kDecodeStages - 1>();
        sync_warp();  // other lanes' copies of x are there, too
        {
            S scalers[row_tiles];
            QK_UNROLL
            for (int r = 0; r < row_tiles; r++) {
                scalers[r].take(args, raw[r], tile);
            }
            if (left > 1) {
                QK_UNROLL
                for (int r = 0; r < row_tiles; r++) {
                    S::fetch(raw[r], args, rows[r], tile + warps, features);
                }
            }
            multiply<T, D, S, row_tiles, COLUMN_TILES>(acc, args, ring, stage, tile, table,
                                                       scalers, rows, constants);
        }
        sync_warp();  // no lane still reads the stage
        if (left > kDecodeStages) {
            source.fetch_codes(args, ring, stage, warps);
            if (args.x_chunks) {
                source.fetch_x(args, ring, stage, warps);
            } else {
                gather_chunks<T, features>(&args, reinterpret_cast<Words4*>(ring.x + stage),
                                           tile + kDecodeStages * warps, m0, rows_x);
            }
        }
        copy_async_commit();
        tile += warps;
        stage += args.stage_bytes;
        stage = stage < kDecodeStages * args.stage_bytes ? stage : 0;
    }

    const int q = lane_index() / 4, j = lane_index() % 4, outputs = rows_x * block_rows;
    QK_UNROLL
    for (int i = 0; i < row_tiles * COLUMN_TILES * 4; i++) {
        const int r = i / (COLUMN_TILES * 4), c = i / 4 % COLUMN_TILES, e = i % 4;
        const int column = c * 8 + j * 2 + e % 2;
        if (column < rows_x) {
            const int at = column * block_rows + r * 16 + q + e / 2 * 8;
            store_shared(sums + warp_index() * outputs + at, acc[r][c][e]);
        }
    }
    sync_block();
    const int k_slices = blocks_y();
    float* const parts = args.partial + int64_t(block_index_x()) * k_slices * columns * block_rows;
    if (k_slices > 1) {
        for (int at = thread_index(); at < outputs; at += threads_x()) {
            store_global(parts + block_index_y() * columns * block_rows + at,
                         total_of<S, COLUMN_TILES>(sums, sparse, outputs, at));
        }
        int* const flag = reinterpret_cast<int*>(sums + warps * outputs);
        if (!is_last_part(args.counter + block_index_x(), k_slices, flag)) {
            return;
        }
    }
    for (int at = thread_index(); at < outputs; at += threads_x()) {
        float total = 0;
        if (k_slices == 1) {
            total = total_of<S, COLUMN_TILES>(sums, sparse, outputs, at);
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
