#include "launch.h"

extern "C" const char* qk_weight_only_signed8(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kSigned8, qk::Only<qk::Blocks<2, false>>>(call);
}
