#include "launch.h"

extern "C" const char* qk_weight_only_signed4(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kSigned4, qk::Only<qk::Blocks<4, false>>>(call);
}
