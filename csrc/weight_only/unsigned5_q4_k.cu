#include "launch.h"

extern "C" const char* qk_weight_only_unsigned5_q4_k(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kUnsigned5, qk::Only<qk::Q4K>>(call);
}
