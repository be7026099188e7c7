#include "launch.h"

extern "C" const char* qk_weight_only_centered5(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kCentered5, qk::Only<qk::Blocks<4, false>>>(call);
}
