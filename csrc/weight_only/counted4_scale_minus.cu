#include "launch.h"

extern "C" const char* qk_weight_only_counted4_scale_minus(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kCounted4, qk::Only<qk::Blocks<4, true>>>(call);
}
