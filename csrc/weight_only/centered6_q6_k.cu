#include "launch.h"

extern "C" const char* qk_weight_only_centered6_q6_k(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kCentered6, qk::Only<qk::Q6K>>(call);
}
