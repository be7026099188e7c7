#include "launch.h"

extern "C" const char* qk_weight_only_counted5_scale_minus(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kCounted5, qk::Only<qk::Blocks<4, true>>>(call);
}
