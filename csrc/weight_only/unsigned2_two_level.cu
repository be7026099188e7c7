#include "launch.h"

extern "C" const char* qk_weight_only_unsigned2_two_level(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kUnsigned2, qk::Only<qk::TwoLevel<16>>>(call);
}
