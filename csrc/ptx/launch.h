// Launches a kernel that takes one struct of arguments: on a stream, or in the emulator. And lists
// the entry points of all kernels.
#pragma once
#include <string>

#include "target.h"

namespace qk {

/// An entry point that Python calls by its name. All entries are a list, which grows while the
/// module is loaded: so only the source file of a kernel names it.
struct Entry {
    using Run = const char* (*)(const void* call);
    const char* name;
    Run run;
    const Entry* next;

    Entry(const char* its_name, Run its_run) : name(its_name), run(its_run), next(first()) {
        first() = this;
    }
    static const Entry*& first() {
        static const Entry* entry = nullptr;
        return entry;
    }
};

/// An entry NAME that calls the function after CALL, the class of its argument. It returns an error
/// message, or "". Tests call `qk_NAME`.
#define QK_ENTRY(NAME, CALL, ...)                                                        \
    extern "C" const char* qk_##NAME(const qk::CALL* call) { return __VA_ARGS__(call); } \
    static const qk::Entry qk_entry_##NAME(                                              \
        #NAME, [](const void* call) { return qk_##NAME(static_cast<const qk::CALL*>(call)); });

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
