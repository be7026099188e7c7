// y = x @ W^T + bias for up to 16 rows of x: as fast as the weight can be read.
//
// A block has 32 rows of W, two operands of 16 rows, and one split-K slice. Its warps take the
// tiles of the slice in turn, each with a pipeline of its own in shared memory, so no warp waits
// for another until the sums are complete:
//
//          K: tiles of a split-K slice         columns = rows of x
//         w0  w1  w2 ... w7  w0  w1 ...        +---+
//       +---+---+---+   +---+---+---+          | x |
//    32 |   |   |   |   |   |   |   |  times   |   |  = 32 x 8 (or 16) sums in float32 a warp
//       +---+---+---+   +---+---+---+          +---+
//
// cp.async copies the packed bytes of a tile, kStagesAhead tiles of the warp ahead. A lane reads
// only codes that it copied itself. The rows of x, 8 or 16, are the columns of mma.m16n8k16; rows
// that do not exist are copies of the last one, and their sums are not stored. If N is not a
// multiple of 32, the last block begins earlier and computes some rows again, but does not store
// them.
//
// Weights enter the product as `D::raw` makes them: off by a constant, and without zero points. The
// sums are put right once a scale group, by one more product: its first operand has ones in rows
// 0-7, which give the group's sum of x, and the constants in rows 8-15.
//
// The sums of warps are added in order; then the block that finishes last adds the split-K slices
// in order. So the order of every sum depends on the weight's shape and the number of slices, never
// on M or on timing.
#pragma once
#include "outliers.h"
#include "tile.h"

namespace qk {

#ifndef QK_DECODE_WARPS
#define QK_DECODE_WARPS 8
#define QK_DECODE_STAGES 4
#define QK_DECODE_BLOCKS 2
#endif
constexpr int kDecodeWarps = QK_DECODE_WARPS, kDecodeThreads = kDecodeWarps * 32;
constexpr int kStagesAhead = QK_DECODE_STAGES, kRowTiles = 2, kDecodeRows = kRowTiles * 16;

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

/// Bytes of a warp's stage: codes, their high bits, and each row of x.
template <typename D>
constexpr int kStageX = kTile<D> * 2;
template <typename D>
constexpr int kStageHigh = kDecodeRows * 16 * D::kHigh;
constexpr int kStageCodes = kDecodeRows * 64;

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

/// Where a lane's next tile is in global memory.
template <typename T, typename D>
class Source {
  public:
    static constexpr int kChunks = kTile<D> / 8;  // of a row of x in a tile, 16 bytes each

    /// n0, m0: the block's first rows of W and of x.
    QK_DEVICE Source(const WeightOnlyArgs& args, int n0, int m0, int rows_x, int tile)
        : step_(int64_t(args.n) * (4 * kDecodeWarps)), policy_(evict_first()), rows_x_(rows_x) {
        const int q = lane_index() / 4, j = lane_index() % 4;
        const int64_t unit = (int64_t(tile) * args.n + n0 + q) * 4 + j;
        codes_ = args.qdata + unit;
        high_ = static_cast<const HighWords<D>*>(args.qhigh) + unit;
        // the first kStagesAhead tiles of x are not copied by this class
        kk_ = (tile + kStagesAhead * kDecodeWarps) * kTile<D> + int(lane_index() % kChunks) * 8;
        m_ = lane_index() / kChunks;
        at_ = chunk_at<kChunks>(m_, lane_index() % kChunks);
        x_ = static_cast<const T*>(args.x) + int64_t(m0 + m_) * args.k + kk_;
    }

    /// Starts the copies of the codes to a stage, and moves on to the warp's next tile.
    QK_DEVICE void fetch_codes(unsigned char* stage) {
        auto* codes = reinterpret_cast<Words4*>(stage) + lane_index();
        auto* high = reinterpret_cast<HighWords<D>*>(stage + kStageCodes) + lane_index();
        QK_UNROLL
        for (int r = 0; r < kRowTiles * 2; r++) {
            copy_async_stream(codes + r * 32, codes_ + r * 32, policy_);
            if (D::kHigh > 0) {
                copy_async_stream(high + r * 32, high_ + r * 32, policy_);
            }
        }
        codes_ += step_;
        if (D::kHigh > 0) {
            high_ += step_;
        }
    }

    /// The same for activations. They must be in kernel order, in whole chunks.
    QK_DEVICE void fetch_x(const WeightOnlyArgs& args, unsigned char* stage) {
        auto* to = reinterpret_cast<Words4*>(stage + kStageCodes + kStageHigh<D>);
        const uint32_t live = kk_ < args.k ? 16 : 0;
        if (m_ < rows_x_) {
            copy_async_l1(to + at_, x_, live);
        }
        constexpr int step = 32 / kChunks;
        if (rows_x_ > step) {
            const T* from = x_;
            QK_UNROLL_BY(1)
            for (int m = m_ + step; m < rows_x_; m += step) {
                from += int64_t(step) * args.k;
                copy_async_l1(to + chunk_at<kChunks>(m, lane_index() % kChunks), from, live);
            }
        }
        x_ += kDecodeWarps * kTile<D>;
        kk_ += kDecodeWarps * kTile<D>;
    }

  private:
    const Words4* codes_;
    const HighWords<D>* high_;
    const T* x_;
    int64_t step_;
    uint64_t policy_;
    int kk_, rows_x_;
    int m_, at_;  // the lane's first row of x, and the place of its chunk in a stage
};

/// A tile in registers.
template <typename D, int COLUMN_TILES>
struct DecodeTile {
    static constexpr int kChunks = kTile<D> / 8;
    Packed<D> packed[kRowTiles];
    uint32_t x[COLUMN_TILES][D::kPairs][4];

    QK_DEVICE DecodeTile(const unsigned char* stage, int rows_x) : packed{} {
        const auto* codes = reinterpret_cast<const Words4*>(stage) + lane_index();
        const auto* high =
            reinterpret_cast<const HighWords<D>*>(stage + kStageCodes) + lane_index();
        QK_UNROLL
        for (int r = 0; r < kRowTiles * 2; r++) {
            packed[r / 2].low[r % 2] = load_shared(codes + r * 32);
            if (D::kHigh > 0) {
                packed[r / 2].high[r % 2] = load_shared(high + r * 32);
            }
        }
        const auto* chunks = reinterpret_cast<const Words4*>(stage + kStageCodes + kStageHigh<D>);
        QK_UNROLL
        for (int c = 0; c < COLUMN_TILES; c++) {
            const int row = c * 8 + lane_index() % 8, m = row < rows_x ? row : rows_x - 1;
            QK_UNROLL
            for (int s = 0; s < D::kPairs; s++) {
                load_matrix(x[c][s], chunks + chunk_at<kChunks>(m, s * 4 + lane_index() / 8));
            }
        }
    }
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
                of[s][i] = in_register(i % 2 == 0 ? one : constant);
            }
        }
    }
};

template <int COLUMN_TILES>
using DecodeSums = float[kRowTiles][COLUMN_TILES][4];

/// acc += the sums of a scale group, put right and scaled.
template <typename T, typename D, typename S, int COLUMN_TILES>
QK_DEVICE void add_group(DecodeSums<COLUMN_TILES>& acc, const DecodeSums<COLUMN_TILES>& group,
                         const float (&ones)[COLUMN_TILES][4],
                         const ScaleZero (&scales)[kRowTiles][2]) {
    using Traits = Decoding<T, D, S>;
    QK_UNROLL
    for (int r = 0; r < kRowTiles; r++) {
        QK_UNROLL
        for (int c = 0; c < COLUMN_TILES; c++) {
            QK_UNROLL
            for (int i = 0; i < 4; i++) {
                const ScaleZero& scale = scales[r][i / 2];
                const float sum_x = ones[c][i % 2];
                float sum = group[r][c][i];
                if (Traits::kConstants) {
                    sum -= ones[c][2 + i % 2];
                }
                if (Traits::kRaw && D::kZero != 0 && !Traits::kZeroInConstants) {
                    sum -= D::kZero * sum_x;
                }
                if (S::kHasMin) {
                    acc[r][c][i] -= scale.zero * sum_x;
                } else if (Traits::kRaw && S::kHasZero) {
                    sum -= scale.zero * sum_x;
                }
                acc[r][c][i] += scale.scale * sum;
            }
        }
    }
}

/// The scales of a tile's rows.
template <typename S>
struct DecodeRows {
    typename S::Rows of[kRowTiles];
    QK_DEVICE DecodeRows(const WeightOnlyArgs& args, int first)
        : of{typename S::Rows(args, first, first + 8),
             typename S::Rows(args, first + 16, first + 24)} {}
};
template <typename S>
struct DecodeScales {
    typename S::Raw of[kRowTiles];
    QK_DEVICE void fetch(const WeightOnlyArgs& args, const DecodeRows<S>& rows, int tile,
                         int features) {
        QK_UNROLL
        for (int r = 0; r < kRowTiles; r++) {
            S::fetch(of[r], args, rows.of[r], tile, features);
        }
    }
};

/// acc += a tile's weights times its activations.
template <typename T, typename D, typename S, int COLUMN_TILES>
QK_DEVICE void multiply(DecodeSums<COLUMN_TILES>& acc, const WeightOnlyArgs& args,
                        const DecodeTile<D, COLUMN_TILES>& t, int tile, const Table& table,
                        S (&scalers)[kRowTiles], const DecodeRows<S>& rows,
                        const Constants<T, D, S>& constants) {
    using Traits = Decoding<T, D, S>;
    constexpr int slices = 2 * D::kPairs;
    constexpr bool raw_values = Traits::kRaw;
    Values<D> values[kRowTiles];
    QK_UNROLL
    for (int r = 0; r < kRowTiles; r++) {
        QK_UNROLL
        for (int i = 0; i < 8; i++) {
            const int row = i / 4, p = i / 2 % 2, h = i % 2;
            const uint32_t high = high_bits<D>(t.packed[r].high[row], p, h);
            const uint32_t low = t.packed[r].low[row].w[p * 2 + h];
            if (raw_values) {
                D::raw(low, high, table, values[r].pairs[row][p][h]);
            } else {
                D::split(low, high, table, values[r].pairs[row][p][h]);
            }
        }
    }
    const bool by_element = S::kGroups == 0 && args.scale_group < kSlice;
    const int scale_group = S::kGroups == 0 ? args.scale_group : kTile<D> / kGroupsLoaded<S>;
    DecodeSums<COLUMN_TILES> group = {};
    float ones[COLUMN_TILES][4] = {};
    ScaleZero scales[kRowTiles][2];
    uint32_t offset[kRowTiles][2];
    QK_UNROLL
    for (int slice = 0; slice < slices; slice++) {
        const int s = slice / 2, p = slice % 2, kk = tile * kTile<D> + slice * kSlice;
        if (!by_element && slice * kSlice % scale_group == 0) {
            QK_UNROLL
            for (int r = 0; r < kRowTiles; r++) {
                QK_UNROLL
                for (int i = 0; i < 2; i++) {
                    const int number = slice * kGroupsLoaded<S> / slices;
                    scales[r][i] = scalers[r].get(args, rows.of[r], i, number, kk);
                    scales[r][i].scale *= raw_values ? D::kFactor : 1;
                    if (!raw_values) {
                        offset[r][i] = D::offset(S::kHasMin ? 0 : scales[r][i].zero);
                    }
                }
            }
        }
        if (Traits::kOnes || Traits::kConstants) {
            QK_UNROLL
            for (int c = 0; c < COLUMN_TILES; c++) {
                mma<T>(ones[c], constants.of[s % D::kTogether], t.x[c][s][p * 2], t.x[c][s][p * 2 + 1]);
            }
        }
        QK_UNROLL
        for (int r = 0; r < kRowTiles; r++) {
            uint32_t a[4];
            QK_UNROLL
            for (int i = 0; i < 4; i++) {
                const uint32_t pair = values[r].pairs[i % 2][p][i / 2][s];
                a[i] = raw_values ? pair
                                  : D::finish(pair, by_element ? D::offset(0)
                                                               : offset[r][i % 2]);
            }
            if constexpr (S::kGroups == 0) {
                if (by_element) {
                    scale_elements<T>(a, args, rows.of[r].scales, kk + lane_index() % 4 * 2);
                }
            }
            QK_UNROLL
            for (int c = 0; c < COLUMN_TILES; c++) {
                mma<T>(group[r][c], a, t.x[c][s][p * 2], t.x[c][s][p * 2 + 1]);
            }
        }
        if (by_element || (slice + 1) * kSlice % scale_group == 0) {
            if (by_element) {
                QK_UNROLL
                for (int r = 0; r < kRowTiles; r++) {
                    scales[r][0] = scales[r][1] = {1, 0};
                }
            }
            add_group<T, D, S, COLUMN_TILES>(acc, group, ones, scales);
            QK_UNROLL
            for (int i = 0; i < kRowTiles * COLUMN_TILES * 4; i++) {
                group[i / (COLUMN_TILES * 4)][i / 4 % COLUMN_TILES][i % 4] = 0;
                ones[i / 4 % COLUMN_TILES][i % 4] = 0;
            }
        }
    }
}

/// Adds the sums of this block's warps and its outliers, and all split-K slices if this block is
/// the last: thread t gets outputs t, t + kDecodeThreads .. of 32 x rows_x. Returns whether this
/// block stores them. sums: shared memory (warps, rows_x, 32), and an int.
template <typename S, int COLUMN_TILES, int COUNT>
QK_DEVICE bool reduce(float (&totals)[COUNT], const WeightOnlyArgs& args,
                      const DecodeSums<COLUMN_TILES>& acc, float* sums, const float* sparse,
                      int rows_x) {
    const int t = thread_index(), q = lane_index() / 4, j = lane_index() % 4;
    QK_UNROLL
    for (int i = 0; i < kRowTiles * COLUMN_TILES * 4; i++) {
        const int r = i / (COLUMN_TILES * 4), c = i / 4 % COLUMN_TILES, e = i % 4;
        const int row = r * 16 + q + e / 2 * 8, column = c * 8 + j * 2 + e % 2;
        if (column < rows_x) {
            store_shared(sums + (warp_index() * rows_x + column) * kDecodeRows + row, acc[r][c][e]);
        }
    }
    sync_block();
    QK_UNROLL
    for (int i = 0; i < COUNT; i++) {
        const int at = t + i * kDecodeThreads;
        totals[i] = 0;
        if (at < rows_x * kDecodeRows) {
            QK_UNROLL
            for (int w = 0; w < kDecodeWarps; w++) {
                totals[i] += load_shared(sums + w * rows_x * kDecodeRows + at);
            }
            if (S::kOutliers) {
                totals[i] += sparse_total<kDecodeThreads, COLUMN_TILES * 8>(sparse, at);
            }
        }
    }
    const int k_slices = blocks_y(), outputs = COUNT * kDecodeThreads;
    if (k_slices == 1) {
        return true;
    }
    float* const parts = args.partial + int64_t(block_index_x()) * k_slices * outputs + t;
    QK_UNROLL
    for (int i = 0; i < COUNT; i++) {
        store_global(parts + block_index_y() * outputs + i * kDecodeThreads, totals[i]);
        totals[i] = 0;
    }
    int* const flag = reinterpret_cast<int*>(sums + kDecodeWarps * rows_x * kDecodeRows);
    if (!is_last_part(args.counter + block_index_x(), k_slices, flag)) {
        return false;
    }
    for (int s = 0; s < k_slices; s++) {
        QK_UNROLL
        for (int i = 0; i < COUNT; i++) {
            totals[i] += load_l2(parts + s * outputs + i * kDecodeThreads);
        }
    }
    return true;
}

/// Grid: (blocks of 8 COLUMN_TILES rows of x, fastest, and of 32 rows of W; split-K slices).
template <typename T, typename D, typename S, int COLUMN_TILES>
__global__ void __launch_bounds__(kDecodeThreads, QK_DECODE_BLOCKS)
    weight_only_decode(const __grid_constant__ WeightOnlyArgs args) {
    using From = Source<T, D>;
    constexpr int columns = COLUMN_TILES * 8, features = kTile<D>;
    const int blocks_m = (args.m + columns - 1) / columns;
    const int m0 = block_index_x() % blocks_m * columns;
    const int first_row = block_index_x() / blocks_m * kDecodeRows;
    const int n0 = first_row + kDecodeRows <= args.n ? first_row : args.n - kDecodeRows;
    const int rows_x = args.m - m0 < columns ? args.m - m0 : columns;
    const int begin = block_index_y() * args.k_slice;
    const int end = begin + args.k_slice < args.tiles ? begin + args.k_slice : args.tiles;

    unsigned char* const shared = shared_memory();
    auto* const book = reinterpret_cast<uint32_t*>(shared);
    auto* const sums = reinterpret_cast<float*>(shared + kBookBytes<D>);
    auto* const sparse = sums + kDecodeWarps * rows_x * kDecodeRows + 64;
    const int stage_bytes = kStageCodes + kStageHigh<D> + rows_x * kStageX<D>;
    unsigned char* const ring =
        reinterpret_cast<unsigned char*>(sparse) +
        (S::kOutliers ? kSparseBytes<kDecodeThreads, columns> : 0) +
        warp_index() * kStagesAhead * stage_bytes;
    const auto x_of = [=](unsigned char* stage) {
        return reinterpret_cast<Words4*>(stage + kStageCodes + kStageHigh<D>);
    };

    // The last kernel may write x, but not the weight: the copies of the weight start before the
    // wait.
    int tile = begin + int(uniform_warp_index());
    const int count = (end - tile + kDecodeWarps - 1) / kDecodeWarps;  // tiles of this warp, if any
    From from(args, n0, m0, rows_x, tile);
    QK_UNROLL
    for (int i = 0; i < kStagesAhead; i++) {
        if (i < count) {
            from.fetch_codes(ring + i * stage_bytes);
        }
        copy_async_commit();
    }
    const DecodeRows<S> rows(args, n0 + int(lane_index()) / 4);
    DecodeScales<S> next = {};
    if (count > 0) {
        next.fetch(args, rows, tile, features);
    }
    load_book<D>(args, book, kDecodeThreads);
    const Table table = load_table<D>(args, book);
    const Constants<T, D, S> constants;
    let_next_kernel_start();
    wait_for_last_kernel();
    for (int i = 0; i < kStagesAhead && i < count; i++) {
        const int at = tile + i * kDecodeWarps;
        if (args.x_chunks) {
            load_chunks<T, features>(&args, x_of(ring + i * stage_bytes), at, m0, rows_x);
        } else {
            gather_chunks<T, features>(&args, x_of(ring + i * stage_bytes), at, m0, rows_x);
        }
    }
    if (S::kOutliers) {
        sparse_sums<T, kDecodeThreads, columns>(args, sparse, n0, m0);
    }
    if (D::kBook > 0) {
        sync_block();
    }

    DecodeSums<COLUMN_TILES> acc = {};
    const int ring_bytes = kStagesAhead * stage_bytes;
    int at_stage = 0;
    for (int left = count; left > 0; left--) {
        copy_async_wait<kStagesAhead - 1>();
        sync_warp();  // other lanes' copies of x are there, too
        unsigned char* const stage = ring + at_stage;
        const DecodeTile<D, COLUMN_TILES> t(stage, rows_x);
        const DecodeScales<S> raw = next;
        S scalers[kRowTiles] = {S(args, raw.of[0], tile), S(args, raw.of[1], tile)};
        if (left > 1) {
            next.fetch(args, rows, tile + kDecodeWarps, features);
        }
        sync_warp();  // no lane still reads the stage
        if (left > kStagesAhead) {
            from.fetch_codes(stage);
            if (args.x_chunks) {
                from.fetch_x(args, stage);
            } else {
                gather_chunks<T, features>(&args, x_of(stage), tile + kStagesAhead * kDecodeWarps,
                                           m0, rows_x);
            }
        }
        copy_async_commit();
        multiply<T, D, S, COLUMN_TILES>(acc, args, t, tile, table, scalers, rows, constants);
        tile += kDecodeWarps;
        at_stage += stage_bytes;
        at_stage = at_stage < ring_bytes ? at_stage : 0;
    }

    float totals[(kDecodeRows * columns + kDecodeThreads - 1) / kDecodeThreads];
    if (reduce<S, COLUMN_TILES>(totals, args, acc, sums, sparse, rows_x)) {
        QK_UNROLL
        for (int i = 0; i < int(sizeof(totals) / sizeof(float)); i++) {
            const int at = thread_index() + i * kDecodeThreads;
            const int n = n0 + at % kDecodeRows;
            if (at < rows_x * kDecodeRows && n >= first_row) {
                store_output<T>(args, m0 + at / kDecodeRows, n, totals[i]);
            }
        }
    }
}

}  // namespace qk
