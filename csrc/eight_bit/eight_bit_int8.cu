#include "launch.h"

extern "C" const char* qk_eight_bit_int8(const qk::EightBitCall* call) {
    return qk::run_eight_bit<qk::kInt8>(call);
}
