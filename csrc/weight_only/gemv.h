// y = x @ W^T + bias for up to 8 rows of x: the weight is read once, directly to registers.
//
// A block has 16 rows of W and one split-K slice; its four warps take the tiles of the slice in
// turn. Each warp keeps kDepth tiles of 16-byte loads in flight. The decoded weights are the first
// operand of mma.m16n8k16 and the rows of x (at most 8) are its 8 columns, so decoding costs the
// same for every M:
//
//          K: tiles of a split-K slice             columns = rows of x
//         w0  w1  w2  w3  w0  w1 ...               +---+
//       +---+---+---+---+---+---+                  | x |
//    16 |   |   |   |   |   |   |    times         |   |    = 16 x 8 sums in float32 a warp
//       +---+---+---+---+---+---+                  +---+
//
// If a scale group has 16 features or more, its sums are scaled, not its weights. The order of
// every sum depends only on the weight's shape and on `k_slice`: the sums of the warps are added in
// order, then the block that finishes last adds the split-K slices in order. The order never
// depends on M or on timing.
#pragma once
#include "outliers.h"
#include "tile.h"

namespace qk {

constexpr int kGemvWarps = kThreads / 32, kGemvThreads = kThreads;
constexpr int kGemvRows = 16, kGemvColumns = 8, kGemvOutputs = kGemvRows * kGemvColumns;

/// A lane's part of a tile that is loaded before it is used. S: a scaler, see scalers.h.
template <typename D, typename S>
struct FetchedTile {
    Packed<D> packed;
    typename S::Raw raw;
};

template <typename D, typename S>
QK_DEVICE void fetch_scales(FetchedTile<D, S>& fetched, const WeightOnlyArgs& args, int tile,
                            int end, const typename S::Rows& scale_rows) {
    if (tile < end) {
        S::fetch(fetched.raw, args, scale_rows, tile, kTile<D>);
    }
}
template <typename D, typename S>
QK_DEVICE void load_tile(FetchedTile<D, S>& fetched, const WeightOnlyArgs& args, int tile, int end,
                         const int (&rows)[2], const typename S::Rows& scale_rows,
                         uint64_t policy) {
    fetched.packed = load_packed<D>(args, tile, end, rows, policy);
    fetch_scales(fetched, args, tile, end, scale_rows);
}

/// Index of a 16-byte unit of staged activations: 32 features of one row are 4 units, one per j,
/// each with the pairs (p, h). Odd rows swap neighbouring groups of 4 units, so that 8 lanes
/// read from all banks.
QK_HOST_DEVICE int unit_of(int units, int m, int group, int j) {
    return m * units + ((group * 4 + j) ^ (m % 2 * 4));
}

/// Copies the activations of tiles [first, first + chunk) to shared memory, in the order of lanes.
template <typename T, typename D>
QK_DEVICE void stage(const WeightOnlyArgs& args, Words4* staged, int m0, int first) {
    const int units = args.chunk * D::kPairs * 4;
    const int rows = args.m - m0 < kGemvColumns ? args.m - m0 : kGemvColumns;
    for (int i = thread_index(); i < rows * units; i += kGemvThreads) {
        const int m = i / units, group = i % units / 4, j = i % 4;
        const int kk = first * kTile<D> + group * 32 + j * 2;
        Words4 unit;
        QK_UNROLL
        for (int ph = 0; ph < 4; ph++) {
            unit.w[ph] = activations<T>(args, m0 + m, kk + ph * 8);
        }
        store_shared(staged + unit_of(units, m, group, j), unit);
    }
}

/// acc += one tile times its activations, scaled. A minimum is subtracted once per scale group,
/// times the sum of the group's activations: the product of a matrix of ones with the activations
/// has that sum in the registers where `sums` has the row's.
template <typename T, typename D, typename S>
QK_DEVICE void multiply(float (&acc)[4], const WeightOnlyArgs& args,
                        const FetchedTile<D, S>& fetched, const Table& table,
                        const typename S::Rows& scale_rows, int tile, const Words4* staged,
                        int units, int group, bool live) {
    const Values<D> values = decode<D>(fetched.packed, table);
    S scales(args, fetched.raw, tile);
    const int q = lane_index() / 4, j = lane_index() % 4;
    const bool by_element = S::kGroups == 0 && args.scale_group < kSlice;
    const int scale_group = S::kGroups == 0 ? args.scale_group : kTile<D> / kGroupsLoaded<S>;
    float sums[4] = {}, x_sums[4] = {};
    GroupScales<D, S> group_scales;
    QK_UNROLL
    for (int slice = 0; slice < 2 * D::kPairs; slice++) {
        const int s = slice / 2, p = slice % 2, kk = tile * kTile<D> + slice * kSlice;
        if (!by_element && slice * kSlice % scale_group == 0) {
            group_scales.take(scales, args, scale_rows, slice, kk);
        }
        uint32_t a[4];
        operand<D>(a, values, s, p, group_scales.offset);
        if constexpr (S::kGroups == 0) {
            if (by_element) {
                scale_elements<T>(a, args, scale_rows.scales, kk + j * 2);
            }
        }
        Words2 x = {};
        if (live) {
            x = load_shared(
                reinterpret_cast<const Words2*>(staged + unit_of(units, q, group + s, j)) + p);
        }
        mma<T>(sums, a, x.w[0], x.w[1]);
        if (S::kHasMin) {
            constexpr uint32_t one = Magic<T>::kOne, ones[4] = {one, one, one, one};
            mma<T>(x_sums, ones, x.w[0], x.w[1]);
        }
        if (by_element || (slice + 1) * kSlice % scale_group == 0) {
            QK_UNROLL
            for (int i = 0; i < 4; i++) {
                acc[i] += group_scales.factor[i / 2] * sums[i];
                sums[i] = 0;
                if (S::kHasMin) {
                    acc[i] -= group_scales.minimum[i / 2] * x_sums[i];
                    x_sums[i] = 0;
                }
            }
        }
    }
}

/// Whether this block is the last split-K slice of its outputs; the other slices are in `partial`.
QK_DEVICE bool is_last_slice(const WeightOnlyArgs& args, int* last) {
    sync_block();  // all stores of this block are done before one thread counts it
    if (thread_index() == 0) {
        int* counter = args.counter + block_index_x();
        const bool is_last = atomic_add_acq_rel(counter, 1) == int(blocks_y()) - 1;
        if (is_last) {
            store_global(counter, 0);  // the next call expects 0
        }
        store_shared(last, int(is_last));
    }
    sync_block();
    return load_shared(last) != 0;
}

/// Adds the sums of this block's warps and its outliers, and all split-K slices if this block is
/// the last: thread i gets output i of 16 x 8. Returns whether this block stores the outputs.
QK_DEVICE bool reduce(float& total, const WeightOnlyArgs& args, const float (&acc)[4],
                      float* shared, const float* sparse) {
    const int t = thread_index(), q = lane_index() / 4, j = lane_index() % 4;
    sync_block();  // no thread still reads the activations
    QK_UNROLL
    for (int i = 0; i < 4; i++) {
        const int row = q + i / 2 * 8, column = j * 2 + i % 2;
        store_shared(shared + warp_index() * kGemvOutputs + column * kGemvRows + row, acc[i]);
    }
    sync_block();
    total = 0;
    QK_UNROLL
    for (int w = 0; w < kGemvWarps; w++) {
        total += load_shared(shared + w * kGemvOutputs + t);
    }
    if (sparse != nullptr) {
        total += sparse_total(sparse, t);
    }
    const int k_slices = blocks_y();
    if (k_slices == 1) {
        return true;
    }
    const int64_t block = block_index_x(), blocks = blocks_x();
    store_global(args.partial + (block_index_y() * blocks + block) * kGemvOutputs + t, total);
    if (!is_last_slice(args, reinterpret_cast<int*>(shared))) {
        return false;
    }
    total = 0;
    for (int s = 0; s < k_slices; s++) {
        total += load_l2(args.partial + (s * blocks + block) * kGemvOutputs + t);
    }
    return true;
}

/// Grid: (blocks of 8 rows of x, fastest, and of 16 rows of W; split-K slices).
template <typename T, typename D, typename S>
__global__ void __launch_bounds__(kGemvThreads)
    weight_only_gemv(const __grid_constant__ WeightOnlyArgs args) {
    const int blocks_m = (args.m + kGemvColumns - 1) / kGemvColumns;
    const int m0 = block_index_x() % blocks_m * kGemvColumns;
    const int n0 = block_index_x() / blocks_m * kGemvRows;
    const int q = lane_index() / 4;
    const int rows[2] = {n0 + q, n0 + q + 8};
    const typename S::Rows scale_rows(args, rows[0]);
    const int begin = block_index_y() * args.k_slice;
    const int end = begin + args.k_slice < args.tiles ? begin + args.k_slice : args.tiles;
    const uint64_t policy = evict_first();

    // The last kernel may write x, but not the weight, so the loads of the weight start before the
    // wait.
    constexpr int depth = S::kDepth;
    FetchedTile<D, S> fetched[depth];
    QK_UNROLL
    for (int d = 0; d < depth; d++) {
        load_tile(fetched[d], args, begin + d * kGemvWarps + warp_index(), end, rows, scale_rows,
                  policy);
    }
    auto* const book = reinterpret_cast<uint32_t*>(shared_memory());
    load_book<D>(args, book, kGemvThreads);
    const Table table = load_table<D>(args, book);
    let_next_kernel_start();
    wait_for_last_kernel();

    float* sparse =
        S::kOutliers ? reinterpret_cast<float*>(shared_memory() + kBookBytes<D>) : nullptr;
    unsigned char* const shared =
        shared_memory() + kBookBytes<D> + (S::kOutliers ? kSparseBytes : 0);
    if (S::kOutliers) {
        sparse_sums<T>(args, sparse, n0, m0);
    }
    Words4* staged = reinterpret_cast<Words4*>(shared);
    const int units = args.chunk * D::kPairs * 4;
    float acc[4] = {};
    for (int first = begin; first < end; first += args.chunk) {
        sync_block();
        stage<T, D>(args, staged, m0, first);
        sync_block();
        for (int step = 0; step < args.chunk; step += depth * kGemvWarps) {
            QK_UNROLL
            for (int d = 0; d < depth; d++) {
                const int local = step + d * kGemvWarps + warp_index(), tile = first + local;
                if (tile < end) {
                    multiply<T, D, S>(acc, args, fetched[d], table, scale_rows, tile, staged, units,
                                      local * D::kPairs, m0 + q < args.m);
                }
                load_tile(fetched[d], args, tile + depth * kGemvWarps, end, rows, scale_rows,
                          policy);
            }
        }
    }

    float total;
    if (reduce(total, args, acc, reinterpret_cast<float*>(shared), sparse)) {
        const int n = n0 + thread_index() % kGemvRows, m = m0 + thread_index() / kGemvRows;
        if (n < args.n && m < args.m) {
            store_output<T>(args, m, n, total);
        }
    }
}

}  // namespace qk
