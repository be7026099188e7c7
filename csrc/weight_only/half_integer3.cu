#include "launch.h"

extern "C" const char* qk_weight_only_half_integer3(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kHalfInteger3, qk::Only<qk::Plain<1>, true>>(call);
}
