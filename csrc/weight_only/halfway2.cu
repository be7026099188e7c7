#include "launch.h"

extern "C" const char* qk_weight_only_halfway2(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kHalfway2, qk::Only<qk::Plain<1>, true>>(call);
}
