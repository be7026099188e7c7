#include "launch.h"

extern "C" const char* qk_eight_bit_e4m3(const qk::EightBitCall* call) {
    return qk::run_eight_bit<qk::kE4M3Kind>(call);
}
