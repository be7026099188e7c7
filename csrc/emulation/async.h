// Models of Hopper's asynchronous instructions: copies that an mbarrier counts, and products of a
// warpgroup. A copy arrives and a product is computed as late as the kernel allows, so that a
// thread that does not wait finds neither.
#pragma once
#include "checks.h"

namespace qk::emulation {

inline Mbarrier& mbarrier_at(const void* p) {
    Machine& m = Machine::get();
    note_shared_read(p, 8);
    const auto entry = m.mbarriers.find(p);
    if (entry == m.mbarriers.end()) {
        m.fail("use of an mbarrier that was not initialized");
    }
    return entry->second;
}

inline void mbarrier_init(void* p, uint32_t count) {
    Machine& m = Machine::get();
    check_aligned(p, 8);
    note_shared_write(p, 8);
    Mbarrier b;
    b.count = count;
    b.seen.assign(m.warp_epoch.size(), 0);
    b.published = b.seen;
    m.mbarriers[p] = b;
}

/// Ends the phase if all threads have arrived; the copies in flight arrive first.
inline void mbarrier_try_complete(Mbarrier& b) {
    Machine& m = Machine::get();
    if (b.arrived < b.count) {
        return;
    }
    for (const Mbarrier::Arrival& a : b.copies) {
        memset(a.copy.to, 0, a.copy.bytes);
        memcpy(a.copy.to, a.copy.from, a.copy.live);
        ShadowByte* s = m.shadow.data() + (a.copy.to - m.shared);
        for (uint32_t i = 0; i < a.copy.bytes; i++) {
            s[i].pending = false;
        }
        b.bytes -= a.copy.bytes;
        b.seen[a.warp] = std::max(b.seen[a.warp], a.epoch + 1);
    }
    b.copies.clear();
    if (b.bytes != 0) {
        return;  // bytes were announced whose copy has not started
    }
    b.phase ^= 1;
    b.arrived = 0;
    b.published = b.seen;
}

/// Arrives. This publishes what the warp did before its last __syncwarp, and what it has seen.
inline void mbarrier_arrive(const void* p, uint32_t bytes) {
    Machine& m = Machine::get();
    Mbarrier& b = mbarrier_at(p);
    if (b.arrived == b.count) {
        mbarrier_try_complete(b);
    }
    if (b.arrived == b.count) {
        m.fail("mbarrier: more arrivals than its count of %u", b.count);
    }
    const uint32_t w = m.warp();
    for (size_t other = 0; other < b.seen.size(); other++) {
        b.seen[other] = std::max(b.seen[other], m.seen[w][other]);
    }
    b.seen[w] = std::max(b.seen[w], m.warp_epoch[w]);
    b.arrived++;
    b.bytes += bytes;
}

inline void mbarrier_wait(const void* p, uint32_t parity) {
    Machine& m = Machine::get();
    Mbarrier& b = mbarrier_at(p);
    m.wait_until(
        [&b, parity] {
            if (b.phase == parity) {
                mbarrier_try_complete(b);
            }
            return b.phase != parity;
        },
        "mbarrier.try_wait");
    std::vector<uint32_t>& seen = m.seen[m.warp()];
    for (size_t other = 0; other < seen.size(); other++) {
        seen[other] = std::max(seen[other], b.published[other]);
    }
}

/// Copies `live` bytes from global memory, and zeros after them; they arrive with the barrier's
/// phase.
inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint32_t live,
                      const void* barrier) {
    Machine& m = Machine::get();
    check_aligned(to, 16);
    check_aligned(from, 16);
    check_global(from, live, false);
    note_shared_write(to, bytes, true);
    mbarrier_at(barrier).copies.push_back(
        {{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, live},
         m.warp(),
         m.warp_epoch[m.warp()]});
}
/// Ends the copies of one instruction, so that later accesses are ordered after them.
inline void copies_started() { Machine::get().warp_epoch[Machine::get().warp()]++; }

/// Address of 16 bytes in rows of 128 bytes whose 8 units are swizzled. p: the address without it.
inline unsigned char* swizzled128(const void* p) {
    const unsigned char* base = Machine::get().shared;
    const size_t at = static_cast<const unsigned char*>(p) - base;
    return const_cast<unsigned char*>(base) + (at ^ ((at >> 7 & 7) << 4));
}

/// Starts a product. Its operands must not change until it is waited for.
inline void product_issue(Product product) {
    Machine::get().wait(Waits::warpgroup, "wgmma");
    if (product.a != nullptr) {
        memcpy(product.given, product.a, sizeof product.given);
    }
    Machine::get().me().issued.push_back(product);
}
inline void product_commit() {
    Fiber& me = Machine::get().me();
    me.groups.push_back(std::move(me.issued));
    me.issued.clear();
}
inline void product_wait(size_t left) {
    Machine& m = Machine::get();
    Fiber& me = m.me();
    if (!me.issued.empty()) {
        m.fail("wgmma: waits for a product that was not committed");
    }
    m.wait(Waits::warpgroup, "wgmma.wait_group");  // no thread still reads earlier products
    me.finished.clear();
    while (me.groups.size() > left) {
        for (const Product& p : me.groups.front()) {
            if (p.a != nullptr && memcmp(p.given, p.a, sizeof p.given) != 0) {
                m.fail("registers of a wgmma on its way were changed");
            }
            me.finished.push_back(p);
        }
        me.groups.erase(me.groups.begin());
    }
    m.wait(Waits::warpgroup, "wgmma.wait_group: operands");
    for (const Product& p : me.finished) {
        p.finish(p);
    }
}
/// The first operand of the same product in another lane's registers.
inline const uint32_t* given_by(uint32_t lane, const Product& mine) {
    Machine& m = Machine::get();
    const size_t index = &mine - m.me().finished.data();
    return m.fibers[m.thread / kWarp * kWarp + lane].finished[index].given;
}

}  // namespace qk::emulation
