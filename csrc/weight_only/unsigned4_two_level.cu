#include "launch.h"

extern "C" const char* qk_weight_only_unsigned4_two_level(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kUnsigned4, qk::Only<qk::TwoLevel<8>>>(call);
}
