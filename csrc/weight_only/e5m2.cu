#include "launch.h"

extern "C" const char* qk_weight_only_e5m2(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kE5M2>(call);
}
