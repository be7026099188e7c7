#include "launch.h"

extern "C" const char* qk_weight_only_e8p4(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kE8p4, qk::Only<qk::Plain<1>, true>>(call);
}
