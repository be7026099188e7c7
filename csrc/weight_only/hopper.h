// y = x @ W^T + bias for many rows of x on Hopper: wgmma takes the decoded and scaled weights from
// registers and x from shared memory. TMA copies the codes and x to shared memory.
//
// One warpgroup of a block starts the copies (ptx/pipeline.h). The three others multiply 64 rows of
// W each by COLUMNS rows of x, 64 or 128, in chunks of 64 features:
//
//        x ring, chunks                      codes ring, tiles                warpgroups 1, 2, 3
//      +-----------------------+     +--------------------------+
//      | COLUMNS rows x 128 B, |     | 192 rows x 64 B          |      codes -> registers -> values
//      | swizzled              | ... | [+ high bits of each row]| ...  x scale -> operands a[s % 2]
//      +-----------------------+     +--------------------------+      sums += a * x^T   (wgmma)
//        full / empty barriers          full / empty barriers
//
// Blocks are tall, because packed weights are cheap: for each feature a block reads 96 bytes of
// 4-bit codes and 256 of 128 rows of x from the L2 cache. A block of 128 x 256, whose products are
// a third more, would read 64 and 512. With such blocks an H200 took 880 us at 8192x8192, M = 4096,
// which is 5.5 TB/s, about what its cache gives.
//
// While the tensor core multiplies two slices (32 features), the warps prepare the next two. A warp
// loads the codes of a whole tile at once, so their ring stage is free again early. Weights are
// scaled and rounded once (pair_scale.h); if a row has only one scale, sums are scaled instead.
//
// The kernel is persistent (one block per SM): a block computes one work tile after another, and
// the copies for the next one start while the last one is stored. Where blocks of outputs do not
// fill all SMs, as in the last wave, K is cut into split-K slices. Each warpgroup stores its sums,
// and that of the block that finishes last adds the slices in order.
#pragma once
#include "../ptx/pipeline.h"
#include "../ptx/wgmma.h"
#include "gemm.h"
#include "pair_scale.h"

namespace qk {

/// Consumer warpgroups of a block, its rows of W, and features of a chunk.
constexpr int kHopperConsumers = 3, kHopperRows = 64 * kHopperConsumers, kChunk = 64;

struct HopperArgs {
    WeightOnlyArgs weight;
    TensorMap x;
};

/// The most rows of x of a block: a tile's values of 256 features, or outliers, take the registers
/// of half the sums.
template <typename D, typename S>
constexpr int kMostColumns = D::kPairs == 8 || S::kOutliers ? 64 : 128;

/// Bytes of the high bits of one row of a tile.
template <typename D>
constexpr int kHighRow = D::kHigh > 0 ? 4 * int(sizeof(HighWords<D>)) : 0;

/// Layout of shared memory.
template <typename D, int COLUMNS>
struct HopperShared {
    static constexpr int kChunkBytes = COLUMNS * 128;
    static constexpr int kChunks = COLUMNS == 64 ? 8 : D::kTable ? 4 : 6;
    static constexpr int kLowBytes = kHopperRows * 64, kHighBytes = kHopperRows * kHighRow<D>;
    static constexpr int kTileBytes = kLowBytes + kHighBytes, kTiles = COLUMNS == 64 ? 4 : 3;
    static constexpr int kOutBytes = 64 * COLUMNS * 2;  // of a warpgroup
    static constexpr int kCodesAt = kChunks * kChunkBytes, kOutAt = kCodesAt + kTiles * kTileBytes;
    static constexpr int kBarriersAt = kOutAt + kHopperConsumers * kOutBytes;
    static constexpr int kFlagsAt = kBarriersAt + 2 * (kChunks + kTiles) * int(sizeof(Barrier));
    static constexpr int kBookAt = kFlagsAt + 16;
    static constexpr int kBytes = kBookAt + (D::kTable ? kPairsBytes : kBookBytes<D>);

    unsigned char* start;
    QK_DEVICE unsigned char* chunk(int i) const { return start + i * kChunkBytes; }
    QK_DEVICE unsigned char* codes(int i) const { return start + kCodesAt + i * kTileBytes; }
    QK_DEVICE unsigned char* out(int warpgroup) const {
        return start + kOutAt + warpgroup * kOutBytes;
    }
    QK_DEVICE int* flag(int warpgroup) const {
        return reinterpret_cast<int*>(start + kFlagsAt) + warpgroup;
    }
    QK_DEVICE uint32_t* book() const { return reinterpret_cast<uint32_t*>(start + kBookAt); }
    QK_DEVICE Barrier* barriers() const { return reinterpret_cast<Barrier*>(start + kBarriersAt); }
    QK_DEVICE Barrier* chunk_full(int i) const { return barriers() + i; }
    QK_DEVICE Barrier* chunk_empty(int i) const { return barriers() + kChunks + i; }
    QK_DEVICE Barrier* codes_full(int i) const { return barriers() + 2 * kChunks + i; }
    QK_DEVICE Barrier* codes_empty(int i) const { return barriers() + 2 * kChunks + kTiles + i; }
};

/// Work number `work`: the outputs of rows m0.. of x and n0.. of W, and tiles begin .. end of K,
/// which are split-K slice `slice` of `slices`. Blocks of outputs that fill all SMs come first,
/// with all of K; those of the last wave, from number args.whole on, are cut into slices. Rows of x
/// go fastest, slices slowest.
template <int COLUMNS>
struct WorkTile {
    int m0, n0, block, slice, slices, begin, end;
    QK_DEVICE WorkTile(const WeightOnlyArgs& args, int work)
        : block(work), slice(0), slices(1), begin(0), end(args.tiles) {
        if (work >= args.whole) {
            const int rest = blocks(args) - args.whole;
            block = args.whole + (work - args.whole) % rest;
            slice = (work - args.whole) / rest;
            slices = slices_of(args);
            begin = slice * args.k_slice;
            end = begin + args.k_slice < args.tiles ? begin + args.k_slice : args.tiles;
        }
        const int blocks_m = (args.m + COLUMNS - 1) / COLUMNS;
        m0 = block % blocks_m * COLUMNS;
        n0 = block / blocks_m * kHopperRows;
    }
    static QK_DEVICE int blocks(const WeightOnlyArgs& args) {
        return (args.m + COLUMNS - 1) / COLUMNS * ((args.n + kHopperRows - 1) / kHopperRows);
    }
    static QK_DEVICE int slices_of(const WeightOnlyArgs& args) {
        return (args.tiles + args.k_slice - 1) / args.k_slice;
    }
    /// Number of works.
    static QK_DEVICE int count(const WeightOnlyArgs& args) {
        return args.whole + (blocks(args) - args.whole) * slices_of(args);
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
        const int left = w.n - work_tile.n0, rows = left < kHopperRows ? left : kHopperRows;
        for (int tile = work_tile.begin; tile < work_tile.end; tile++) {
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

/// Loads a lane's codes of a tile. low: where its 16 bytes of each row are among the tile's codes.
template <typename D>
QK_DEVICE Packed<D> codes_of(const unsigned char* codes, const int (&low)[2]) {
    Packed<D> packed = {};
    QK_UNROLL
    for (int r = 0; r < 2; r++) {
        packed.low[r] = load_shared(reinterpret_cast<const Words4*>(codes + low[r]));
        if (D::kHigh > 0) {
            const int high = kHopperRows * 64 + low[r] / 16 * int(sizeof(HighWords<D>));
            packed.high[r] = load_shared(reinterpret_cast<const HighWords<D>*>(codes + high));
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

/// Adds the split-K slices of this warpgroup's sums if its block is the last that has stored them;
/// returns whether it is.
template <int COLUMNS>
QK_DEVICE bool add_slices(float (&sums)[COLUMNS / 2], const WeightOnlyArgs& args,
                          const WorkTile<COLUMNS>& work_tile, int warpgroup, int* flag) {
    const int slices = work_tile.slices, t = thread_index() % 128;
    if (slices == 1) {
        return true;
    }
    const int number = (work_tile.block - args.whole) * kHopperConsumers + warpgroup;
    float* const parts = args.partial + int64_t(number) * slices * (64 * COLUMNS) + t;
    QK_UNROLL
    for (int i = 0; i < COLUMNS / 2; i++) {
        if (work_tile.m0 + i / 4 * 8 < args.m) {
            store_global(parts + work_tile.slice * (64 * COLUMNS) + i * 128, sums[i]);
        }
        sums[i] = 0;
    }
    const auto sync = [&] { sync_warpgroup(1 + warpgroup); };
    if (!is_last_part(args.counter + number, slices, flag, t == 0, sync)) {
        return false;
    }
    for (int s = 0; s < slices; s++) {
        QK_UNROLL
        for (int i = 0; i < COLUMNS / 2; i++) {
            if (work_tile.m0 + i / 4 * 8 < args.m) {
                sums[i] += load_l2(parts + s * (64 * COLUMNS) + i * 128);
            }
        }
    }
    return true;
}

/// State of a consumer warpgroup: its positions in the rings of x's chunks and of codes, the stage
/// of x that the last products read, and x's first stage as an operand.
template <typename D, int COLUMNS>
struct Consumer {
    HopperShared<D, COLUMNS> shared;
    RingPosition<HopperShared<D, COLUMNS>::kChunks> chunk;
    RingPosition<HopperShared<D, COLUMNS>::kTiles> codes;
    int last_chunk;
    Operand x;

    QK_DEVICE explicit Consumer(const HopperShared<D, COLUMNS>& memory)
        : shared(memory), last_chunk(0), x(operand_at(memory.chunk(0))) {}

    /// Features 32 s .. of the chunk in use.
    QK_DEVICE Operand slices(int s) const {
        return further(x, chunk.index * HopperShared<D, COLUMNS>::kChunkBytes + s * 64);
    }
    /// Once the last products are waited for: the chunk they have read is free.
    QK_DEVICE void release_chunk(bool live) const {
        sync_warp();
        if (live && lane_index() == 0) {
            barrier_arrive(shared.chunk_empty(last_chunk));
        }
    }
    /// Waits for every product so far, so that operand registers may be written.
    QK_DEVICE void finish_products(bool live) const {
        product_wait<0>();
        release_chunk(live);
    }
};

/// sums += one tile. a: fragments of W for the last two pairs of slices; codes_at: as in codes_of;
/// first: whether it is the first tile of the sums.
template <typename T, typename D, int COLUMNS, typename S, bool ROW_SCALE>
QK_DEVICE void multiply_tile(float (&sums)[COLUMNS / 2], uint32_t (&a)[2][2][4],
                             const WeightOnlyArgs& args, Consumer<D, COLUMNS>& me, int tile,
                             bool first, const int (&codes_at)[2], const typename S::Raw& raw,
                             const Table& table, const typename S::Rows& scale_rows) {
    barrier_wait(me.shared.codes_full(me.codes.index), me.codes.parity);
    // If decoded values are operands without a further instruction, the last product of the tile
    // before reads its operand from the same registers that this decoding writes: an H200 gave
    // different sums in every run.
    constexpr bool in_place = ROW_SCALE && D::kFinished;
    if (in_place) {
        me.finish_products(!first);
    }
    const Packed<D> packed = codes_of<D>(me.shared.codes(me.codes.index), codes_at);
    const Values<D> values = D::kTable ? raw_values<D>(packed, table) : decode<D>(packed, table);
    release(me.shared.codes_empty(me.codes.index));
    me.codes.next();
    // With 8-bit codes a tile is one chunk, and ptxas lets no product be in flight from one tile to
    // the next: it would serialize all of them. So the kernel waits for the last one here, after it
    // has decoded.
    constexpr bool drain = D::kPairs == 2 || in_place;
    if (drain && !in_place) {
        me.finish_products(!first);
    }
    S scales;
    scales.take(args, raw, tile);
    const bool by_element = S::kGroups == 0 && args.scale_group < kSlice;
    const int scale_group = S::kGroups == 0 ? args.scale_group : kTile<D> / kGroupsLoaded<S>;
    GroupScales<D, S> group_scales;
    PairScale<T, S> pair_scale[2] = {{1, 0}, {1, 0}};
    QK_UNROLL
    for (int s = 0; s < D::kPairs; s++) {
        QK_UNROLL
        for (int p = 0; p < 2; p++) {
            const int slice = s * 2 + p, kk = tile * kTile<D> + slice * kSlice;
            if (!ROW_SCALE && !by_element && slice * kSlice % scale_group == 0) {
                group_scales.take(scales, args, scale_rows, slice, kk);
                QK_UNROLL
                for (int r = 0; r < 2; r++) {
                    pair_scale[r] = {group_scales.factor[r], group_scales.minimum[r]};
                }
            }
            uint32_t (&weights)[4] = a[s % 2][p];
            operand<D>(weights, values, s, p, group_scales.offset);
            if constexpr (S::kGroups == 0) {
                if (by_element) {
                    scale_elements<T>(weights, args, scale_rows.scales, kk + lane_index() % 4 * 2);
                }
            }
            if (!ROW_SCALE && !by_element) {
                QK_UNROLL
                for (int i = 0; i < 4; i++) {
                    weights[i] = pair_scale[i % 2].of(weights[i]);
                }
            }
        }
        if (s % 2 == 0) {
            barrier_wait(me.shared.chunk_full(me.chunk.index), me.chunk.parity);
        }
        const Operand x = me.slices(s % 2);
        product_fence();
        product<T, COLUMNS>(sums, a[s % 2][0], x);
        product<T, COLUMNS>(sums, a[s % 2][1], further(x, kSlice * 2));
        product_commit();
        product_wait<1>();  // frees the last operands' registers and perhaps their chunk
        if (s % 2 == 0) {
            me.release_chunk(s > 0 || !(drain || first));
            me.last_chunk = me.chunk.index;
        } else {
            me.chunk.next();
        }
    }
}

template <typename T, typename D, int COLUMNS, typename S, bool ROW_SCALE>
QK_DEVICE void multiply_all(const HopperArgs& args, const HopperShared<D, COLUMNS>& shared,
                            int warpgroup) {
    const WeightOnlyArgs& w = args.weight;
    Consumer<D, COLUMNS> me(shared);
    Table table = load_table<D>(w, shared.book());
    if (D::kTable) {
        table.w[0] = kept(lane_index() * 4);
    }
    wait_for_last_kernel();  // it may still use y's memory
    for (int work = block_index_x(); work < WorkTile<COLUMNS>::count(w); work += blocks_x()) {
        const WorkTile<COLUMNS> work_tile(w, work);
        const int begin = work_tile.begin, end = work_tile.end;
        const int row = work_tile.n0 + warpgroup * 64 + warp_index() % 4 * 16 + lane_index() / 4;
        const typename S::Rows scale_rows = rows_from<S>(w, row);
        int codes_at[2];
        QK_UNROLL
        for (int r = 0; r < 2; r++) {  // of rows past the last one: those of the last one
            const int live = row + r * 8 < w.n ? row + r * 8 : w.n - 1;
            codes_at[r] = kept((live - work_tile.n0) * 64 + lane_index() % 4 * 16);
        }
        typename S::Raw raw = {}, next = {};
        fetch_scales<D, S>(raw, w, begin, end, scale_rows);
        float sums[COLUMNS / 2] = {};
        uint32_t a[2][2][4];
        QK_NO_UNROLL
        for (int tile = begin; tile < end; tile++) {
            if (!ROW_SCALE) {
                fetch_scales<D, S>(next, w, tile + 1, end, scale_rows);
            }
            multiply_tile<T, D, COLUMNS, S, ROW_SCALE>(sums, a, w, me, tile, tile == begin,
                                                       codes_at, raw, table, scale_rows);
            if (!ROW_SCALE) {
                raw = next;
            }
        }
        me.finish_products(true);
        sums_ready(sums);
        if constexpr (S::kOutliers) {  // not before: ptxas would order the products after these
                                       // sums
            add_sparse<T>(reinterpret_cast<float (&)[COLUMNS / 8][4]>(sums), w, row, work_tile.m0,
                          work_tile.slice, work_tile.slices);
        }
        if (!add_slices<COLUMNS>(sums, w, work_tile, warpgroup, shared.flag(warpgroup))) {
            continue;
        }
        if constexpr (ROW_SCALE) {
            S scales;
            scales.take(w, raw, begin);
            const float factor[2] = {scales.get(w, scale_rows, 0, 0, 0).scale,
                                     scales.get(w, scale_rows, 1, 0, 0).scale};
            store_scaled<COLUMNS>(w, sums, work_tile, row, factor);
        } else {
            store_sums<T, COLUMNS>(w, sums, work_tile, shared.out(warpgroup), warpgroup);
        }
    }
}

/// Grid: one block per SM, or fewer. Shared memory: HopperShared::kBytes. COLUMNS: 64 or
/// kMostColumns. ROW_SCALE: a row of W has one scale and y is float32, because a transform reads
/// it; so sums are scaled, not weights.
template <typename T, typename D, typename S, int COLUMNS, bool ROW_SCALE>
__global__ void __launch_bounds__(hopper_threads(kHopperConsumers), 1)
    weight_only_hopper(const __grid_constant__ HopperArgs args) {
    if constexpr (kOnHopper) {
        using Shared = HopperShared<D, COLUMNS>;
        static_assert(Shared::kBytes <= 227 * 1024, "");
        const Shared shared{kept(shared_memory())};
        if (thread_index() == 0) {
            init_ring(shared.chunk_full(0), shared.chunk_empty(0), Shared::kChunks,
                      kHopperConsumers);
            init_ring(shared.codes_full(0), shared.codes_empty(0), Shared::kTiles,
                      kHopperConsumers);
            barrier_init_done();
        }
        if (D::kTable) {
            fill_pairs(load_table<D>(args.weight, nullptr), shared.book());
        } else {
            load_book<D>(args.weight, shared.book(), threads_x());
        }
        run_pipeline<kHopperConsumers>([&] { copy_all<D, COLUMNS>(args, shared); },
                                       [&](int warpgroup) {
                                           multiply_all<T, D, COLUMNS, S, ROW_SCALE>(args, shared,
                                                                                     warpgroup);
                                       });
    } else {
        not_for_this_gpu();
    }
}

}  // namespace qk
