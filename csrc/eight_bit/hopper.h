// y = x @ W^T of 8-bit codes for many rows of x on Hopper: wgmma takes both operands from shared
// memory. TMA copies them there in steps of 128 features; a row of a step has 128 bytes.
//
// A block has three warpgroups (ptx/pipeline.h). One thread of the first starts the copies; the
// other two have 64 rows of x each:
//
//            tile (x, W)   sums a thread                 stages
//     int8   128 x 256     128 int32                     4
//     fp8    128 x 128     64 + 64 of the step at hand   6
//
// The tensor core accumulates fp8 products with few bits. So every step of 128 features starts from
// zero and is added in float32, times its scales if scales are of blocks (DeepSeek-V3, arXiv
// 2412.19437, 3.3.2). The kernel is persistent: a block computes one tile after another. K is never
// cut, so sums do not depend on M.
#pragma once
#include "../ptx/pipeline.h"
#include "../ptx/wgmma.h"
#include "gemm.h"

namespace qk {

constexpr int kHopperM = 128;

struct EightBitHopperArgs {
    EightBitArgs args;
    TensorMap x, weight;
};

/// The part of a tile that a warpgroup stores at a time, for store_tile: few columns, because the
/// sums leave few registers.
template <int KIND>
struct HopperStore {
    static constexpr int kRows = 64, kColumns = KIND == kInt8 ? 32 : 64, kOutStride = kColumns + 8;
    static constexpr int kTilesM = 1, kTilesN = kColumns / 8, kSums = kColumns / 2;
    static constexpr int kThreads = 128;
    static QK_DEVICE int index() { return thread_index() % 128; }
    static QK_DEVICE void sync() { sync_warpgroup(warp_index() / 4); }
};

/// Work tile of a block, and layout of shared memory.
template <int KIND>
struct HopperTiling {
    static constexpr int kRows = 64, kColumns = KIND == kInt8 ? 256 : 128, kSums = kColumns / 2;
    static constexpr int kStages = KIND == kInt8 ? 4 : 6, kWeightAt = kHopperM * kStep;
    static constexpr int kStageBytes = kWeightAt + kColumns * kStep;
    static constexpr int kOutBytes = kRows * HopperStore<KIND>::kOutStride * 2;
    static constexpr int kOutAt = kStages * kStageBytes, kBarriersAt = kOutAt + 2 * kOutBytes;
    static constexpr int kShared = kBarriersAt + 2 * kStages * int(sizeof(Barrier));
    static_assert(kShared <= 227 * 1024, "");

    static QK_DEVICE unsigned char* stage(int i) { return shared_memory() + i * kStageBytes; }
    static QK_DEVICE Barrier* full(int i) {
        return reinterpret_cast<Barrier*>(shared_memory() + kBarriersAt) + i;
    }
    static QK_DEVICE Barrier* empty(int i) { return full(kStages + i); }
    static QK_DEVICE int tiles(const EightBitArgs& args) {
        return (args.n + kColumns - 1) / kColumns * ((args.m + kHopperM - 1) / kHopperM);
    }
};

/// The producer thread: it starts all copies.
template <typename P>
QK_DEVICE void copy_codes(const EightBitHopperArgs& all) {
    const int steps = (all.args.kp + kStep - 1) / kStep;
    RingPosition<P::kStages> ring;
    bool first = true;
    prefetch(all.weight);
    prefetch(all.x);
    for (int i = block_index_x(); i < P::tiles(all.args); i += blocks_x()) {
        const Tile tile = tile_of<kHopperM, P::kColumns>(all.args, i);
        for (int step = 0; step < steps; step++) {
            barrier_wait(P::empty(ring.index), ring.parity ^ 1);
            Barrier* full = P::full(ring.index);
            barrier_arrive_expect(full, P::kStageBytes);
            copy_box(P::stage(ring.index) + P::kWeightAt, all.weight, step * kStep, tile.n, full);
            if (first) {  // the last kernel may write x, but not W
                wait_for_last_kernel();
                first = false;
            }
            copy_box(P::stage(ring.index), all.x, step * kStep, tile.m, full);
            ring.next();
        }
    }
}

/// sums [+]= one step of 128 features. The products are in flight when this returns.
template <int KIND, typename P, typename Sum>
QK_DEVICE void multiply_step(Sum (&sums)[P::kSums], int stage, int warpgroup, bool accumulate) {
    const Operand a = operand_at(P::stage(stage) + warpgroup * P::kRows * kStep),
                  b = operand_at(P::stage(stage) + P::kWeightAt);
    product_fence();
    QK_UNROLL
    for (int k = 0; k < kStep / 32; k++) {
        ProductOfCodes<KIND == kInt8 ? kInt8 : kE4M3, KIND, P::kColumns>::run(
            sums, further(a, k * 32), further(b, k * 32), accumulate || k > 0);
    }
    product_commit();
}

/// Scales of a step for this thread's two rows of x: the scale of W's block times that of x.
template <bool BLOCKS>
QK_DEVICE void scales_of(float (&scale)[2], const EightBitArgs& args, int n, int m, int step,
                         int steps) {
    QK_UNROLL
    for (int h = 0; h < 2; h++) {
        scale[h] = 1;
        if (BLOCKS && step < steps && m + h * 8 < args.m) {
            scale[h] = load_global(args.w_scale + int64_t(n / kStep) * steps + step) *
                       load_global(args.x_scale + int64_t(step) * args.m + m + h * 8);
        }
    }
}

/// Multiplies all steps of a tile. int8: products accumulate; fp8: steps are added in float32.
template <int KIND, bool BLOCKS, typename P, typename Sum>
QK_DEVICE void multiply_tile(Sum (&acc)[P::kSums], const EightBitArgs& args, const Tile& tile,
                             RingPosition<P::kStages>& ring) {
    const int steps = (args.kp + kStep - 1) / kStep, warpgroup = warp_index() / 4 - 1;
    if constexpr (KIND == kInt8) {
        int before = 0;
        QK_NO_UNROLL
        for (int step = 0; step < steps; step++) {
            barrier_wait(P::full(ring.index), ring.parity);
            multiply_step<KIND, P>(acc, ring.index, warpgroup, step > 0);
            product_wait<1>();
            if (step > 0) {
                release(P::empty(before));
            }
            before = ring.index;
            ring.next();
        }
        product_wait<0>();
        sums_ready(acc);
        release(P::empty(before));
    } else {
        const int m = tile.m + warpgroup * P::kRows + warp_index() % 4 * 16 + lane_index() / 4;
        QK_UNROLL
        for (int i = 0; i < P::kSums; i++) {
            acc[i] = 0;
        }
        float scale[2], next[2];
        scales_of<BLOCKS>(scale, args, tile.n, m, 0, steps);
        QK_NO_UNROLL
        for (int step = 0; step < steps; step++) {
            Sum part[P::kSums];
            barrier_wait(P::full(ring.index), ring.parity);
            multiply_step<KIND, P>(part, ring.index, warpgroup, false);
            scales_of<BLOCKS>(next, args, tile.n, m, step + 1, steps);
            product_wait<0>();
            sums_ready(part);
            release(P::empty(ring.index));
            ring.next();
            QK_UNROLL
            for (int i = 0; i < P::kSums; i++) {
                acc[i] += BLOCKS ? part[i] * scale[i / 2 % 2] : part[i];
            }
            scale[0] = next[0], scale[1] = next[1];
        }
    }
}

/// Multiplies and stores a consumer warpgroup's rows of all tiles of this block.
template <int KIND, bool BLOCKS>
QK_DEVICE void multiply_tiles(const EightBitArgs& args, int warpgroup) {
    using P = HopperTiling<KIND>;
    using Sum = typename MmaCodes<KIND == kInt8 ? kInt8 : kE4M3, KIND>::Sum;
    auto* out = reinterpret_cast<uint16_t*>(shared_memory() + P::kOutAt + warpgroup * P::kOutBytes);
    RingPosition<P::kStages> ring;
    wait_for_last_kernel();  // it wrote x's scales, and may still read y's memory
    for (int i = block_index_x(); i < P::tiles(args); i += blocks_x()) {
        const Tile tile = tile_of<kHopperM, P::kColumns>(args, i);
        Sum acc[P::kSums];
        multiply_tile<KIND, BLOCKS, P>(acc, args, tile, ring);
        using Piece = HopperStore<KIND>;
        QK_UNROLL
        for (int n = 0; n < P::kColumns; n += Piece::kColumns) {
            store_tile<KIND, BLOCKS, Piece, Sum>(
                args, reinterpret_cast<const Sums<Piece, Sum>&>(acc[n / 2]),
                Tile{tile.m + warpgroup * P::kRows, tile.n + n, tile.block}, warp_index() % 4 * 16,
                0, out);
        }
    }
}

/// Grid: one block per SM, or fewer. Shared memory: HopperTiling::kShared.
template <int KIND, bool BLOCKS>
__global__ void __launch_bounds__(hopper_threads(2), 1)
    eight_bit_hopper(const __grid_constant__ EightBitHopperArgs all) {
    if constexpr (kOnHopper) {
        using P = HopperTiling<KIND>;
        if (thread_index() == 0) {
            init_ring(P::full(0), P::empty(0), P::kStages, 2);
            barrier_init_done();
        }
        run_pipeline<2>([&] { copy_codes<P>(all); },
                        [&](int warpgroup) { multiply_tiles<KIND, BLOCKS>(all.args, warpgroup); });
    } else {
        not_for_this_gpu();
    }
}

}  // namespace qk
