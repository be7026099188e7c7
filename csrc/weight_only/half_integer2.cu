#include "launch.h"

extern "C" const char* qk_weight_only_half_integer2(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kHalfInteger2, qk::Only<qk::Plain<1>, true>>(call);
}
