#include "launch.h"

extern "C" const char* qk_weight_only_lut16(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kLut16>(call);
}
