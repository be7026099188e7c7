// The memory of the decode kernel (decode.h): each warp's pipeline in shared memory, and where its
// bytes come from.
//
//   a stage, one tile of a warp:   codes of 32 or 64 rows of W, 512 bytes for each 8 rows: lane
//                                  (q, j) has 16 of row q
//                                  their high bits, 4 to 16 bytes a lane alike
//                                  each row of x, its 16-byte chunks turned by the row's number
//                                  (one row of x: a chunk of zeros)
#pragma once
#include "tile.h"

namespace qk {

/// Tiles of a warp that are in shared memory at a time.
constexpr int kDecodeStages = 3;

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

/// Shared memory of a tile of a warp: codes, their high bits, and rows of x. With one row of x, 16
/// bytes of zeros and padding follow.
template <typename D, int ROW_TILES>
struct StageBytes {
    static constexpr int kCodes = ROW_TILES * 16 * 64, kHigh = ROW_TILES * 16 * 16 * D::kHigh;
};

/// The memory of a warp's pipeline: its first stage; stages follow one another.
template <typename D, int ROW_TILES, bool ONE_ROW>
struct Ring {
    using Bytes = StageBytes<D, ROW_TILES>;
    static constexpr int kChunks = kTile<D> / 8;  // of a row of x, 16 bytes each
    /// A lane's own codes and high bits, and the warp's chunks of x.
    unsigned char *codes, *high, *x;
    /// The chunks of x that the lane names to `load_matrix`, for each pair of slices; rows that do
    /// not exist are copies. next_rows: bytes to those of rows 8-15.
    unsigned char* matrix[D::kPairs];
    int next_rows;

    QK_DEVICE Ring(unsigned char* warp, int rows_x, int stage_bytes)
        : codes(kept(warp + lane_index() * 16)),
          high(warp + Bytes::kCodes + lane_index() * int(sizeof(HighWords<D>))),
          x(kept(warp + Bytes::kCodes + Bytes::kHigh)) {
        if (D::kHigh > 0) {
            high = kept(high);
        }
        const int row = lane_index() % 8, m = row < rows_x ? row : 0, part = lane_index() / 8;
        QK_UNROLL
        for (int s = 0; s < D::kPairs; s++) {
            const bool zero = ONE_ROW && (s * 2 + part / 2) % 8 != row;
            const int chunk = ONE_ROW ? s * 4 + part : chunk_at<kChunks>(m, s * 4 + part);
            matrix[s] = kept(x + (zero ? kChunks : chunk) * 16);
        }
        if (ONE_ROW && lane_index() < kDecodeStages) {
            auto* const zeros = reinterpret_cast<Words4*>(x + lane_index() * stage_bytes);
            store_shared(zeros + kChunks, Words4{});
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
    using Memory = Ring<D, ROW_TILES, COLUMN_TILES == 0>;
    static constexpr int kChunks = kTile<D> / 8;

    /// n0, m0: the block's first rows of W and of x. tile, x_tile: the first tile of the weight and
    /// of x that is copied.
    QK_DEVICE Source(const WeightOnlyArgs& args, int n0, int m0, int rows_x, int tile, int x_tile)
        : policy_(evict_first()),
          step_(kept_in_all(args.n * 4 * (threads_x() / 32))),
          x_step_(kept_in_all(threads_x() / 32 * kTile<D>)) {
        const int64_t unit =
            (int64_t(tile) * args.n + n0 + lane_index() / 4) * 4 + lane_index() % 4;
        codes_ = reinterpret_cast<const unsigned char*>(args.qdata) + unit * 16;
        high_ = static_cast<const unsigned char*>(args.qhigh) + unit * int(sizeof(HighWords<D>));
        const int kk = x_tile * kTile<D> + int(lane_index() % kChunks) * 8;
        const int m = lane_index() / kChunks;
        rows_left_ = kept(rows_x - m);
        at_ = kept(chunk_at<kChunks>(m, lane_index() % kChunks));
        x_ = static_cast<const T*>(args.x) + int64_t(m0 + m) * args.k + kk;
    }

    /// Starts the copies of the codes, and moves on to the warp's next tile.
    QK_DEVICE void fetch_codes(const Memory& ring, int stage) {
        auto* to = reinterpret_cast<Words4*>(ring.codes + stage);
        const auto* from = reinterpret_cast<const Words4*>(codes_);
        auto* high_to = reinterpret_cast<HighWords<D>*>(ring.high + stage);
        const auto* high_from = reinterpret_cast<const HighWords<D>*>(high_);
        QK_UNROLL
        for (int r = 0; r < ROW_TILES * 2; r++) {
            copy_async_stream(to + r * 32, from + r * 32, policy_);
            if (D::kHigh > 0) {
                copy_async_stream(high_to + r * 32, high_from + r * 32, policy_);
            }
        }
        codes_ += step_ * 16;
        if (D::kHigh > 0) {
            high_ += step_ * unsigned(sizeof(HighWords<D>));
        }
    }

    /// The same for the activations of `tile`. They must be in kernel order, in whole chunks.
    QK_DEVICE void fetch_x(const WeightOnlyArgs& args, const Memory& ring, int stage, int tile) {
        auto* x = reinterpret_cast<Words4*>(ring.x + stage);
        if (args.x_tail && (tile + 1) * kTile<D> > args.k) {  // K ends inside the tile
            const bool live = tile * kTile<D> + int(lane_index() % kChunks) * 8 < args.k;
            QK_UNROLL
            for (int i = 0; i < kTimes; i++) {
                if (rows_left_ > i * step) {
                    copy_async_l1(x + place(i), x_ + int64_t(i * step) * args.k, live ? 16 : 0);
                }
            }
            return;
        }
        copy_async_l1_if(rows_left_ > 0, x + place(0), x_);
        if (args.m > step) {
            QK_UNROLL
            for (int i = 1; i < kTimes; i++) {
                const T* from = x_ + int64_t(i * step) * args.k;
                copy_async_l1_if(rows_left_ > i * step, x + place(i), from);
            }
        }
        x_ += x_step_;
    }

  private:
    /// Rows of x that a warp copies at a time, and how often; with one row it copies once.
    static constexpr int step = 32 / kChunks,
                         kTimes = COLUMN_TILES == 0 ? 1 : COLUMN_TILES * 8 / step;
    /// The place of the lane's chunk of its row number i in a stage.
    QK_DEVICE int place(int i) const { return (at_ ^ i * step % 8) + i * 32; }

    const unsigned char *codes_, *high_;
    const T* x_;
    uint64_t policy_;
    uint32_t step_, x_step_;  // from tile to tile of the warp: lanes' codes, features
    int rows_left_;           // rows of x from the lane's first one on
    int at_;                  // the place of the lane's chunk in a stage
};

}  // namespace qk
