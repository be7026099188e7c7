// Launches a kernel that takes one struct of arguments: on a stream, or in the emulator.
#pragma once
#include <string>

#include "target.h"

namespace qk {

struct Grid {
    uint32_t x, y, threads;
    size_t shared;
};

/// Launches. pdl: programmatic dependent launch (sm_90+); the kernel may start before the last one
/// is done, and itself waits for it. Returns an error message, or "".
template <typename Args>
std::string launch(void (*kernel)(Args), Grid grid, Args args, uint64_t stream, bool pdl) {
#ifdef __CUDACC__
    if (grid.shared > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared));
        if (error != cudaSuccess) {
            return cudaGetErrorString(error);
        }
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid.x, grid.y);
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = pdl ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
#else
    (void)stream, (void)pdl;
    return emulation::Machine::get().launch({grid.x, grid.y, 1}, {grid.threads, 1, 1}, grid.shared,
                                            [=] { kernel(args); });
#endif
}

}  // namespace qk
