// Kernels with one bug each in Hopper's instructions, and correct kernels next to them. Copies: one
// thread of the first warpgroup copies a box of 8 rows x 128 bytes to the same place twice, and the
// second warpgroup reads it. Also products of a warpgroup, and its barrier.
#include "../ptx/launch.h"
#include "../ptx/pipeline.h"
#include "../ptx/wgmma.h"
#include "control.h"

namespace qk {
namespace {

constexpr int kBox = 8 * 128;

struct Args {
    const char* bug;
    TensorMap map;  // 8 rows x 32 words
    uint32_t* out;  // 256 words
};

bool is(const Args& args, const char* bug) { return strcmp(args.bug, bug) == 0; }

void copies(const Args& args) {
    unsigned char* box = shared_memory();
    auto* full = reinterpret_cast<Barrier*>(box + kBox);
    Barrier* empty = full + 1;
    const bool by_one_warp = is(args, "copy: freed by one warp for all");
    if (thread_index() == 0) {
        if (!is(args, "copy: barrier not initialized")) {
            barrier_init(full, 1);
        }
        barrier_init(empty, by_one_warp ? 1 : 4);
        barrier_init_done();
    }
    sync_block();
    if (thread_index() == 0) {
        for (uint32_t i = 0; i < 2; i++) {
            if (!is(args, "copy: over what is on its way")) {
                barrier_wait(empty, i ^ 1);
            }
            barrier_arrive_expect(full, is(args, "copy: fewer bytes announced") ? kBox / 2 : kBox);
            copy_box(box, args.map, 0, is(args, "copy: beyond the rows: sound") ? 4 : 0, full);
        }
    } else if (warp_index() >= 4) {
        const uint32_t t = thread_index() - 128, lane = lane_index();
        for (uint32_t i = 0; i < 2; i++) {
            if (!is(args, "copy: not waited for") &&
                (warp_index() == 4 || !is(args, "copy: waited for by one warp"))) {
                barrier_wait(full, i);
            }
            uint32_t sum = 0;
            for (uint32_t w = t; w < kBox / 4; w += 128) {  // word of a row, swizzled
                const uint32_t row = w / 32, unit = w % 32 / 4 ^ row, word = unit * 4 + w % 4;
                sum += load_shared(reinterpret_cast<const uint32_t*>(box) + row * 32 + word);
            }
            store_global(args.out + t + i * 128, sum);
            if (is(args, "copy: freed without a warp barrier") && lane == 0) {
                barrier_arrive(empty);
            } else if (!by_one_warp || warp_index() == 4) {
                release(empty);
            }
        }
    }
}

void products(const Args& args) {
    // a: (64, 16) ones in registers. b: 128 rows; every element of row r is r % 4.
    auto* b = reinterpret_cast<uint16_t*>(shared_memory());
    for (uint32_t i = thread_index(); i < 128 * 64; i += blocks_x() * 256) {
        store_shared(b + i, from_float<Half>(float(i / 64 % 4)).bits);
    }
    sync_block();
    if (warp_index() < 4) {
        return;
    }
    uint32_t a[4] = {0x3C003C00, 0x3C003C00, 0x3C003C00, 0x3C003C00};
    float sums[64] = {};
    product_fence();
    product<Half, 128>(sums, a, operand_at(b));
    if (!is(args, "product: not committed")) {
        product_commit();
    }
    if (is(args, "product: its registers change")) {
        a[1] = 0;
    }
    if (is(args, "product: never waited for")) {
        return;
    }
    product_wait<0>();
    const uint32_t t = thread_index() - 128;
    store_global(args.out + t, uint32_t(sums[5]));  // row q, column 8 + 2j + 1
    store_global(args.out + 128 + t, 0u);
}

void warpgroup_barrier(const Args& args) {
    auto* words = reinterpret_cast<uint32_t*>(shared_memory());
    const uint32_t t = thread_index(), other = t ^ 64;
    store_shared(words + t, t);
    if (is(args, "barrier of a warpgroup: sound")) {
        sync_warpgroup(1 + t / 128);
    } else {
        sync_warp();
    }
    store_global(args.out + t, load_shared(words + other));
}

__global__ void planted(Args args) {
    strncmp(args.bug, "copy", 4) == 0      ? copies(args)
    : strncmp(args.bug, "product", 7) == 0 ? products(args)
                                           : warpgroup_barrier(args);
}

}  // namespace
}  // namespace qk

extern "C" const char* qk_planted(const char* bug, const uint32_t* in, uint32_t* out) {
    static std::string error;
    qk::Args args{bug, {}, out};
    error = qk::encode_tensor_map(args.map, qk::Element::byte, in, 128, 8, 128, 8);
    if (error.empty()) {
        error = qk::launch<qk::Args>(qk::planted, {1, 1, 256, 128 * 128}, args, 0, false);
    }
    return error.c_str();
}
