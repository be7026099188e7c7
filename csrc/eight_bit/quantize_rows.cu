#include "launch.h"

static const char* run_quantize(const qk::QuantizeCall* call) {
    static thread_local std::string error;
    if (qk::of_this_version(*call, error)) {
        const int granularity = call->args.granularity;
        if (call->args.is_int8) {
            error = granularity == qk::kToken ? qk::launch_quantize<true, qk::kToken>(*call)
                                              : qk::launch_quantize<true, qk::kTensor>(*call);
        } else {
            error = granularity == qk::kToken ? qk::launch_quantize<false, qk::kToken>(*call)
                    : granularity == qk::kGroup128
                        ? qk::launch_quantize<false, qk::kGroup128>(*call)
                        : qk::launch_quantize<false, qk::kTensor>(*call);
        }
    }
    return error.c_str();
}

QK_ENTRY(quantize_rows, QuantizeCall, run_quantize)
