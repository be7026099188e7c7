#include "launch.h"

QK_ENTRY(eight_bit_int8, EightBitCall, qk::run_eight_bit<qk::kInt8>)
