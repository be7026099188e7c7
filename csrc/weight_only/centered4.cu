#include "launch.h"

extern "C" const char* qk_weight_only_centered4(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kCentered4, qk::Only<qk::Blocks<4, false>>>(call);
}
