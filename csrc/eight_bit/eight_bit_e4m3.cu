#include "launch.h"

QK_ENTRY(eight_bit_e4m3, EightBitCall, qk::run_eight_bit<qk::kE4M3>)
