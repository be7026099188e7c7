// One tile of the packed weight in a warp's registers: loads, codes, products.
//
// A warp holds 16 rows of W, the first operand of mma.m16n8k16: lane (q, j), q = lane / 4, j = lane
// % 4, has rows q and q + 8 and of each slice of 16 features 2j, 2j+1, 2j+8, 2j+9. The layout puts
// just these features of all slices of a tile into the 16 bytes that the lane loads of a row.
#pragma once
#include <type_traits>

#include "../decoders/dispatch.h"
#include "../ptx/warp.h"
#include "quad_scalers.h"

namespace qk {

/// Threads of a block.
constexpr int kThreads = 128;
constexpr int kSlice = 16;

/// Features of a tile.
template <typename D>
constexpr int kTile = 32 * D::kPairs;

/// A lane's high bits of one tile and row.
template <typename D>
using HighWords =
    std::conditional_t<D::kHigh == 1, uint32_t, std::conditional_t<D::kHigh == 4, Words4, Words2>>;

/// Bytes of the codebook, at the start of shared memory.
template <typename D>
constexpr int kBookBytes = D::kBook * 4;

/// The high bits of word (p, h), for `split`.
template <typename D>
QK_DEVICE uint32_t high_bits(uint32_t word, int p, int h) {
    return word >> (p * 2 + h) * D::kHighStep;
}
template <typename D>
QK_DEVICE uint32_t high_bits(const Words2& words, int p, int h) {
    return D::kHigh > 0 ? words.w[h] >> p * D::kHighStep : 0;
}
template <typename D>
QK_DEVICE uint32_t high_bits(const Words4& words, int p, int h) {
    return words.w[p * 2 + h];
}

/// A lane's packed bytes of one tile, rows q and q + 8.
template <typename D>
struct Packed {
    Words4 low[2];
    HighWords<D> high[2];
};

/// Loads a lane's bytes; zeros past the last tile and the last row.
template <typename D>
QK_DEVICE Packed<D> load_packed(const WeightOnlyArgs& args, int tile, int end, const int (&rows)[2],
                                uint64_t policy) {
    Packed<D> packed = {};
    QK_UNROLL
    for (int r = 0; r < 2; r++) {
        if (tile < end && rows[r] < args.n) {
            const int64_t at = (int64_t(tile) * args.n + rows[r]) * 4 + lane_index() % 4;
            packed.low[r] = load_stream(args.qdata + at, policy);
            if (D::kHigh > 0) {
                packed.high[r] =
                    load_stream(static_cast<const HighWords<D>*>(args.qhigh) + at, policy);
            }
        }
    }
    return packed;
}

/// A tile's values: pairs[row][p][h][s], feature s*32 + p*16 + h*8 + 2j of the tile and its
/// neighbour.
template <typename D>
struct Values {
    uint32_t pairs[2][2][2][D::kPairs];
};

template <typename D>
QK_DEVICE Values<D> decode(const Packed<D>& packed, const Table& table) {
    Values<D> values;
    QK_UNROLL
    for (int r = 0; r < 2; r++) {
        QK_UNROLL
        for (int p = 0; p < 2; p++) {
            QK_UNROLL
            for (int h = 0; h < 2; h++) {
                const uint32_t high = high_bits<D>(packed.high[r], p, h);
                D::split(packed.low[r].w[p * 2 + h], high, table, values.pairs[r][p][h]);
            }
        }
    }
    return values;
}

/// The first operand of slice (s, p), zero points taken off.
template <typename D>
QK_DEVICE void operand(uint32_t (&a)[4], const Values<D>& values, int s, int p,
                       const uint32_t (&offset)[2]) {
    QK_UNROLL
    for (int h = 0; h < 2; h++) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            a[h * 2 + r] = D::finish(values.pairs[r][p][h][s], offset[r]);
        }
    }
}

/// Scales of a tile that a lane loads ahead.
template <typename S>
constexpr int kGroupsHeld = S::kGroups == 0 ? 1 : S::kGroups;

/// What the run of a slice is multiplied by and what is taken off it, for each of a lane's two
/// rows. S: a scaler, see scalers.h.
template <typename D, typename S>
struct GroupScales {
    float factor[2] = {1, 1}, minus[2] = {};
    uint32_t offset[2] = {};

    /// kk: the slice's first feature.
    QK_DEVICE void take(S& scales, const WeightOnlyArgs& args, const typename S::Rows& rows,
                        int slice, int kk) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            const int number = slice * kGroupsHeld<S> / (2 * D::kPairs);
            const ScaleZero found = scales.get(args, rows, r, number, kk);
            factor[r] = found.scale;
            minus[r] = S::kHasMin ? found.zero : 0;
            offset[r] = D::offset(S::kHasMin ? 0 : found.zero);
        }
    }
};

/// Both halves times a scale of their own, rounded to T once.
template <typename T>
QK_DEVICE uint32_t scaled(uint32_t both, float low, float high) {
    return round_pair<T>(to_float(low_of<T>(both)) * low, to_float(high_of<T>(both)) * high);
}
/// Both halves times a scale less a minimum, rounded to T once.
template <typename T>
QK_DEVICE uint32_t scaled_less(uint32_t both, float scale, float minus) {
    return round_pair<T>(to_float(low_of<T>(both)) * scale - minus,
                         to_float(high_of<T>(both)) * scale - minus);
}

/// The first operand of a slice, each weight times its own scale; kk: the lane's first feature of
/// it.
template <typename T>
QK_CALLED void scale_elements(uint32_t (&a)[4], const WeightOnlyArgs& args,
                              const RowScales (&scales)[2], int kk) {
    for (int i = 0; i < 4; i++) {
        const int at = kk + i / 2 * 8;
        const float low = scale_at(&args, scales[i % 2], at).scale;
        a[i] = scaled<T>(a[i], low, scale_at(&args, scales[i % 2], at + 1).scale);
    }
}

/// The codebook, where the decoder has one, to shared memory by all `threads` of a block: it is
/// there after the next barrier.
template <typename D>
QK_DEVICE void load_book(const WeightOnlyArgs& args, uint32_t* book, int threads) {
    for (int i = thread_index(); i < D::kBook; i += threads) {
        store_shared(book + i, load_global(args.table + i));
    }
}
/// The table, from global memory, where the decoder has one; with the codebook in shared memory.
template <typename D>
QK_DEVICE Table load_table(const WeightOnlyArgs& args, const uint32_t* book) {
    Table table = {{}, book};
    if (D::kTable) {
        QK_UNROLL
        for (int i = 0; i < 8; i++) {
            table.w[i] = load_global(args.table + i);
        }
    }
    return table;
}

/// Stores an output with its bias, as T, or in float32 for a transform to read.
template <typename T>
QK_DEVICE void store_output(const WeightOnlyArgs& args, int m, int n, float value) {
    const int64_t at = int64_t(m) * args.n + n;
    if (args.bias != nullptr) {
        value += to_float(load_global(static_cast<const T*>(args.bias) + n));
    }
    if (args.is_float) {
        store_global(static_cast<float*>(args.y) + at, value);
    } else {
        store_global(static_cast<T*>(args.y) + at, from_float<T>(value));
    }
}

/// Two neighbours of row m of x at feature kk of kernel order, 0 where there is none.
template <typename T>
QK_DEVICE uint32_t activations(const WeightOnlyArgs& args, int m, int kk) {
    const T* row = static_cast<const T*>(args.x) + int64_t(m) * args.k;
    if (args.perm == nullptr && args.k % 2 == 0) {
        return kk < args.k ? load_global(reinterpret_cast<const uint32_t*>(row + kk)) : 0;
    }
    T both[2] = {};
    QK_UNROLL
    for (int b = 0; b < 2; b++) {
        if (kk + b < args.kp) {
            const int k = args.perm == nullptr ? kk + b : load_global(args.perm + kk + b);
            if (k >= 0) {
                both[b] = load_global(row + k);
            }
        }
    }
    return pair(both[0], both[1]);
}

}  // namespace qk
