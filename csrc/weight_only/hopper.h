// y = x @ W^T + bias for many rows of x on Hopper: wgmma takes the weights, decoded and scaled,
// from registers, and x from shared memory, where the copy engine brings both.
//
// Three warpgroups. Of the first, one thread starts copies and nobody else does anything; the other
// two multiply 64 rows of W each by COLUMNS rows of x, in chunks of 64 features:
//
//        x ring, chunks                      codes ring, tiles                warpgroup 1, 2
//      +-----------------------+     +--------------------------+
//      | COLUMNS rows x 128 B, |     | 128 rows x 64 B          |      codes -> registers -> values
//      | swizzled              | ... | [+ high bits of each row]| ...  x scale -> operand a[i % 2]
//      +-----------------------+     +--------------------------+      sums += a * x^T   (wgmma)
//        full / empty barriers          full / empty barriers
//
// While the tensor core multiplies slice i (16 features), the warps prepare slice i + 1. Codes
// leave shared memory a whole tile at a time, so their place is free again at once. Weights are
// scaled in float32 and rounded once, or sums are scaled, where a row has but one scale. A block
// takes outputs in turn (grid: one block a processor): the copies of the next one start while the
// last one is stored. K is never cut: sums do not depend on M.
#pragma once
#include "../ptx/hopper.h"
#include "../ptx/wgmma.h"
#include "gemm.h"

namespace qk {

constexpr int kHopperRows = 128, kHopperThreads = 384, kChunk = 64;

struct HopperArgs {
    WeightOnlyArgs weight;
    TensorMap x;
};

/// Rows of x of a block: fewer where a tile's values take the registers of half the sums, and where
/// outliers do.
template <typename D, typename S>
constexpr int kHopperColumns = D::kPairs == 8 || S::kOutliers ? 128 : 256;

/// Bytes of high bits of a row of a tile.
template <typename D>
constexpr int kHighRow = D::kHigh > 0 ? 4 * int(sizeof(HighWords<D>)) : 0;

/// What lies where in shared memory.
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

/// Outputs `work` of a block: x's rows fastest.
template <int COLUMNS>
struct Outputs {
    int m0, n0;
    QK_DEVICE Outputs(const WeightOnlyArgs& args, int work) {
        const int blocks_m = (args.m + COLUMNS - 1) / COLUMNS;
        m0 = work % blocks_m * COLUMNS;
        n0 = work / blocks_m * kHopperRows;
    }
    static QK_DEVICE int count(const WeightOnlyArgs& args) {
        return (args.m + COLUMNS - 1) / COLUMNS * ((args.n + kHopperRows - 1) / kHopperRows);
    }
};

/// The one thread that starts all copies.
template <typename D, int COLUMNS>
QK_DEVICE void copy_all(const HopperArgs& args, const HopperShared<D, COLUMNS>& shared) {
    using Shared = HopperShared<D, COLUMNS>;
    const WeightOnlyArgs& w = args.weight;
    Turn<Shared::kChunks> chunk;
    Turn<Shared::kTiles> codes;
    bool first = true;
    prefetch(args.x);
    for (int work = block_index_x(); work < Outputs<COLUMNS>::count(w); work += blocks_x()) {
        const Outputs<COLUMNS> place(w, work);
        const int rows = w.n - place.n0 < kHopperRows ? w.n - place.n0 : kHopperRows;
        for (int tile = 0; tile < w.tiles; tile++) {
            barrier_wait(shared.codes_empty(codes.at), codes.parity ^ 1);
            const int64_t row = int64_t(tile) * w.n + place.n0;
            Barrier* full = shared.codes_full(codes.at);
            barrier_arrive_expect(full, rows * (64 + kHighRow<D>));
            copy_bulk(shared.codes(codes.at), w.qdata + row * 4, rows * 64, full);
            if (D::kHigh > 0) {
                copy_bulk(shared.codes(codes.at) + Shared::kLowBytes,
                          static_cast<const unsigned char*>(w.qhigh) + row * kHighRow<D>,
                          rows * kHighRow<D>, full);
            }
            codes.next();
            if (first) {  // the weight depends on no kernel before this one, x does
                wait_for_last_kernel();
                first = false;
            }
            for (int k = tile * kTile<D>; k < (tile + 1) * kTile<D>; k += kChunk) {
                barrier_wait(shared.chunk_empty(chunk.at), chunk.parity ^ 1);
                barrier_arrive_expect(shared.chunk_full(chunk.at), Shared::kChunkBytes);
                copy_box(shared.chunk(chunk.at), args.x, k, place.m0, shared.chunk_full(chunk.at));
                chunk.next();
            }
        }
    }
}

/// A lane's codes of a tile; row: its first one in the tile's shared memory.
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

/// Bias, rounding; by way of shared memory, so that rows of y are stored 16 bytes at a time.
template <typename T, int COLUMNS>
QK_DEVICE void store_sums(const WeightOnlyArgs& args, const float (&sums)[COLUMNS / 2],
                          const Outputs<COLUMNS>& place, unsigned char* out, int warpgroup) {
    const int lane = lane_index(), warp = warp_index() % 4, n0 = place.n0 + warpgroup * 64;
    float bias[2] = {};
    QK_UNROLL
    for (int r = 0; r < 2; r++) {
        const int n = n0 + warp * 16 + lane / 4 + r * 8;
        if (args.bias != nullptr && n < args.n) {
            bias[r] = to_float(load_global(static_cast<const T*>(args.bias) + n));
        }
    }
    sync_warpgroup(1 + warpgroup);  // what was stored before has been read
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
        const int row = i / 8, unit = i % 8, m = place.m0 + row, n = n0 + unit * 8;
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

/// Sums times their rows' scales in float32, straight from registers: a warp's store is of 32
/// bytes, a whole sector, in each of four rows of y. first: a lane's row of W; the other one is 8
/// further.
template <int COLUMNS>
QK_DEVICE void store_scaled(const WeightOnlyArgs& args, const float (&sums)[COLUMNS / 2],
                            const Outputs<COLUMNS>& place, int first, const float (&factor)[2]) {
    float* y = static_cast<float*>(args.y);
    QK_UNROLL
    for (int i = 0; i < COLUMNS / 2; i++) {
        const int r = i / 2 % 2, n = first + r * 8;
        const int m = place.m0 + i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
        if (n < args.n && m < args.m) {
            store_global(y + int64_t(m) * args.n + n, factor[r] * sums[i]);
        }
    }
}

/// What a warpgroup knows while it multiplies.
template <typename D, int COLUMNS>
struct Consumer {
    HopperShared<D, COLUMNS> shared;
    Turn<HopperShared<D, COLUMNS>::kChunks> chunk;
    Turn<HopperShared<D, COLUMNS>::kTiles> codes;
    int warpgroup;

    QK_DEVICE int chunk_before() const {
        constexpr int count = HopperShared<D, COLUMNS>::kChunks;
        return (chunk.at + count - 1) % count;
    }
};

/// Wait for every product so far: operands may be written again, and the last chunk of x too.
template <typename D, int COLUMNS>
QK_DEVICE void finish_products(const Consumer<D, COLUMNS>& me) {
    product_wait<0>();
    release(me.shared.chunk_empty(me.chunk_before()));
}

/// sums += one tile. `a`: operands of the last two slices.
template <typename T, typename D, int COLUMNS, typename S, bool WHOLE>
QK_DEVICE void multiply_tile(float (&sums)[COLUMNS / 2], uint32_t (&a)[2][4],
                             const WeightOnlyArgs& args, Consumer<D, COLUMNS>& me, int tile,
                             int live, const Held<D, S>& held, const Table& table,
                             const typename S::Rows& scaled_rows) {
    const int lane = lane_index(), q = lane / 4, j = lane % 4;
    barrier_wait(me.shared.codes_full(me.codes.at), me.codes.parity);
    const int row = me.warpgroup * 64 + warp_index() % 4 * 16 + q;
    // Where decoded values are operands as they are, the last product of the tile before reads its
    // own from the very registers that decoding writes: an H200 gave other sums in every run.
    constexpr bool in_place = WHOLE && D::kFinished;
    if (in_place && tile > 0) {
        finish_products(me);
    }
    const Packed<D> packed = codes_of<D>(me.shared.codes(me.codes.at), row, live);
    const Values<D> values = decode<D>(packed, table);
    release(me.shared.codes_empty(me.codes.at));
    me.codes.next();
    // With 8-bit codes a tile is one chunk, and ptxas keeps no product on its way from one tile to
    // the next: it would order all of them. So the last one is waited for here, after the decoding.
    constexpr bool drain = D::kPairs == 2 || in_place;
    if (drain && !in_place && tile > 0) {
        finish_products(me);
    }
    S scales(args, held.raw, tile);
    const bool by_element = S::kGroups == 0 && args.scale_group < kSlice;
    const int run = S::kGroups == 0 ? args.scale_group : kTile<D> / kGroupsHeld<S>;
    float factor[2] = {1, 1}, minus[2] = {};
    uint32_t offset[2] = {D::offset(0), D::offset(0)};
    QK_UNROLL
    for (int s = 0; s < D::kPairs; s++) {
        QK_UNROLL
        for (int p = 0; p < 2; p++) {
            const int slice = s * 2 + p, kk = tile * kTile<D> + slice * kSlice;
            if (!WHOLE && !by_element && slice * kSlice % run == 0) {
                QK_UNROLL
                for (int r = 0; r < 2; r++) {
                    const int number = slice * kGroupsHeld<S> / (2 * D::kPairs);
                    const ScaleZero found = scales.get(args, scaled_rows, r, number, kk);
                    factor[r] = found.scale;
                    minus[r] = S::kHasMin ? found.zero : 0;
                    offset[r] = D::offset(S::kHasMin ? 0 : found.zero);
                }
            }
            uint32_t (&now)[4] = a[p];
            operand<D>(now, values, s, p, offset);
            if constexpr (S::kGroups == 0) {
                if (by_element) {
                    scale_elements<T>(now, args, scaled_rows.of, kk + j * 2);
                }
            }
            if (!WHOLE && !by_element) {
                QK_UNROLL
                for (int i = 0; i < 4; i++) {
                    now[i] = S::kHasMin ? scaled_less<T>(now[i], factor[i % 2], minus[i % 2])
                                        : scaled<T>(now[i], factor[i % 2], factor[i % 2]);
                }
            }
            const int in_chunk = slice % (kChunk / kSlice);
            if (in_chunk == 0) {
                barrier_wait(me.shared.chunk_full(me.chunk.at), me.chunk.parity);
            }
            const Operand x =
                further(operand_at(me.shared.chunk(me.chunk.at)), in_chunk * kSlice * 2);
            product_fence();
            product<T, COLUMNS>(sums, now, x, tile + slice > 0);
            product_commit();
            product_wait<1>();  // the slice before: its operand's registers and, perhaps, its chunk
            if (in_chunk == 0 && tile + slice > 0 && !(drain && slice == 0)) {
                release(me.shared.chunk_empty(me.chunk_before()));
            }
            if (in_chunk == kChunk / kSlice - 1) {
                me.chunk.next();
            }
        }
    }
}

template <typename T, typename D, int COLUMNS, typename S, bool WHOLE>
QK_DEVICE void multiply_all(const HopperArgs& args, const HopperShared<D, COLUMNS>& shared) {
    const WeightOnlyArgs& w = args.weight;
    Consumer<D, COLUMNS> me{shared, {}, {}, int(warp_index()) / 4 - 1};
    const Table table = load_table<D>(w, shared.book());
    wait_for_last_kernel();  // y's memory may have been its
    for (int work = block_index_x(); work < Outputs<COLUMNS>::count(w); work += blocks_x()) {
        const Outputs<COLUMNS> place(w, work);
        const int row = place.n0 + me.warpgroup * 64 + warp_index() % 4 * 16 + lane_index() / 4;
        const typename S::Rows scaled_rows(w, row);
        Held<D, S> held = {}, next = {};
        load_scales(held, w, 0, w.tiles, scaled_rows);
        float sums[COLUMNS / 2];
        uint32_t a[2][4];
        QK_NO_UNROLL
        for (int tile = 0; tile < w.tiles; tile++) {
            if (!WHOLE) {
                load_scales(next, w, tile + 1, w.tiles, scaled_rows);
            }
            multiply_tile<T, D, COLUMNS, S, WHOLE>(sums, a, w, me, tile, w.n - place.n0, held,
                                                   table, scaled_rows);
            if (!WHOLE) {
                held = next;
            }
        }
        finish_products(me);
        if constexpr (S::kOutliers) {  // afterwards: ptxas would order the products after the sums
            add_sparse<T>(reinterpret_cast<float (&)[COLUMNS / 8][4]>(sums), w, row, place.m0);
        }
        if constexpr (WHOLE) {
            const S scales(w, held.raw, 0);
            const float factor[2] = {scales.get(w, scaled_rows, 0, 0, 0).scale,
                                     scales.get(w, scaled_rows, 1, 0, 0).scale};
            store_scaled<COLUMNS>(w, sums, place, row, factor);
        } else {
            store_sums<T, COLUMNS>(w, sums, place, shared.out(me.warpgroup), me.warpgroup);
        }
    }
}

/// Grid: one block a processor, or fewer. Shared memory: HopperShared::kBytes. WHOLE: rows of W
/// have one scale each and y is float32, for a transform to read; so sums are scaled, not weights.
template <typename T, int CODE, typename S, bool WHOLE>
__global__ void __launch_bounds__(kHopperThreads, 1)
    weight_only_hopper(const __grid_constant__ HopperArgs args) {
    if constexpr (kOnHopper) {
        using D = DecoderOf<T, CODE>;
        constexpr int columns = kHopperColumns<D, S>;
        using Shared = HopperShared<D, columns>;
        static_assert(Shared::kBytes <= 227 * 1024, "");
        const Shared shared{shared_memory()};
        if (thread_index() == 0) {
            for (int i = 0; i < Shared::kChunks; i++) {
                barrier_init(shared.chunk_full(i), 1);
                barrier_init(shared.chunk_empty(i), 8);  // warps
            }
            for (int i = 0; i < Shared::kTiles; i++) {
                barrier_init(shared.codes_full(i), 1);
                barrier_init(shared.codes_empty(i), 8);
            }
            barrier_init_done();
        }
        load_book<D>(args.weight, shared.book(), kHopperThreads);
        sync_block();
        let_next_kernel_start();
        if (warp_index() < 4) {
            fewer_registers<24>();
            if (thread_index() == 0) {
                copy_all<D, columns>(args, shared);
            }
        } else {
            more_registers<240>();
            multiply_all<T, D, columns, S, WHOLE>(args, shared);
        }
    }
}

}  // namespace qk
