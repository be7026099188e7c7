#include "launch.h"

extern "C" const char* qk_weight_only_signed6_q6_k(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kSigned6, qk::Only<qk::Q6K>>(call);
}
