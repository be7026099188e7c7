// Arguments of the 8-bit kernels. Codes are in the layout of qkernels/layouts/eight_bit.py.
#pragma once
#include <cstdint>

namespace qk {

/// Elements of x with one scale: a row, 128 features of a row, or all.
enum Granularity : int { kToken, kGroup128, kTensor };

struct QuantizeArgs {
    const void* x;       // (M, K), the 16-bit type
    const void* up;      // (M, K) or null: silu(x) * up is quantized
    const void* norm;    // (K) or null: RMSNorm with this weight is applied first
    void* rounded;       // (M, K) or null: gets the values that are quantized, in 16 bits
    uint8_t* codes;      // (M, KP), zeros from K on; or null: only `columns` are written
    float* scale;        // (M), (groups, M): written; (1): read
    const int8_t* zero;  // (1) or null
    int* columns;        // (K + 1) or null: the outlier columns in order, and at K their number
    // (1 + ceil(K / 32)), zero before and after; or null: `columns` is an input
    int* counter;
    float eps, threshold;
    int m, k, kp;
    int granularity, is_int8, is_bfloat;
    int vector;  // rows of x, up, norm and rounded may be read 16 bytes at a time
};

struct EightBitArgs {
    const uint8_t* x;       // (M, KP) codes; or null: the GEMV quantizes x16
    const uint8_t* weight;  // (N, KP) codes
    const float* x_scale;   // (M), (1) or, with blocks, (groups, M); without codes (1) or null
    const float* w_scale;   // (N) or (ceil(N / 128), ceil(K / 128))
    const int8_t* zero;     // (1) or null
    const int* row_sum;     // (N), with `zero`
    const void* bias;       // (N) or null, the 16-bit type
    const void* x16;        // (M, K) x before it was quantized, the 16-bit type
    const int* columns;     // (K + 1) or null: the outlier columns, and at K their number
    void* y;                // (M, N)
    void* partial;          // (split-K slices, blocks, outputs of a block), int32 or float32
    int* counter;           // (blocks), zero before and after
    float threshold;
    int m, n, k, kp;
    int k_slice;  // steps of 128 features in a split-K slice
    int one_scale, by_element, is_bfloat;
};

/// One launch. qkernels/backends/cuda/eight_bit.py has the same structs.
struct QuantizeCall {
    QuantizeArgs args;
    uint64_t stream;
    int pdl;   // programmatic dependent launch (sm_90+)
    int size;  // bytes of this struct in the caller's build
};
struct EightBitCall {
    EightBitArgs args;
    uint64_t stream;
    uint32_t split;  // blocks along K; for the Hopper kernel all blocks
    int is_gemv;
    int rows;    // rows of x in a block: 8 or 16 (gemv), 16, 32, 64 or 128 (gemm), 0 (Hopper)
    int blocks;  // scales are of 128 x 128 blocks
    int pdl, size;
};

}  // namespace qk
