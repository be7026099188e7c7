#include "launch.h"

extern "C" const char* qk_weight_only_centered3_q3_k(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kCentered3, qk::Only<qk::Q3K>>(call);
}
