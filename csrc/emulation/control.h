// The C functions by which a test sets up the emulator.
#pragma once
#include "machine.h"

extern "C" {
/// Forgets all tensors and sets the order of blocks: 0 forwards, 1 backwards, others shuffled.
inline __attribute__((used)) void qk_emulator_reset(int block_order) {
    qk::emulation::Machine::get().regions.clear();
    qk::emulation::Machine::get().block_order = block_order;
}
/// Registers a tensor: kernels may read these bytes, and write them if `writable`.
inline __attribute__((used)) void qk_emulator_register(const void* p, size_t bytes, int writable) {
    qk::emulation::Machine::get().register_region(p, bytes, writable != 0);
}
}
