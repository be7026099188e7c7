#include "launch.h"

QK_ENTRY(eight_bit_e5m2, EightBitCall, qk::run_eight_bit<qk::kE5M2>)
