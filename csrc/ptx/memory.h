// Global and shared memory: kernels access memory only through these functions.
#pragma once
#include "target.h"

namespace qk {

/// This block's dynamic shared memory.
QK_DEVICE unsigned char* shared_memory() {
#ifdef __CUDACC__
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    return dynamic_shared;
#else
    return emulation::Machine::get().shared;
#endif
}

template <typename T>
QK_DEVICE T load_global(const T* p) {
#ifndef __CUDACC__
    emulation::check_aligned(p, sizeof(T));
    emulation::check_global(p, sizeof(T), false);
#endif
    return *p;
}

/// ld.global.cg: reads the L2, where stores of other blocks are.
QK_DEVICE float load_l2(const float* p) {
#ifdef __CUDACC__
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(p) : "memory");
    return value;
#else
    return load_global(p);
#endif
}

/// Cache policy for bytes that are read once: the L2 evicts them first.
QK_DEVICE uint64_t evict_first() {
#ifdef __CUDACC__
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
#else
    return 0;
#endif
}

/// Loads 16 read-only bytes without a place in the L1.
QK_DEVICE Words4 load_stream(const Words4* p, uint64_t policy) {
#ifdef __CUDACC__
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(p), "l"(policy));
    return v;
#else
    return load_global(p);
#endif
}
template <typename T>
QK_DEVICE void store_global(T* p, T value) {
#ifndef __CUDACC__
    emulation::check_aligned(p, sizeof(T));
    emulation::check_global(p, sizeof(T), true);
#endif
    *p = value;
}

/// Loads from this block's shared memory.
template <typename T>
QK_DEVICE T load_shared(const T* p) {
#ifndef __CUDACC__
    emulation::check_aligned(p, sizeof(T));
    emulation::note_shared_read(p, sizeof(T));
#endif
    return *p;
}
template <typename T>
QK_DEVICE void store_shared(T* p, T value) {
#ifndef __CUDACC__
    emulation::check_aligned(p, sizeof(T));
    emulation::note_shared_write(p, sizeof(T));
#endif
    *p = value;
}

#ifndef __CUDACC__
inline void emulated_copy(void* to, const void* from, uint32_t bytes, uint32_t live) {
    emulation::check_aligned(to, bytes);
    emulation::check_aligned(from, bytes);
    emulation::check_global(from, live, false);
    emulation::note_shared_write(to, bytes, true);
    emulation::Machine::get().me().uncommitted.push_back(
        {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, live});
}
#endif

/// cp.async: copies 16 bytes from global to shared memory; only the first `live` are read, the rest
/// are zero.
QK_DEVICE void copy_async(void* to, const void* from, uint32_t live) {
#ifdef __CUDACC__
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(live)
                 : "memory");
#else
    emulated_copy(to, from, 16, live);
#endif
}
/// `copy_async` of bytes that other blocks of the SM copy too: they stay in the L1.
QK_DEVICE void copy_async_l1(void* to, const void* from, uint32_t live) {
#ifdef __CUDACC__
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(live)
                 : "memory");
#else
    emulated_copy(to, from, 16, live);
#endif
}
/// `copy_async_l1` of 16 bytes, or nothing.
QK_DEVICE void copy_async_l1_if(bool condition, void* to, const void* from) {
#ifdef __CUDACC__
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n"
        "@p cp.async.ca.shared.global [%0], [%1], 16;\n}" ::"r"(at),
        "l"(from), "r"(uint32_t(condition))
        : "memory");
#else
    if (condition) {
        emulated_copy(to, from, 16, 16);
    }
#endif
}
/// `copy_async` of 16, 8 or 4 bytes that are read once; the policy is for the L2.
QK_DEVICE void copy_async_stream(Words4* to, const Words4* from, uint64_t policy) {
#ifdef __CUDACC__
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(at),
                 "l"(from), "l"(policy)
                 : "memory");
#else
    emulated_copy(to, from, 16, 16);
#endif
}
template <typename Words>
QK_DEVICE void copy_async_stream(Words* to, const Words* from, uint64_t policy) {
#ifdef __CUDACC__
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"(at),
                 "l"(from), "n"(sizeof(Words)), "l"(policy)
                 : "memory");
#else
    emulated_copy(to, from, sizeof(Words), sizeof(Words));
#endif
}
QK_DEVICE void copy_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulation::Fiber& me = emulation::Machine::get().me();
    me.committed.push_back(std::move(me.uncommitted));
    me.uncommitted.clear();
#endif
}
/// Waits until at most GROUPS of this thread's groups are in flight.
template <int GROUPS>
QK_DEVICE void copy_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#else
    emulation::Fiber& me = emulation::Machine::get().me();
    while (me.committed.size() > GROUPS) {
        emulation::arrive(me.committed.front());
        me.committed.erase(me.committed.begin());
    }
#endif
}

/// *p += value; returns the old value. Acquires and releases: a thread that counts later sees what
/// this one has seen.
QK_DEVICE int atomic_add_acq_rel(int* p, int value) {
#ifdef __CUDACC__
    int old;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(p), "r"(value)
                 : "memory");
    return old;
#else
    emulation::check_aligned(p, sizeof(int));
    emulation::check_global(p, sizeof(int), true, true);
    const int old = *p;
    *p += value;
    return old;
#endif
}
/// Makes this thread's global writes visible to every thread that sees a later write of it.
QK_DEVICE void fence_global() {
#ifdef __CUDACC__
    __threadfence();
#endif
}

QK_DEVICE void sync_block() {
#ifdef __CUDACC__
    __syncthreads();
#else
    emulation::Machine::get().wait(emulation::Waits::block, "__syncthreads");
#endif
}
QK_DEVICE void sync_warp() {
#ifdef __CUDACC__
    __syncwarp();
#else
    emulation::Machine::get().wait(emulation::Waits::warp, "__syncwarp");
#endif
}

/// Programmatic dependent launch (PDL): lets the next kernel start; and waits for the last kernel,
/// whose writes are then visible.
QK_DEVICE void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
QK_DEVICE void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace qk
