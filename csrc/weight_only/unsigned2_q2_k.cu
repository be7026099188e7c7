#include "launch.h"

extern "C" const char* qk_weight_only_unsigned2_q2_k(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kUnsigned2, qk::Only<qk::Q2K>>(call);
}
