#include "launch.h"

extern "C" const char* qk_weight_only_e4m3(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kE4M3>(call);
}
