// The pipeline of both Hopper kernels: one thread copies into rings of shared memory, and the warps
// of two or three warpgroups consume what it copies.
//
//      warpgroup 0      thread 0: the producer, which starts every TMA copy; the others idle
//      warpgroup 1 ..   the consumers, which multiply
//
// Every stage of a ring has two mbarriers: `full`, which the copies complete, and `empty`, at which
// each consumer warp arrives when it is done with the stage.
#pragma once
#include "hopper.h"

namespace qk {

/// Threads of a block with this many consumer warpgroups.
constexpr int hopper_threads(int consumers) { return 128 * (consumers + 1); }

/// A stage of a ring of COUNT stages, and the parity of the mbarrier phase that fills it.
template <int COUNT>
struct RingPosition {
    int index = 0;
    uint32_t parity = 0;
    QK_DEVICE void next() {
        if (++index == COUNT) {
            index = 0;
            parity ^= 1;
        }
    }
};

/// Initializes the mbarriers of a ring. full, empty: the first of `stages` each; consumers: their
/// warpgroups. One thread does it; `barrier_init_done` and a block-wide barrier follow.
QK_DEVICE void init_ring(Barrier* full, Barrier* empty, int stages, int consumers) {
    QK_UNROLL
    for (int i = 0; i < stages; i++) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, consumers * 4);
    }
}

/// This warp is done with the stage that `empty` guards.
QK_DEVICE void release(Barrier* empty) {
    sync_warp();
    if (lane_index() == 0) {
        barrier_arrive(empty);
    }
}

/// After the mbarriers are initialized: runs `produce()` in one thread and `consume(warpgroup)` in
/// the CONSUMERS other warpgroups, which are numbered from 0 and get the producers' registers.
template <int CONSUMERS, typename Produce, typename Consume>
QK_DEVICE void run_pipeline(Produce produce, Consume consume) {
    static_assert(CONSUMERS == 2 || CONSUMERS == 3, "");
    // An SM has 65,536 registers; a thread has a multiple of 8.
    constexpr int producer = CONSUMERS == 2 ? 24 : 32, consumer = CONSUMERS == 2 ? 240 : 160;
    sync_block();
    let_next_kernel_start();
    if (warp_index() < 4) {
        decrease_registers<producer>();
        if (thread_index() == 0) {
            produce();
        }
    } else {
        increase_registers<consumer>();
        consume(int(warp_index()) / 4 - 1);
    }
}

}  // namespace qk
