#include "../ptx/launch.h"
#include "kronecker.h"

namespace qk {
namespace {

template <typename T>
std::string launch_transform(const TransformCall& call) {
    const Grid grid{call.rows, uint32_t(call.args.c), kTransformThreads, call.shared};
    const auto kernel =
        call.is_after ? transform_kernel<float, T, true> : transform_kernel<T, T, false>;
    return launch<TransformArgs>(kernel, grid, call.args, call.stream, call.pdl != 0);
}

}  // namespace
}  // namespace qk

/// Returns an error message, which stays valid until the next call of this thread; "" for success.
static const char* run_transform(const qk::TransformCall* call) {
    static thread_local std::string error;
    if (call->size != int(sizeof(qk::TransformCall))) {
        error = "the compiled kernels and the Python code are of different versions";
    } else if (int(call->shared) != qk::transform_shared(call->args)) {
        error = "shared memory is not what the kernel lays out";
    } else {
        error = call->is_bfloat ? qk::launch_transform<qk::BFloat>(*call)
                                : qk::launch_transform<qk::Half>(*call);
    }
    return error.c_str();
}

QK_ENTRY(transform_rows, TransformCall, run_transform)

#ifndef __CUDACC__
#include "../emulation/control.h"
#endif
