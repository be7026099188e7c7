// The Python module. Tensors are passed as addresses, so it works with every version of torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ptx/launch.h"

namespace {

/// Every entry point by its name.
const std::map<std::string, qk::Entry::Run>& kernels() {
    static const auto all = [] {
        std::map<std::string, qk::Entry::Run> runs;
        for (const qk::Entry* entry = qk::Entry::first(); entry != nullptr; entry = entry->next) {
            runs[entry->name] = entry->run;
        }
        return runs;
    }();
    return all;
}

std::string run(const std::string& name, uintptr_t call) {
    const auto entry = kernels().find(name);
    if (entry == kernels().end()) {
        throw std::invalid_argument("no CUDA kernel named " + name);
    }
    return entry->second(reinterpret_cast<const void*>(call));
}

std::vector<std::string> names() {
    std::vector<std::string> all;
    for (const auto& entry : kernels()) {
        all.push_back(entry.first);
    }
    return all;
}

/// The architectures of the build, QK_ARCHS such as 80_90a.
#define QK_TEXT_OF(x) #x
#define QK_TEXT(x) QK_TEXT_OF(x)
std::vector<std::string> archs() {
    std::vector<std::string> all;
    std::stringstream text(QK_TEXT(QK_ARCHS));
    for (std::string arch; std::getline(text, arch, '_');) {
        all.push_back(arch);
    }
    return all;
}

int version(cudaError_t (*ask)(int*)) {
    int number = 0;
    return ask(&number) == cudaSuccess ? number : 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of qkernels; see qkernels.backends.cuda.";
    m.def("run", run, "Start a kernel. Returns an empty string, or CUDA's error message.");
    m.def("kernels", names, "The names that `run` takes.");
    m.attr("archs") = archs();
    m.def("toolkit_version", [] { return CUDART_VERSION; }, "13000 for CUDA 13.0");
    m.def("driver_version", [] { return version(cudaDriverGetVersion); }, "0 without a driver");
}
