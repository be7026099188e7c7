// y = x @ W^T + bias for many rows of x: tensor cores, with codes and activations streamed through
// shared memory by cp.async, kStages deep.
//
// A block has 64 rows of W, 16 a warp, and COLUMNS rows of x; a step is one tile of the weight
// along K:
//
//      stage:  codes (64 rows x 64 bytes [+ up to 64 of high bits])   each lane's own 16 bytes
//              x (COLUMNS rows x features of a tile)                 16-byte chunk c of row m at
//                                                                    c ^ (m % 8), for ldmatrix
//
// Codes are decoded to operands of mma.m16n8k16 in registers, and each operand is used COLUMNS / 8
// times. Either the sums of a scale group are scaled, as in decode.h, or each weight is scaled and
// rounded to 16 bits once, which costs less than adding COLUMNS sums if scale groups are short. K
// is cut into split-K slices, which the block that finishes last adds in order.
#pragma once
#include "outliers.h"
#include "tile.h"

namespace qk {

constexpr int kGemmRows = 64, kStages = 4;

/// Rows of x of a block: fewer if tiles are long, so that four stages fit in 99 KiB.
template <typename D>
constexpr int kGemmColumns = D::kPairs == 8 ? 32 : 64;

/// Blocks per SM that the compiler leaves registers for; 0 lets the compiler choose. With a
/// codebook shared memory has no room for a third block, and the compiler would spill to make
/// registers for it.
template <typename D>
constexpr int kGemmBlocks = D::kBook > 0 ? 2 : 0;

/// Bytes of a stage: of its codes, of its high bits, and in all.
constexpr int kCodeBytes = kGemmRows * 64;
template <typename D>
constexpr int kHighBytes = kGemmRows * 16 * D::kHigh;
template <typename D>
constexpr int kStageBytes = kCodeBytes + kHighBytes<D> + kGemmColumns<D> * kTile<D> * 2;

/// A block's work tile (m0, n0), its tiles along K, and its stages in shared memory.
template <typename D>
struct GemmBlock {
    int m0, n0, begin, end;
    unsigned char* shared;

    QK_DEVICE unsigned char* codes(int step) const {
        return shared + step % kStages * kStageBytes<D>;
    }
    QK_DEVICE unsigned char* high_bits(int step) const { return codes(step) + kCodeBytes; }
    QK_DEVICE unsigned char* x(int step) const { return high_bits(step) + kHighBytes<D>; }
    /// 16-byte chunk c of row m of x.
    QK_DEVICE unsigned char* chunk(int step, int m, int c) const {
        return x(step) + (m * (kTile<D> / 8) + (c ^ m % 8)) * 16;
    }
};

/// Where this thread's copies of the next step come from. Its 16-byte units of codes and of high
/// bits are 128 units apart, or 32 in a warp, and its chunks of x are chunk t % kChunks of every
/// kApart-th row. So a step moves pointers by constants.
template <typename T, typename D>
class GemmSource {
    static constexpr int kChunks = kTile<D> / 8, kApart = kThreads / kChunks;
    static constexpr int kCopies = kGemmColumns<D> / kApart, kHighUnits = kHighBytes<D> / 16;
    static_assert(kCopies <= 32, "");

    const Words4 *codes_, *high_;
    const T* x_;
    int codes_left_, x_left_;   // steps
    uint32_t rows_;             // bit i: row i of x of this thread exists
    int rows_of_w_, features_;  // from the block's first row, and from this thread's chunk, on
    int unit_;

  public:
    QK_DEVICE GemmSource(const WeightOnlyArgs& args, const GemmBlock<D>& block)
        : codes_left_(block.end - block.begin), x_left_(codes_left_), rows_(0) {
        const int t = thread_index(), m = block.m0 + t / kChunks;
        const int64_t row = int64_t(block.begin) * args.n + block.n0;
        const int k = block.begin * kTile<D> + t % kChunks * 8;
        unit_ = warp_index() * 64 + lane_index();
        codes_ = args.qdata + row * 4 + unit_;
        high_ = static_cast<const Words4*>(args.qhigh) + row * D::kHigh + t;
        x_ = static_cast<const T*>(args.x) + int64_t(m) * args.x_stride + k;
        rows_of_w_ = args.n - block.n0;
        features_ = args.x_stride - k;
        QK_UNROLL
        for (int i = 0; i < kCopies; i++) {
            rows_ |= uint32_t(m + i * kApart < args.m) << i;
        }
    }
    /// Starts the copies of a step's codes. Rows and tiles that do not exist become zeros.
    QK_DEVICE void fetch_codes(const WeightOnlyArgs& args, const GemmBlock<D>& block, int step) {
        const int rows = codes_left_-- > 0 ? rows_of_w_ : 0, t = thread_index();
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            const int unit = unit_ + r * 32;
            copy_async(block.codes(step) + unit * 16, codes_ + r * 32, unit < rows * 4 ? 16 : 0);
        }
        codes_ += int64_t(args.n) * 4;
        if constexpr (D::kHigh > 0) {
            QK_UNROLL
            for (int i = 0; i * kThreads < kHighUnits; i++) {
                const int unit = i * kThreads + t;
                if (unit < kHighUnits) {
                    copy_async(block.high_bits(step) + unit * 16, high_ + i * kThreads,
                               unit < rows * D::kHigh ? 16 : 0);
                }
            }
            high_ += int64_t(args.n) * D::kHigh;
        }
    }
    /// Starts the copies of a step's activations. A row of x is a whole number of 16-byte chunks.
    QK_DEVICE void fetch_x(const WeightOnlyArgs& args, const GemmBlock<D>& block, int step) {
        const uint32_t rows = x_left_-- > 0 && features_ > 0 ? rows_ : 0;
        const int m = thread_index() / kChunks, c = thread_index() % kChunks;
        const T* from = x_;
        QK_UNROLL
        for (int i = 0; i < kCopies; i++) {
            copy_async(block.chunk(step, m + i * kApart, c), from, rows >> i & 1 ? 16 : 0);
            from += int64_t(kApart) * args.x_stride;
        }
        x_ += kTile<D>;
        features_ -= kTile<D>;
    }
};

/// A lane's part of a tile's scales, loaded before it is used. S: a scaler, see scalers.h.
template <typename D, typename S>
QK_DEVICE void fetch_scales(typename S::Raw& raw, const WeightOnlyArgs& args, int tile, int end,
                            const typename S::Rows& scale_rows) {
    if (tile < end) {
        S::fetch(raw, args, scale_rows, tile, kTile<D>);
    }
}

/// Loads a lane's codes of a step from shared memory.
template <typename D>
QK_DEVICE Packed<D> packed_of(const GemmBlock<D>& block, int step) {
    Packed<D> packed = {};
    const int q = lane_index() / 4, j = lane_index() % 4;
    QK_UNROLL
    for (int r = 0; r < 2; r++) {
        const int row = warp_index() * 16 + r * 8 + q;
        packed.low[r] =
            load_shared(reinterpret_cast<const Words4*>(block.codes(step)) + row * 4 + j);
        if (D::kHigh > 0) {
            packed.high[r] = load_shared(
                reinterpret_cast<const HighWords<D>*>(block.high_bits(step)) + row * 4 + j);
        }
    }
    return packed;
}

/// acc += one step.
template <typename T, typename D, typename S>
QK_DEVICE void multiply_step(float (&acc)[kGemmColumns<D> / 8][4], const WeightOnlyArgs& args,
                             const GemmBlock<D>& block, int step, const typename S::Raw& raw,
                             const Table& table, const typename S::Rows& scale_rows) {
    constexpr int columns = kGemmColumns<D> / 8;
    const Values<D> values = decode<D>(packed_of<D>(block, step), table);
    S scales;
    scales.take(args, raw, block.begin + step);
    const int j = lane_index() % 4;
    const bool by_element = S::kGroups == 0 && args.scale_group < kSlice;
    const int scale_group = S::kGroups == 0 ? args.scale_group : kTile<D> / kGroupsLoaded<S>;
    float sums[columns][4] = {};
    GroupScales<D, S> group_scales;
    QK_UNROLL
    for (int s = 0; s < D::kPairs; s++) {
        uint32_t x[columns][4];  // for each 8 rows of x, slices p = 0 and 1
        QK_UNROLL
        for (int c = 0; c < columns; c++) {
            load_matrix(x[c],
                        block.chunk(step, c * 8 + lane_index() % 8, s * 4 + lane_index() / 8));
        }
        QK_UNROLL
        for (int p = 0; p < 2; p++) {
            const int slice = s * 2 + p, kk = (block.begin + step) * kTile<D> + slice * kSlice;
            if (!by_element && slice * kSlice % scale_group == 0) {
                group_scales.take(scales, args, scale_rows, slice, kk);
            }
            uint32_t a[4];
            operand<D>(a, values, s, p, group_scales.offset);
            if constexpr (S::kElements) {
                QK_UNROLL
                for (int i = 0; i < 4; i++) {
                    a[i] = scaled_less_minimum<T>(a[i], group_scales.factor[i % 2],
                                                  group_scales.minimum[i % 2]);
                }
                QK_UNROLL
                for (int c = 0; c < columns; c++) {
                    mma<T>(acc[c], a, x[c][p * 2], x[c][p * 2 + 1]);
                }
                continue;
            }
            if constexpr (S::kGroups == 0) {
                if (by_element) {
                    scale_elements<T>(a, args, scale_rows.scales, kk + j * 2);
                }
            }
            const bool fold = by_element || (slice + 1) * kSlice % scale_group == 0;
            QK_UNROLL
            for (int c = 0; c < columns; c++) {
                mma<T>(sums[c], a, x[c][p * 2], x[c][p * 2 + 1]);
                if (fold) {
                    QK_UNROLL
                    for (int i = 0; i < 4; i++) {
                        acc[c][i] += group_scales.factor[i / 2] * sums[c][i];
                        sums[c][i] = 0;
                    }
                }
            }
        }
    }
}

/// Adds the split-K slices of the sums if this block is the last; returns whether it is.
template <int COUNT>
QK_DEVICE bool reduce_slices(float (&acc)[COUNT][4], const WeightOnlyArgs& args, int* last) {
    const int k_slices = blocks_y(), t = thread_index();
    if (k_slices == 1) {
        return true;
    }
    const int64_t block = block_index_x(), blocks = blocks_x(), outputs = COUNT * 4 * kThreads;
    float* mine = args.partial + (block_index_y() * blocks + block) * outputs + t;
    QK_UNROLL
    for (int i = 0; i < COUNT * 4; i++) {
        store_global(mine + i * kThreads, acc[i / 4][i % 4]);
        acc[i / 4][i % 4] = 0;
    }
    if (!is_last_part(args.counter + block_index_x(), k_slices, last, t == 0, sync_block)) {
        return false;
    }
    for (int s = 0; s < k_slices; s++) {
        const float* theirs = args.partial + (s * blocks + block) * outputs + t;
        QK_UNROLL
        for (int i = 0; i < COUNT * 4; i++) {
            acc[i / 4][i % 4] += load_l2(theirs + i * kThreads);
        }
    }
    return true;
}

/// Grid: (blocks of rows of x, fastest, and of 64 rows of W; split-K slices).
template <typename T, typename D, typename S>
__global__ void __launch_bounds__(kThreads, (kGemmBlocks<D>))
    weight_only_gemm(const __grid_constant__ WeightOnlyArgs args) {
    constexpr int columns = kGemmColumns<D>;
    const int blocks_m = (args.m + columns - 1) / columns, begin = block_index_y() * args.k_slice;
    const GemmBlock<D> block{int(block_index_x() % blocks_m * columns),
                             int(block_index_x() / blocks_m * kGemmRows), begin,
                             begin + args.k_slice < args.tiles ? begin + args.k_slice : args.tiles,
                             shared_memory() + kBookBytes<D>};
    const int q = lane_index() / 4, j = lane_index() % 4, first = block.n0 + warp_index() * 16 + q;
    const typename S::Rows scale_rows = rows_from<S>(args, first);

    // The last kernel may write x, but not the weight, so the loads of the weight start before the
    // wait.
    GemmSource<T, D> source(args, block);
    QK_UNROLL
    for (int step = 0; step < kStages - 1; step++) {
        source.fetch_codes(args, block, step);
    }
    typename S::Raw raw = {}, next = {};
    fetch_scales<D, S>(raw, args, block.begin, block.end, scale_rows);
    auto* const book = reinterpret_cast<uint32_t*>(shared_memory());
    load_book<D>(args, book, kThreads);
    const Table table = load_table<D>(args, book);
    let_next_kernel_start();
    wait_for_last_kernel();
    QK_UNROLL
    for (int step = 0; step < kStages - 1; step++) {
        source.fetch_x(args, block, step);
        copy_async_commit();
    }

    float acc[columns / 8][4] = {};
    if (S::kOutliers) {
        add_sparse<T>(acc, args, first, block.m0, block_index_y(), blocks_y());
    }
    for (int step = 0; step < block.end - block.begin; step++) {
        copy_async_wait<kStages - 2>();
        sync_block();  // all threads have this step's copies, and none still reads the last step
        source.fetch_codes(args, block, step + kStages - 1);
        source.fetch_x(args, block, step + kStages - 1);
        copy_async_commit();
        fetch_scales<D, S>(next, args, block.begin + step + 1, block.end, scale_rows);
        multiply_step<T, D, S>(acc, args, block, step, raw, table, scale_rows);
        raw = next;
    }
    copy_async_wait<0>();
    sync_block();

    if (!reduce_slices(acc, args, reinterpret_cast<int*>(shared_memory()))) {
        return;
    }
    QK_UNROLL
    for (int i = 0; i < columns / 8 * 4; i++) {
        const int n = first + i % 4 / 2 * 8, m = block.m0 + i / 4 * 8 + j * 2 + i % 2;
        if (n < args.n && m < args.m) {
            store_output<T>(args, m, n, acc[i / 4][i % 4]);
        }
    }
}

}  // namespace qk
