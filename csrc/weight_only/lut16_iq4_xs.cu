#include "launch.h"

extern "C" const char* qk_weight_only_lut16_iq4_xs(const qk::WeightOnlyCall* call) {
    return qk::run_weight_only<qk::kLut16, qk::Only<qk::Iq4Xs>>(call);
}
