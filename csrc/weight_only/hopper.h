// y = x @ W^T + bias for many rows of x on Hopper: wgmma takes the decoded and scaled weights from
// registers and x from shared memory. TMA copies the codes and x to shared memory.
//
// A block has three warpgroups (ptx/pipeline.h). One thread of the first starts the copies; the
// other two multiply 64 rows of W each by COLUMNS rows of x, in chunks of 64 features:
//
//        x ring, chunks                      codes ring, tiles                warpgroup 1, 2
//      +-----------------------+     +--------------------------+
//      | COLUMNS rows x 128 B, |     | 128 rows x 64 B          |      codes -> registers -> values
//      | swizzled              | ... | [+ high bits of each row]| ...  x scale -> operand a[i % 2]
//      +-----------------------+     +--------------------------+      sums += a * x^T   (wgmma)
//        full / empty barriers          full / empty barriers
//
// While the tensor core multiplies slice i (16 features), the warps prepare slice i + 1. A warp
// loads the codes of a whole tile at once, so their ring stage is free again early. Weights are
// scaled in float32 and rounded once; if a row has only one scale, sums are scaled instead. The
// kernel is persistent (one block per SM): a block computes one work tile after another, and the
// copies for the next one start while the last one is stored. K is never cut, so sums do not depend
// on M.
#pragma once
#include "../ptx/pipeline.h"
#include "../ptx/wgmma.h"
#include "gemm.h"

namespace qk {

constexpr int kHopperRows = 128, kChunk = 64;

struct HopperArgs {
    WeightOnlyArgs weight;
    TensorMap x;
};

/// Rows of x of a block: fewer if a tile's values or the outliers need the registers of half the
/// sums.
template <typename D, typename S>
constexpr int kHopperColumns = D::kPairs == 8 || S::kOutliers ? 128 : 256;

/// Bytes of the high bits of one row of a tile.
template <typename D>
constexpr int kHighRow = D::kHigh > 0 ? 4 * int(sizeof(HighWords<D>)) : 0;

/// Layout of shared memory.
template <typename D, int COLUMNS>
struct HopperShared {
    static constexpr int kChunkBytes = COLUMNS * 128, kChunks = COLUMNS == 256 ? 4 : 6;
    static constexpr int kLowBytes = kHopperRows * 64;
    static constexpr int kHighBytes = kHopperRows * kHighRow<D>;
    static constexpr int kTileBytes = kLowBytes + kHighBytes, kTiles = D::kHigh > 0 ? 2 : 3;
    static constexpr int kOutBytes = kHopperRows * COLUMNS * 2;
    static constexpr int kCodesAt = kChunks * kChunkBytes, kOutAt = kCodesAt + kTiles * kTileBytes;
    static constexpr int kBarriersAt = kOutAt + kOutBytes;
    static constexpr int kBookAt = kBarriersAt + 2 * (kChunks + kTiles) * int(sizeof(Barrier));
    static constexpr int kBytes = kBookAt + kBookBytes<D>;

    unsigned char* start;
    QK_DEVICE unsigned char* chunk(int i) const { return start + i * kChunkBytes; }
    QK_DEVICE unsigned char* codes(int i) const { return start + kCodesAt + i * kTileBytes; }
    QK_DEVICE unsigned char* out(int warpgroup) const {
        return start + kOutAt + warpgroup * (kOutBytes / 2);
    }
    QK_DEVICE uint32_t* book() const { return reinterpret_cast<uint32_t*>(start + kBookAt); }
    QK_DEVICE Barrier* barriers() const { return reinterpret_cast<Barrier*>(start + kBarriersAt); }
    QK_DEVICE Barrier* chunk_full(int i) const { return barriers() + i; }
    QK_DEVICE Barrier* chunk_empty(int i) const { return barriers() + kChunks + i; }
    QK_DEVICE Barrier* codes_full(int i) const { return barriers() + 2 * kChunks + i; }
    QK_DEVICE Barrier* codes_empty(int i) const { return barriers() + 2 * kChunks + kTiles + i; }
};

/// Work tile number `work`: the outputs of rows m0.. of x and n0.. of W. Rows of x go fastest.
template <int COLUMNS>
struct WorkTile {
    int m0, n0;
    QK_DEVICE WorkTile(const WeightOnlyArgs& args, int work) {
        const int blocks_m = (args.m + COLUMNS - 1) / COLUMNS;
        m0 = work % blocks_m * COLUMNS;
        n0 = work / blocks_m * kHopperRows;
    }
    static QK_DEVICE int count(const WeightOnlyArgs& args) {
        return (args.m + COLUMNS - 1) / COLUMNS * ((args.n + kHopperRows - 1) / kHopperRows);
    }
};

/// The producer thread: it starts all copies.
template <typename D, int COLUMNS>
QK_DEVICE void copy_all(const HopperArgs& args, const HopperShared<D, COLUMNS>& shared) {
    using Shared = HopperShared<D, COLUMNS>;
    const WeightOnlyArgs& w = args.weight;
    RingPosition<Shared::kChunks> chunk;
    RingPosition<Shared::kTiles> codes;
    bool first = true;
    prefetch(args.x);
    for (int work = block_index_x(); work < WorkTile<COLUMNS>::count(w); work += blocks_x()) {
        const WorkTile<COLUMNS> work_tile(w, work);
        const int rows = w.n - work_tile.n0 < kHopperRows ? w.n - work_tile.n0 : kHopperRows;
        for (int tile = 0; tile < w.tiles; tile++) {
            barrier_wait(shared.codes_empty(codes.index), codes.parity ^ 1);
            const int64_t row = int64_t(tile) * w.n + work_tile.n0;
            Barrier* full = shared.codes_full(codes.index);
            barrier_arrive_expect(full, rows * (64 + kHighRow<D>));
            copy_bulk(shared.codes(codes.index), w.qdata + row * 4, rows * 64, full);
            if (D::kHigh > 0) {
                copy_bulk(shared.codes(codes.index) + Shared::kLowBytes,
                          static_cast<const unsigned char*>(w.qhigh) + row * kHighRow<D>,
                          rows * kHighRow<D>, full);
            }
            codes.next();
            if (first) {  // the last kernel may write x, but not the weight
                wait_for_last_kernel();
                first = false;
            }
            for (int k = tile * kTile<D>; k < (tile + 1) * kTile<D>; k += kChunk) {
                barrier_wait(shared.chunk_empty(chunk.index), chunk.parity ^ 1);
                barrier_arrive_expect(shared.chunk_full(chunk.index), Shared::kChunkBytes);
                copy_box(shared.chunk(chunk.index), args.x, k, work_tile.m0,
                         shared.chunk_full(chunk.index));
                chunk.next();
            }
        }
    }
}

/// Loads a lane's codes of a tile. row: the lane's first row in the tile; live: rows that exist.
template <typename D>
QK_DEVICE Packed<D> codes_of(const unsigned char* codes, int row, int live) {
    Packed<D> packed = {};
    QK_UNROLL
    for (int r = 0; r < 2; r++) {
        const int unit = (row + r * 8) * 4 + lane_index() % 4;
        if (row + r * 8 < live) {
            packed.low[r] = load_shared(reinterpret_cast<const Words4*>(codes) + unit);
            if (D::kHigh > 0) {
                packed.high[r] = load_shared(
                    reinterpret_cast<const HighWords<D>*>(codes + kHopperRows * 64) + unit);
            }
        }
    }
    return packed;
}

/// Epilogue: adds the bias, rounds, and stores through shared memory, so that each store to a row
/// of y has 16 bytes.
template <typename T, int COLUMNS>
QK_DEVICE void store_sums(const WeightOnlyArgs& args, const float (&sums)[COLUMNS / 2],
                          const WorkTile<COLUMNS>& work_tile, unsigned char* out, int warpgroup) {
    const int lane = lane_index(), warp = warp_index() % 4, n0 = work_tile.n0 + warpgroup * 64;
    float bias[2] = {};
    QK_UNROLL
    for (int r = 0; r < 2; r++) {
        const int n = n0 + warp * 16 + lane / 4 + r * 8;
        if (args.bias != nullptr && n < args.n) {
            bias[r] = to_float(load_global(static_cast<const T*>(args.bias) + n));
        }
    }
    sync_warpgroup(1 + warpgroup);  // no thread still reads the last work tile from there
    QK_UNROLL
    for (int c = 0; c < COLUMNS / 8; c += 2) {
        uint32_t in[4];
        QK_UNROLL
        for (int i = 0; i < 4; i++) {  // columns 8 (c + i / 2), rows 8 (i % 2)
            const float* pair_of = sums + (c + i / 2) * 4 + i % 2 * 2;
            in[i] = pair(from_float<T>(pair_of[0] + bias[i % 2]),
                         from_float<T>(pair_of[1] + bias[i % 2]));
        }
        const int m = (c + lane / 16) * 8 + lane % 8, unit = warp * 2 + lane / 8 % 2;
        store_matrix_transposed(out + m * 128 + (unit ^ m % 8) * 16, in);
    }
    sync_warpgroup(1 + warpgroup);
    for (int i = thread_index() % 128; i < COLUMNS * 8; i += 128) {
        const int row = i / 8, unit = i % 8, m = work_tile.m0 + row, n = n0 + unit * 8;
        if (m < args.m && n < args.n) {
            const unsigned char* from = out + row * 128 + (unit ^ row % 8) * 16;
            T* to = static_cast<T*>(args.y) + int64_t(m) * args.n + n;
            if (args.n % 8 == 0) {
                store_global(reinterpret_cast<Words4*>(to),
                             load_shared(reinterpret_cast<const Words4*>(from)));
            } else {
                for (int e = 0; e < 8 && n + e < args.n; e++) {
                    store_global(to + e, load_shared(reinterpret_cast<const T*>(from) + e));
                }
            }
        }
    }
}

/// Epilogue of ROW_SCALE kernels: stores the sums times the scales of their rows in float32,
/// directly from registers. A warp's store has 32 bytes, a whole sector, in each of four rows of y.
/// first: the lane's first row of W; its other row is first + 8.
template <int COLUMNS>
QK_DEVICE void store_scaled(const WeightOnlyArgs& args, const float (&sums)[COLUMNS / 2],
                            const WorkTile<COLUMNS>& work_tile, int first,
                            const float (&factor)[2]) {
    float* y = static_cast<float*>(args.y);
    QK_UNROLL
    for (int i = 0; i < COLUMNS / 2; i++) {
        const int r = i / 2 % 2, n = first + r * 8;
        const int m = work_tile.m0 + i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
        if (n < args.n && m < args.m) {
            store_global(y + int64_t(m) * args.n + n, factor[r] * sums[i]);
        }
    }
}

/// State of a consumer warpgroup: its number (0 or 1), and its positions in the rings of x's chunks
/// and of codes.
template <typename D, int COLUMNS>
struct Consumer {
    HopperShared<D, COLUMNS> shared;
    RingPosition<HopperShared<D, COLUMNS>::kChunks> chunk;
    RingPosition<HopperShared<D, COLUMNS>::kTiles> codes;
    int warpgroup;

    QK_DEVICE int previous_chunk() const {
        constexpr int count = HopperShared<D, COLUMNS>::kChunks;
        return (chunk.index + count - 1) % count;
    }
};

/// Waits for every product so far, so that operand registers may be written, and releases the last
/// chunk of x.
template <typename D, int COLUMNS>
QK_DEVICE void finish_products(const Consumer<D, COLUMNS>& me) {
    product_wait<0>();
    release(me.shared.chunk_empty(me.previous_chunk()));
}

/// sums += one tile. a: fragments of W for the last two slices.
template <typename T, typename D, int COLUMNS, typename S, bool ROW_SCALE>
QK_DEVICE void multiply_tile(float (&sums)[COLUMNS / 2], uint32_t (&a)[2][4],
                             const WeightOnlyArgs& args, Consumer<D, COLUMNS>& me, int tile,
                             int live, const typename S::Raw& raw, const Table& table,
                             const typename S::Rows& scale_rows) {
    const int lane = lane_index(), q = lane / 4, j = lane % 4;
    barrier_wait(me.shared.codes_full(me.codes.index), me.codes.parity);
    const int row = me.warpgroup * 64 + warp_index() % 4 * 16 + q;
    // If decoded values are operands without a further instruction, the last product of the tile
    // before reads its operand from the same registers that this decoding writes: an H200 gave
    // different sums in every run.
    constexpr bool in_place = ROW_SCALE && D::kFinished;
    if (in_place && tile > 0) {
        finish_products(me);
    }
    const Packed<D> packed = codes_of<D>(me.shared.codes(me.codes.index), row, live);
    const Values<D> values = decode<D>(packed, table);
    release(me.shared.codes_empty(me.codes.index));
    me.codes.next();
    // With 8-bit codes a tile is one chunk, and ptxas lets no product be in flight from one tile to
    // the next: it would serialize all of them. So the kernel waits for the last one here, after it
    // has decoded.
    constexpr bool drain = D::kPairs == 2 || in_place;
    if (drain && !in_place && tile > 0) {
        finish_products(me);
    }
    S scales;
    scales.take(args, raw, tile);
    const bool by_element = S::kGroups == 0 && args.scale_group < kSlice;
    const int scale_group = S::kGroups == 0 ? args.scale_group : kTile<D> / kGroupsLoaded<S>;
    GroupScales<D, S> group_scales;
    QK_UNROLL
    for (int s = 0; s < D::kPairs; s++) {
        QK_UNROLL
        for (int p = 0; p < 2; p++) {
            const int slice = s * 2 + p, kk = tile * kTile<D> + slice * kSlice;
            if (!ROW_SCALE && !by_element && slice * kSlice % scale_group == 0) {
                group_scales.take(scales, args, scale_rows, slice, kk);
            }
            uint32_t (&weights)[4] = a[p];
            operand<D>(weights, values, s, p, group_scales.offset);
            if constexpr (S::kGroups == 0) {
                if (by_element) {
                    scale_elements<T>(weights, args, scale_rows.scales, kk + j * 2);
                }
            }
            if (!ROW_SCALE && !by_element) {
                QK_UNROLL
                for (int i = 0; i < 4; i++) {
                    const float factor = group_scales.factor[i % 2];
                    weights[i] = S::kHasMin ? scaled_less_minimum<T>(weights[i], factor,
                                                                     group_scales.minimum[i % 2])
                                            : scaled<T>(weights[i], factor, factor);
                }
            }
            const int in_chunk = slice % (kChunk / kSlice);
            if (in_chunk == 0) {
                barrier_wait(me.shared.chunk_full(me.chunk.index), me.chunk.parity);
            }
            const Operand x =
                further(operand_at(me.shared.chunk(me.chunk.index)), in_chunk * kSlice * 2);
            product_fence();
            product<T, COLUMNS>(sums, weights, x, tile + slice > 0);
            product_commit();
            product_wait<1>();  // frees the last slice's operand registers and perhaps its chunk
            if (in_chunk == 0 && tile + slice > 0 && !(drain && slice == 0)) {
                release(me.shared.chunk_empty(me.previous_chunk()));
            }
            if (in_chunk == kChunk / kSlice - 1) {
                me.chunk.next();
            }
        }
    }
}

template <typename T, typename D, int COLUMNS, typename S, bool ROW_SCALE>
QK_DEVICE void multiply_all(const HopperArgs& args, const HopperShared<D, COLUMNS>& shared,
                            int warpgroup) {
    const WeightOnlyArgs& w = args.weight;
    Consumer<D, COLUMNS> me{shared, {}, {}, warpgroup};
    const Table table = load_table<D>(w, shared.book());
    wait_for_last_kernel();  // it may still use y's memory
    for (int work = block_index_x(); work < WorkTile<COLUMNS>::count(w); work += blocks_x()) {
        const WorkTile<COLUMNS> work_tile(w, work);
        const int row = work_tile.n0 + me.warpgroup * 64 + warp_index() % 4 * 16 + lane_index() / 4;
        const typename S::Rows scale_rows = rows_from<S>(w, row);
        typename S::Raw raw = {}, next = {};
        fetch_scales<D, S>(raw, w, 0, w.tiles, scale_rows);
        float sums[COLUMNS / 2];
        uint32_t a[2][4];
        QK_NO_UNROLL
        for (int tile = 0; tile < w.tiles; tile++) {
            if (!ROW_SCALE) {
                fetch_scales<D, S>(next, w, tile + 1, w.tiles, scale_rows);
            }
            multiply_tile<T, D, COLUMNS, S, ROW_SCALE>(sums, a, w, me, tile, w.n - work_tile.n0,
                                                       raw, table, scale_rows);
            if (!ROW_SCALE) {
                raw = next;
            }
        }
        finish_products(me);
        if constexpr (S::kOutliers) {  // not before: ptxas would order the products after these
                                       // sums
            add_sparse<T>(reinterpret_cast<float (&)[COLUMNS / 8][4]>(sums), w, row, work_tile.m0);
        }
        if constexpr (ROW_SCALE) {
            S scales;
            scales.take(w, raw, 0);
            const float factor[2] = {scales.get(w, scale_rows, 0, 0, 0).scale,
                                     scales.get(w, scale_rows, 1, 0, 0).scale};
            store_scaled<COLUMNS>(w, sums, work_tile, row, factor);
        } else {
            store_sums<T, COLUMNS>(w, sums, work_tile, shared.out(me.warpgroup), me.warpgroup);
        }
    }
}

/// Grid: one block per SM, or fewer. Shared memory: HopperShared::kBytes. ROW_SCALE: a row of W has
/// one scale and y is float32, because a transform reads it; so sums are scaled, not weights.
template <typename T, typename D, typename S, bool ROW_SCALE>
__global__ void __launch_bounds__(kHopperThreads, 1)
    weight_only_hopper(const __grid_constant__ HopperArgs args) {
    if constexpr (kOnHopper) {
        constexpr int columns = kHopperColumns<D, S>;
        using Shared = HopperShared<D, columns>;
        static_assert(Shared::kBytes <= 227 * 1024, "");
        const Shared shared{shared_memory()};
        if (thread_index() == 0) {
            init_ring(shared.chunk_full(0), shared.chunk_empty(0), Shared::kChunks);
            init_ring(shared.codes_full(0), shared.codes_empty(0), Shared::kTiles);
            barrier_init_done();
        }
        load_book<D>(args.weight, shared.book(), kHopperThreads);
        run_pipeline([&] { copy_all<D, columns>(args, shared); },
                     [&](int warpgroup) {
                         multiply_all<T, D, columns, S, ROW_SCALE>(args, shared, warpgroup);
                     });
    } else {
        not_for_this_gpu();
    }
}

}  // namespace qk
