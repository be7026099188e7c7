#include "launch.h"

extern "C" const char* qk_weight_only_linear8(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kLinear8>(call);
}
