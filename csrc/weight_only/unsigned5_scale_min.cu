#include "launch.h"

extern "C" const char* qk_weight_only_unsigned5_scale_min(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kUnsigned5, qk::Only<qk::Blocks<4, true>>>(call);
}
