#include "launch.h"

extern "C" const char* qk_weight_only_unsigned4_scale_min(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kUnsigned4, qk::Only<qk::Blocks<4, true>>>(call);
}
