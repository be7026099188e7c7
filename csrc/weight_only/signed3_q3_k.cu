#include "launch.h"

extern "C" const char* qk_weight_only_signed3_q3_k(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kSigned3, qk::Only<qk::Q3K>>(call);
}
