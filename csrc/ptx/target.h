// Where a kernel runs: on a GPU, or in the CPU emulator. Only this file and the wrappers beside it
// know. Kernels include these headers, and contain no asm and no test for the compiler.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define QK_DEVICE __device__ __forceinline__
#define QK_HOST_DEVICE __host__ __device__ __forceinline__
#define QK_NOINLINE static __device__ __noinline__
#define QK_UNROLL _Pragma("unroll")
#define QK_PRAGMA(TEXT) _Pragma(#TEXT)
#define QK_UNROLL_BY(COUNT) QK_PRAGMA(unroll COUNT)
#else
#include "../emulation/checks.h"
#define QK_DEVICE inline
#define QK_HOST_DEVICE inline
#define QK_NOINLINE inline
#define QK_UNROLL
#define QK_UNROLL_BY(COUNT)
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#endif

namespace qk {

/// Whether the code is compiled for Hopper.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr bool kIsHopper = true;
#else
constexpr bool kIsHopper = false;
#endif

/// 16-bit floats as bits; the wrappers have their arithmetic.
struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

/// 16 and 8 bytes that one instruction loads or stores.
struct alignas(16) Words4 {
    uint32_t w[4];
};
struct alignas(8) Words2 {
    uint32_t w[2];
};

/// Stops a kernel that was compiled for a GPU without its instructions, and so has no body: without
/// this, y would stay unwritten.
QK_DEVICE void not_for_this_gpu() {
#ifdef __CUDACC__
    asm volatile("trap;");
#else
    emulation::Machine::get().fail("a kernel, or an instruction, that is not for this GPU");
#endif
}

QK_DEVICE uint32_t thread_index() {
#ifdef __CUDACC__
    return threadIdx.x;
#else
    return emulation::Machine::get().thread;
#endif
}
QK_DEVICE uint32_t block_index_x() {
#ifdef __CUDACC__
    return blockIdx.x;
#else
    return emulation::Machine::get().block.x;
#endif
}
QK_DEVICE uint32_t block_index_y() {
#ifdef __CUDACC__
    return blockIdx.y;
#else
    return emulation::Machine::get().block.y;
#endif
}
QK_DEVICE uint32_t threads_x() {
#ifdef __CUDACC__
    return blockDim.x;
#else
    return emulation::Machine::get().block_size.x;
#endif
}
QK_DEVICE uint32_t blocks_x() {
#ifdef __CUDACC__
    return gridDim.x;
#else
    return emulation::Machine::get().grid.x;
#endif
}
QK_DEVICE uint32_t blocks_y() {
#ifdef __CUDACC__
    return gridDim.y;
#else
    return emulation::Machine::get().grid.y;
#endif
}

}  // namespace qk
