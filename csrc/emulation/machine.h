// Runs a kernel on the CPU: one fiber per thread of a block, blocks one after another.
//
// Barriers and warp collectives are rendezvous points: a fiber that reaches one yields, and
// continues when all its partners have arrived. Between two rendezvous points a thread runs without
// interruption, so races never show in results. `checks.h` finds them instead: it records which
// thread accessed which byte in which epoch. The first error ends the launch, and `launch` returns
// it as text.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace qk::emulation {

/// Tells AddressSanitizer that this stack has no frames any more. An abandoned fiber does not.
inline void forget_frames([[maybe_unused]] char* stack, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, bytes);
#endif
}

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kOperandBytes = 128;

struct Index {
    uint32_t x = 1, y = 1, z = 1;
};

constexpr int kWarpgroup = 128;

/// What a fiber waits for: nothing, its block, its warp, its warpgroup, or a condition.
enum class Waits { nothing, block, warp, warpgroup, event };

/// One cp.async that has not arrived yet.
struct Copy {
    unsigned char* to;
    const unsigned char* from;
    uint32_t bytes, live;
};

/// A wgmma in flight, in one thread. async.h computes it when the thread waits for it.
struct Product {
    uint32_t given[4], *a;     // first operand: its registers at the start, and their address
    void* sums;                // this thread's sums
    const void *left, *right;  // descriptors' addresses; left is null if `a` is the first operand
    bool accumulate;
    void (*finish)(const Product&);
};

/// An mbarrier in shared memory.
struct Mbarrier {
    uint32_t count = 0, arrived = 0, phase = 0;
    int64_t bytes = 0;  // announced minus arrived
    struct Arrival {
        Copy copy;
        uint32_t warp, epoch;  // of the thread that started the copy, at that time
    };
    std::vector<Arrival> copies;
    // Epoch of each warp that the arrivals of this phase have seen, and that a wait learns.
    std::vector<uint32_t> seen, published;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = true;
    Waits waits = Waits::nothing;
    const char* where = "";  // name of the rendezvous
    // Its operands of a collective. There are two, because a lane may reach the next collective
    // before all lanes have read.
    unsigned char operands[2][kOperandBytes];
    int parity = 0;
    std::function<bool()> happened;  // the condition, for Waits::event
    std::vector<Copy> uncommitted;
    std::vector<std::vector<Copy>> committed;  // oldest first
    // The thread's wgmmas: not committed, finished by the last wait, and (groups) committed.
    std::vector<Product> issued, finished;
    std::vector<std::vector<Product>> groups;
};

/// A thread and its epochs at an access: they tell whether a barrier orders two accesses.
struct Moment {
    uint32_t thread = 0, block_epoch = 0, warp_epoch = 0;
};

/// For a byte of shared memory: the last write, the last reads by two different threads, and the
/// last read by another warpgroup.
struct ShadowByte {
    Moment written, read, read_too, read_far;
    bool pending = false;  // an asynchronous copy to it is in flight
};

/// A registered tensor. writer: for each byte, the thread of the launch that wrote it.
struct Region {
    uintptr_t begin, end;
    bool writable;
    std::vector<uint64_t> writer;
};

class Machine {
  public:
    std::vector<Region> regions;
    int block_order = 0;  // 0: first to last, 1: last to first, others: shuffled with this seed
    Index grid, block_size, block;
    uint32_t thread = 0;
    std::vector<unsigned char> shared_storage;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<ShadowByte> shadow;
    uint32_t first_epoch = 1, block_epoch = 1;
    std::vector<uint32_t> warp_epoch;
    // seen[a][b]: what warp b did before this epoch of b happened before what warp a does now
    std::vector<std::vector<uint32_t>> seen;
    std::map<const void*, Mbarrier> mbarriers;
    std::vector<Fiber> fibers;
    std::string error;

    static Machine& get() {
        static Machine machine;
        return machine;
    }

    Fiber& me() { return fibers[thread]; }
    uint32_t warp() const { return thread / kWarp; }
    Moment now() const { return {thread, block_epoch, warp_epoch[thread / kWarp]}; }

    void register_region(const void* p, size_t bytes, bool writable) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(p);
        regions.push_back({at, at + bytes, writable, {}});
    }

    /// Ends the launch with a message. Called on a fiber; does not return.
    [[noreturn]] void fail(const char* format, ...) {
        char text[400];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        char where[100];
        snprintf(where, sizeof where, " (block %u,%u,%u thread %u)", block.x, block.y, block.z,
                 thread);
        error = std::string(text) + where;
        setcontext(&scheduler_);
        __builtin_unreachable();
    }

    void wait(Waits what, const char* where) {
        me().waits = what;
        me().where = where;
        swapcontext(&me().context, &scheduler_);
    }

    void wait_until(std::function<bool()> happened, const char* where) {
        if (!happened()) {
            me().happened = std::move(happened);
            wait(Waits::event, where);
        }
    }

    /// Waits until all 32 lanes of the warp are here; then `lane(i)` is the operand of lane i.
    template <typename T>
    struct Met {
        const Machine& machine;
        int parity;
        T lane(uint32_t i) const {
            T value;
            const Fiber& f = machine.fibers[machine.thread / kWarp * kWarp + i];
            memcpy(&value, f.operands[parity], sizeof(T));
            return value;
        }
    };
    template <typename T>
    Met<T> meet(const char* where, const T& operands) {
        static_assert(sizeof(T) <= kOperandBytes, "");
        const int parity = me().parity ^= 1;
        memcpy(me().operands[parity], &operands, sizeof(T));
        wait(Waits::warp, where);
        return {*this, parity};
    }

    /// Runs `kernel` for every thread of the grid. Returns an error message, or "".
    std::string launch(Index grid_size, Index threads, size_t shared_size,
                       std::function<void()> kernel) {
        if (threads.x % kWarp != 0 || threads.y != 1 || threads.z != 1) {
            return "blocks must be whole warps in one dimension";
        }
        grid = grid_size;
        block_size = threads;
        kernel_ = std::move(kernel);
        error.clear();
        for (Region& r : regions) {
            r.writer.clear();
        }
        shared_bytes = shared_size;
        shared_storage.resize(shared_size + 1024);
        shared = shared_storage.data() +
                 (1024 - reinterpret_cast<uintptr_t>(shared_storage.data()) % 1024) % 1024;
        shadow.assign(shared_size, {});
        while (fibers.size() < threads.x) {
            fibers.emplace_back();
            fibers.back().stack.reset(new char[kStackBytes]);
        }
        for (uint64_t b : ordered(uint64_t(grid.x) * grid.y * grid.z)) {
            block = {uint32_t(b % grid.x), uint32_t(b / grid.x % grid.y),
                     uint32_t(b / grid.x / grid.y)};
            run_block();
            if (!error.empty()) {
                break;
            }
        }
        return error;
    }

  private:
    ucontext_t scheduler_;
    std::function<void()> kernel_;

    std::vector<uint64_t> ordered(uint64_t blocks) const {
        std::vector<uint64_t> order(blocks);
        for (uint64_t i = 0; i < blocks; i++) {
            order[i] = block_order == 1 ? blocks - 1 - i : i;
        }
        uint64_t state = block_order;
        for (uint64_t i = blocks; block_order > 1 && i > 1; i--) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            std::swap(order[i - 1], order[(state >> 33) % i]);
        }
        return order;
    }

    static void entry() {
        Machine& m = get();
        m.kernel_();
        if (!m.me().issued.empty() || !m.me().groups.empty()) {
            m.fail("wgmma: a product was never waited for");
        }
        m.me().done = true;
        setcontext(&m.scheduler_);
    }

    void run_block() {
        const uint32_t threads = block_size.x;
        first_epoch = ++block_epoch;
        warp_epoch.assign(threads / kWarp, 0);
        seen.assign(threads / kWarp, std::vector<uint32_t>(threads / kWarp, 0));
        mbarriers.clear();
        // Shared memory starts with a pattern, so that a kernel that reads it unwritten gives wrong
        // results.
        std::fill(shared, shared + shared_bytes, 0xFF);
        for (uint32_t t = 0; t < threads; t++) {
            Fiber& f = fibers[t];
            f.done = false;
            f.waits = Waits::nothing;
            f.uncommitted.clear();
            f.committed.clear();
            f.issued.clear();
            f.groups.clear();
            f.finished.clear();
            f.parity = 0;
            forget_frames(f.stack.get(), kStackBytes);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = kStackBytes;
            f.context.uc_link = nullptr;
            makecontext(&f.context, entry, 0);
        }
        for (;;) {
            bool ran = false;
            for (thread = 0; thread < threads && error.empty(); thread++) {
                if (!me().done && me().waits == Waits::event && me().happened()) {
                    me().waits = Waits::nothing;
                }
                if (!me().done && me().waits == Waits::nothing) {
                    ran = true;
                    resume();
                }
                if (thread % kWarp == kWarp - 1) {
                    ran |= release(thread - (kWarp - 1), kWarp, Waits::warp);
                }
                if (thread % kWarpgroup == kWarpgroup - 1) {
                    ran |= release(thread - (kWarpgroup - 1), kWarpgroup, Waits::warpgroup);
                }
            }
            if (!error.empty()) {
                return;
            }
            ran |= release(0, threads, Waits::block);
            if (!ran) {
                break;
            }
        }
        for (uint32_t t = 0; t < threads; t++) {
            if (!fibers[t].done) {
                thread = t;
                error = std::string("deadlock: waits for ever at ") + fibers[t].where;
                return;
            }
        }
    }

    void resume() {
        // `fail` and `entry` return here by setcontext; `resumed` tells that from the first pass.
        volatile bool resumed = false;
        getcontext(&scheduler_);
        if (!resumed) {
            resumed = true;
            setcontext(&me().context);
        }
    }

    /// Orders all earlier accesses of these warps before all their later ones.
    void order_warps(uint32_t first, uint32_t count) {
        std::vector<uint32_t> all(warp_epoch.size(), 0);
        for (uint32_t w = first; w < first + count; w++) {
            warp_epoch[w]++;
            seen[w][w] = warp_epoch[w];
            for (size_t other = 0; other < all.size(); other++) {
                all[other] = std::max(all[other], seen[w][other]);
            }
        }
        for (uint32_t w = first; w < first + count; w++) {
            seen[w] = all;
        }
    }

    /// Lets threads [first, first + count) continue if all wait at the same place; returns whether
    /// it did.
    bool release(uint32_t first, uint32_t count, Waits what) {
        for (uint32_t t = first; t < first + count; t++) {
            const Fiber& f = fibers[t];
            if (f.done || f.waits != what || strcmp(f.where, fibers[first].where) != 0) {
                return false;
            }
        }
        if (what == Waits::block) {
            block_epoch++;
        } else if (strcmp(fibers[first].where, "__syncwarp") == 0) {
            warp_epoch[first / kWarp]++;
        } else if (strcmp(fibers[first].where, "bar.sync of a warpgroup") == 0) {
            order_warps(first / kWarp, count / kWarp);
        }
        for (uint32_t t = first; t < first + count; t++) {
            fibers[t].waits = Waits::nothing;
        }
        return true;
    }
};

}  // namespace qk::emulation
