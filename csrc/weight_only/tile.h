// One tile of the packed weight in a warp's registers: loads, decoded values, fragments, scales.
//
// A warp holds 16 rows of W, which are the first operand of mma.m16n8k16. Lane (q, j), q = lane / 4
// and j = lane % 4, has rows q and q + 8. Of each slice of 16 features it has features 2j, 2j+1,
// 2j+8 and 2j+9. The layout puts these features, for all slices of a tile, into the 16 bytes of a
// row that the lane loads.
#pragma once
#include <type_traits>

#include "../decoders/e8p.h"
#include "../ptx/warp.h"
#include "quad_scalers.h"

namespace qk {

/// Threads of a block of the gemm; features of a slice, the K of one mma.
constexpr int kThreads = 128;
constexpr int kSlice = 16;

/// Features of a tile.
template <typename D>
constexpr int kTile = 32 * D::kPairs;

/// A lane's high bits of one tile and row.
template <typename D>
using HighWords =
    std::conditional_t<D::kHigh == 1, uint32_t, std::conditional_t<D::kHigh == 4, Words4, Words2>>;

/// Bytes of the codebook, which is at the start of shared memory.
template <typename D>
constexpr int kBookBytes = D::kBook * 4;

/// The high bits of word (p, h), as the decoder's `split` takes them.
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

/// A tile's decoded values: pairs[row][p][h][s] holds feature s*32 + p*16 + h*8 + 2j of the tile
/// and the next one.
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

/// A lane's values as `D::raw` makes them.
template <typename D>
QK_DEVICE Values<D> raw_values(const Packed<D>& packed, const Table& table) {
    Values<D> values;
    QK_UNROLL
    for (int i = 0; i < 8; i++) {
        const int row = i / 4, p = i / 2 % 2, h = i % 2;
        const uint32_t high = high_bits<D>(packed.high[row], p, h);
        D::raw(packed.low[row].w[p * 2 + h], high, table, values.pairs[row][p][h]);
    }
    return values;
}

/// The fragment of W for slice (s, p), with zero points subtracted.
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

/// Scale groups of a tile whose scales a lane loads before it uses the tile.
template <typename S>
constexpr int kGroupsLoaded = S::kGroups == 0 ? 1 : S::kGroups;

/// The `Rows` of rows first and first + 8. Rows past the last one read the scales of the last one;
/// their products are never stored.
template <typename S>
QK_DEVICE typename S::Rows rows_from(const WeightOnlyArgs& args, int first) {
    const int last = args.n - 1, second = first + 8;
    return typename S::Rows(args, kept(first < last ? first : last),
                            kept(second < last ? second : last));
}

/// The scale and the minimum or zero point of one scale group, for each of a lane's two rows.
/// factor: the scale. minimum: subtracted after scaling, with kHasMin. offset: the zero point, as
/// the decoder's `finish` takes it. S: a scaler, see scalers.h.
template <typename D, typename S>
struct GroupScales {
    float factor[2] = {1, 1}, minimum[2] = {};
    uint32_t offset[2] = {D::offset(0), D::offset(0)};

    /// Reads them for the scale group of `slice`. kk: the first feature of the slice.
    QK_DEVICE void take(S& scales, const WeightOnlyArgs& args, const typename S::Rows& rows,
                        int slice, int kk) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            const int number = slice * kGroupsLoaded<S> / (2 * D::kPairs);
            const ScaleZero scale_zero = scales.get(args, rows, r, number, kk);
            factor[r] = scale_zero.scale;
            minimum[r] = S::kHasMin ? scale_zero.zero : 0;
            offset[r] = D::offset(S::kHasMin ? 0 : scale_zero.zero);
        }
    }
};

/// Each half times its scale, rounded to T once.
template <typename T>
QK_DEVICE uint32_t scaled(uint32_t values, float low, float high) {
    return round_pair<T>(to_float(low_of<T>(values)) * low, to_float(high_of<T>(values)) * high);
}
/// Each half times the scale, less the minimum, rounded to T once.
template <typename T>
QK_DEVICE uint32_t scaled_less_minimum(uint32_t values, float scale, float minimum) {
    return round_pair<T>(to_float(low_of<T>(values)) * scale - minimum,
                         to_float(high_of<T>(values)) * scale - minimum);
}

/// Multiplies each weight of a fragment by its scale. kk: the lane's first feature of the slice.
template <typename T>
QK_NOINLINE void scale_elements(uint32_t (&a)[4], const WeightOnlyArgs& args,
                                const RowScales (&scales)[2], int kk) {
    for (int i = 0; i < 4; i++) {
        const int at = kk + i / 2 * 8;
        const float low = scale_at(&args, scales[i % 2], at).scale;
        a[i] = scaled<T>(a[i], low, scale_at(&args, scales[i % 2], at + 1).scale);
    }
}

/// Bytes of the table of pairs: 256 entries of a word for each lane, 256 bytes apart. No two lanes
/// read from one bank, whatever their codes.
constexpr int kPairsBytes = 64 * 1024;

/// Entry b of the table of pairs: the values of codes b % 16 and b / 16.
QK_DEVICE void fill_pairs(const Table& entries, uint32_t* pairs) {
    const auto value = [&](uint32_t code) {
        uint32_t bytes = 0;
        QK_UNROLL
        for (int i = 0; i < 4; i++) {  // a byte of entries 4 i .. 4 i + 3, for each plane
            const uint32_t pick = code % 4 | (code % 4 + 4) << 4;
            const uint32_t both = prmt(entries.w[i], entries.w[4 + i], pick) & 0xFFFF;
            bytes = code / 4 == uint32_t(i) ? both : bytes;
        }
        return bytes;
    };
    for (uint32_t b = warp_index(); b < 256; b += threads_x() / 32) {
        store_shared(pairs + b * 64 + lane_index(), value(b % 16) | value(b / 16) << 16);
    }
}

/// Copies the codebook, if the decoder has one, to shared memory, with all `threads` of a block. It
/// is there after the next barrier.
template <typename D>
QK_DEVICE void load_book(const WeightOnlyArgs& args, uint32_t* book, int threads) {
    for (int i = thread_index(); i < D::kBook; i += threads) {
        store_shared(book + i, load_global(args.table + i));
    }
}
/// Loads the table from global memory, if the decoder has one. book: the codebook in shared memory.
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

/// Stores one output plus its bias, as T, or in float32 if a transform reads it.
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

/// Whether the threads that `sync` synchronizes, a block or a warpgroup, are the last of `count`
/// that have stored parts of the same outputs; then the parts of all are visible. counter: 0 before
/// and after. flag: shared memory. leader: true for one of the threads.
template <typename Sync>
QK_DEVICE bool is_last_part(int* counter, int count, int* flag, bool leader, Sync sync) {
    sync();  // all have stored before one thread counts them
    if (leader) {
        const bool last = atomic_add_acq_rel(counter, 1) == count - 1;
        if (last) {
            store_global(counter, 0);  // the next call expects 0
        }
        store_shared(flag, int(last));
    }
    sync();
    return load_shared(flag) != 0;
}

/// Features kk and kk + 1, in kernel order, of row m of x; 0 for features that do not exist.
template <typename T>
QK_DEVICE uint32_t activations(const WeightOnlyArgs& args, int m, int kk) {
    const T* row = static_cast<const T*>(args.x) + int64_t(m) * args.k;
    if (args.perm == nullptr && args.k % 2 == 0) {
        return kk < args.k ? load_global(reinterpret_cast<const uint32_t*>(row + kk)) : 0;
    }
    T values[2] = {};
    QK_UNROLL
    for (int b = 0; b < 2; b++) {
        if (kk + b < args.kp) {
            const int k = args.perm == nullptr ? kk + b : load_global(args.perm + kk + b);
            if (k >= 0) {
                values[b] = load_global(row + k);
            }
        }
    }
    return pair(values[0], values[1]);
}

}  // namespace qk
