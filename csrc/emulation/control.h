// What a test tells the emulator, and asks it, by way of C.
#pragma once
#include "machine.h"

extern "C" {
/// Forget all tensors, and run blocks in that order: 0 forwards, 1 backwards, others shuffled.
inline __attribute__((used)) void qk_emulator_reset(int block_order) {
    qk::emulation::Machine::get().regions.clear();
    qk::emulation::Machine::get().block_order = block_order;
}
/// Kernels may read these bytes, and write them if `writable`.
inline __attribute__((used)) void qk_emulator_register(const void* p, size_t bytes, int writable) {
    qk::emulation::Machine::get().register_region(p, bytes, writable != 0);
}
}
