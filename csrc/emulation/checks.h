// The checks of the emulator at each access to global or shared memory.
#pragma once
#include "machine.h"

namespace qk::emulation {

/// Whether a barrier orders the access `before` before this thread's next one.
inline bool ordered(const Machine& m, const Moment& before) {
    const Moment now = m.now();
    return before.block_epoch < m.first_epoch || before.thread == now.thread ||
           before.block_epoch != now.block_epoch ||
           (before.thread / kWarp == now.thread / kWarp
                ? before.warp_epoch != now.warp_epoch
                : before.warp_epoch < m.seen[now.thread / kWarp][before.thread / kWarp]);
}

inline void check_aligned(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
        Machine::get().fail("misaligned access of %zu bytes", bytes);
    }
}

/// A global access must be inside one registered tensor. A write must be allowed, and no other
/// thread may have written the byte.
inline void check_global(const void* p, size_t bytes, bool write, bool atomic = false) {
    Machine& m = Machine::get();
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    if (bytes == 0) {
        return;
    }
    for (Region& r : m.regions) {
        if (at >= r.begin && at + bytes <= r.end) {
            if (write && !r.writable) {
                m.fail("global write to an input");
            }
            if (write && !atomic) {
                r.writer.resize(r.end - r.begin);
                const uint64_t block =
                    (uint64_t(m.block.z) * m.grid.y + m.block.y) * m.grid.x + m.block.x;
                const uint64_t self = block * m.block_size.x + m.thread + 1;
                for (size_t i = at - r.begin; i < at - r.begin + bytes; i++) {
                    if (r.writer[i] != 0 && r.writer[i] != self) {
                        m.fail("global race: two threads write one byte");
                    }
                    r.writer[i] = self;
                }
            }
            return;
        }
    }
    m.fail("global %s of %zu bytes out of bounds", write ? "write" : "read", bytes);
}

inline ShadowByte* shadow_of(const void* p, size_t bytes) {
    Machine& m = Machine::get();
    const unsigned char* at = static_cast<const unsigned char*>(p);
    if (at < m.shared || at + bytes > m.shared + m.shared_bytes) {
        m.fail("shared access of %zu bytes out of bounds", bytes);
    }
    return m.shadow.data() + (at - m.shared);
}

inline void note_shared_read(const void* p, size_t bytes) {
    Machine& m = Machine::get();
    ShadowByte* s = shadow_of(p, bytes);
    for (size_t i = 0; i < bytes; i++) {
        if (s[i].written.block_epoch < m.first_epoch) {
            m.fail("read of unwritten shared memory");
        }
        if (s[i].pending) {
            m.fail("read of shared memory before its asynchronous copy was waited for");
        }
        if (!ordered(m, s[i].written)) {
            m.fail("shared race: read after write of thread %u", s[i].written.thread);
        }
        if (s[i].read.thread != m.thread || s[i].read.block_epoch < m.first_epoch) {
            s[i].read_too = s[i].read;
        }
        if (s[i].read.thread / kWarpgroup != m.thread / kWarpgroup) {
            s[i].read_far = s[i].read;
        }
        s[i].read = m.now();
    }
}

/// pending: an asynchronous copy to these bytes starts; otherwise they are written now.
inline void note_shared_write(const void* p, size_t bytes, bool pending = false) {
    Machine& m = Machine::get();
    ShadowByte* s = shadow_of(p, bytes);
    for (size_t i = 0; i < bytes; i++) {
        if (s[i].pending && pending && s[i].written.block_epoch >= m.first_epoch) {
            m.fail("shared write over a copy on its way");
        }
        for (const Moment* before : {&s[i].written, &s[i].read, &s[i].read_too, &s[i].read_far}) {
            if (!ordered(m, *before)) {
                m.fail("shared race: write after access of thread %u", before->thread);
            }
        }
        s[i].written = m.now();
        s[i].pending = pending;
    }
}

/// The copies of one cp.async group arrive.
inline void arrive(const std::vector<Copy>& group) {
    for (const Copy& c : group) {
        note_shared_write(c.to, c.bytes);
        memset(c.to, 0, c.bytes);
        memcpy(c.to, c.from, c.live);
    }
}

}  // namespace qk::emulation
