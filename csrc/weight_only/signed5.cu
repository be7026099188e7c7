#include "launch.h"

extern "C" const char* qk_weight_only_signed5(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kSigned5, qk::Only<qk::Blocks<4, false>>>(call);
}
