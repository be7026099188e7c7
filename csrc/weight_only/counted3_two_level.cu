#include "launch.h"

extern "C" const char* qk_weight_only_counted3_two_level(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kCounted3, qk::Only<qk::TwoLevel<16>>>(call);
}
