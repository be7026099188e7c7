// Kernels with one bug each, which the emulator must find, and correct kernels next to them, in
// which it must find nothing.
#include "../ptx/launch.h"
#include "../ptx/warp.h"
#include "control.h"

namespace qk {
namespace {

struct Args {
    const char* bug;
    const uint32_t* in;  // 64 words
    uint32_t* out;       // 64 words
    int* counter;
};

bool is(const Args& args, const char* bug) { return strcmp(args.bug, bug) == 0; }

__global__ void planted(Args args) {
    const uint32_t t = thread_index();
    auto* shared = reinterpret_cast<uint32_t*>(shared_memory());  // 64 words
    if (is(args, "global read out of bounds")) {
        store_global(args.out + t, load_global(args.in + t + 1));
    } else if (is(args, "global write out of bounds")) {
        store_global(args.out + t + 1, t);
    } else if (is(args, "write to an input")) {
        store_global(const_cast<uint32_t*>(args.in), t);
    } else if (is(args, "global race")) {
        store_global(args.out + t % 63, t);
    } else if (is(args, "misaligned")) {
        load_global(reinterpret_cast<const Words4*>(args.in + 1));
    } else if (is(args, "misaligned shared")) {
        store_shared(reinterpret_cast<uint64_t*>(shared + 1), uint64_t(0));
    } else if (is(args, "shared out of bounds")) {
        store_shared(shared + t + 1, t);
    } else if (is(args, "unwritten")) {
        if (t < 63) {
            store_shared(shared + t, t);
        }
        sync_block();
        store_global(args.out + t, load_shared(shared + t));
    } else if (is(args, "no barrier")) {
        store_shared(shared + t, t);
        store_global(args.out + t, load_shared(shared + (t ^ 33)));
    } else if (is(args, "warp barrier for a block")) {
        store_shared(shared + t, t);
        sync_warp();
        store_global(args.out + t, load_shared(shared + (t ^ 33)));
    } else if (is(args, "warp barrier for a warp: sound")) {
        store_shared(shared + t, t);
        sync_warp();
        store_global(args.out + t, load_shared(shared + (t ^ 1)));
    } else if (is(args, "write after read")) {
        store_shared(shared + t, t);
        sync_block();
        if (t < 32) {
            store_global(args.out + t, load_shared(shared + t + 32));
        } else {
            store_shared(shared + t, t);
        }
    } else if (is(args, "deadlock")) {
        if (t < 32) {
            sync_block();
        }
    } else if (is(args, "diverged")) {
        t % 2 ? sync_warp() : void(ballot(true));
    } else if (strncmp(args.bug, "copy", 4) == 0) {
        if (t < 16) {
            copy_async(shared + t * 4, args.in + t * 4, is(args, "copy of 12: sound") ? 12 : 16);
        }
        copy_async_commit();
        if (is(args, "copy over a copy") && t < 16) {
            copy_async(shared + t * 4, args.in + t * 4, 16);
        }
        if (is(args, "copy waited for too late")) {
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        if (!is(args, "copy without barrier")) {
            sync_block();
        }
        store_global(args.out + t, load_shared(shared + t));
    } else if (is(args, "last block: sound")) {
        const int before = atomic_add_acq_rel(args.counter, 1);
        store_global(args.out + t, shuffle_xor(t, 5) + ballot(t % 32 == 3) + uint32_t(before > 63));
    }
}

}  // namespace
}  // namespace qk

extern "C" const char* qk_planted(const char* bug, const uint32_t* in, uint32_t* out,
                                  int* counter) {
    static std::string error;
    error = qk::launch<qk::Args>(qk::planted, {1, 1, 64, 256}, {bug, in, out, counter}, 0, false);
    return error.c_str();
}
