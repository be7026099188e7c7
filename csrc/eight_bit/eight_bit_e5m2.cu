#include "launch.h"

extern "C" const char* qk_eight_bit_e5m2(const qk::EightBitCall* call) {
    return qk::run_eight_bit<qk::kE5M2Kind>(call);
}
