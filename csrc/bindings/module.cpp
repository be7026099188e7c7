// The Python module. Tensors are passed as addresses, so it works with every version of torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "../eight_bit/arguments.h"
#include "../transforms/arguments.h"
#include "../weight_only/arguments.h"

#define QK_KERNELS(X)                                  \
    X(weight_only_linear2, WeightOnlyCall)             \
    X(weight_only_linear3, WeightOnlyCall)             \
    X(weight_only_linear4, WeightOnlyCall)             \
    X(weight_only_linear8, WeightOnlyCall)             \
    X(weight_only_lut16, WeightOnlyCall)               \
    X(weight_only_e4m3, WeightOnlyCall)                \
    X(weight_only_e5m2, WeightOnlyCall)                \
    X(weight_only_signed4, WeightOnlyCall)             \
    X(weight_only_signed5, WeightOnlyCall)             \
    X(weight_only_signed8, WeightOnlyCall)             \
    X(weight_only_unsigned4_scale_min, WeightOnlyCall) \
    X(weight_only_unsigned5_scale_min, WeightOnlyCall) \
    X(weight_only_unsigned2_q2_k, WeightOnlyCall)      \
    X(weight_only_signed3_q3_k, WeightOnlyCall)        \
    X(weight_only_unsigned4_q4_k, WeightOnlyCall)      \
    X(weight_only_unsigned5_q4_k, WeightOnlyCall)      \
    X(weight_only_signed6_q6_k, WeightOnlyCall)        \
    X(weight_only_lut16_iq4_xs, WeightOnlyCall)        \
    X(weight_only_unsigned2_two_level, WeightOnlyCall) \
    X(weight_only_unsigned3_two_level, WeightOnlyCall) \
    X(weight_only_unsigned4_two_level, WeightOnlyCall) \
    X(weight_only_half_integer2, WeightOnlyCall)       \
    X(weight_only_half_integer3, WeightOnlyCall)       \
    X(weight_only_half_integer4, WeightOnlyCall)       \
    X(weight_only_e8p2, WeightOnlyCall)                \
    X(weight_only_e8p3, WeightOnlyCall)                \
    X(weight_only_e8p4, WeightOnlyCall)                \
    X(transform_rows, TransformCall)                   \
    X(quantize_rows, QuantizeCall)                     \
    X(eight_bit_int8, EightBitCall)                    \
    X(eight_bit_e4m3, EightBitCall)                    \
    X(eight_bit_e5m2, EightBitCall)

extern "C" {
#define QK_DECLARE(NAME, CALL) const char* qk_##NAME(const qk::CALL*);
QK_KERNELS(QK_DECLARE)
}

namespace {

using Kernel = std::function<const char*(uintptr_t)>;
#define QK_ENTRY(NAME, CALL) \
    {#NAME, [](uintptr_t call) { return qk_##NAME(reinterpret_cast<const qk::CALL*>(call)); }},
const std::map<std::string, Kernel> kKernels = {QK_KERNELS(QK_ENTRY)};

std::string run(const std::string& name, uintptr_t call) {
    const auto entry = kKernels.find(name);
    if (entry == kKernels.end()) {
        throw std::invalid_argument("no CUDA kernel named " + name);
    }
    return entry->second(call);
}

int version(cudaError_t (*ask)(int*)) {
    int number = 0;
    return ask(&number) == cudaSuccess ? number : 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of qkernels; see qkernels.backends.cuda.";
    m.def("run", run, "Start a kernel. Returns an empty string, or CUDA's error message.");
    m.def("toolkit_version", [] { return CUDART_VERSION; }, "13000 for CUDA 13.0");
    m.def("driver_version", [] { return version(cudaDriverGetVersion); }, "0 without a driver");
}
