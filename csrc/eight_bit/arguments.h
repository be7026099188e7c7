// What the 8-bit kernels are given: codes in the layout of qkernels/layouts/eight_bit.py.
#pragma once
#include <cstdint>

namespace qk {

/// What shares a scale of x.
enum SharedScale : int { kToken, kGroup128, kTensor };

struct QuantizeArgs {
    const void* x;       // (M, K), the 16-bit type
    const void* up;      // (M, K) or null: what is quantized is silu(x) * up
    const void* norm;    // (K) or null: RMSNorm with this weight comes first
    void* rounded;       // (M, K) or null: gets what was quantized, in 16 bits
    uint8_t* codes;      // (M, KP), zeros beyond K; or null: only `columns` are wanted
    float* scale;        // (M), (groups, M): written; (1): read
    const int8_t* zero;  // (1) or null
    int* columns;        // (K + 1) or null: the outlier columns in order, and at K their number
    int*
        counter;  // (1 + ceil(K / 32)), zero before and after; or null: `columns` are there already
    float eps, threshold;
    int m, k, kp;
    int shared, is_int8, is_bfloat;
    int vector;  // rows of x, up, norm and rounded may be read 16 bytes at a time
};

struct EightBitArgs {
    const uint8_t* x;       // (M, KP) codes
    const uint8_t* weight;  // (N, KP) codes
    const float* x_scale;   // (M), (1) or, with blocks, (groups, M)
    const float* w_scale;   // (N) or (ceil(N / 128), ceil(K / 128))
    const int8_t* zero;     // (1) or null
    const int* row_sum;     // (N), with `zero`
    const void* bias;       // (N) or null, the 16-bit type
    const void* x16;        // (M, K) what x was
    const int* columns;     // (K + 1) or null: the outlier columns, and at K their number
    void* y;                // (M, N)
    void* partial;          // (shares, blocks, outputs of a block), int32 or float32
    int* counter;           // (blocks), zero before and after
    float threshold;
    int m, n, k, kp;
    int k_slice;  // steps of 128 features that are summed on their own
    int one_scale, by_element, is_bfloat;
};

/// One launch, as Python asks for it: qkernels/backends/cuda/eight_bit.py has the same structs.
struct QuantizeCall {
    QuantizeArgs args;
    uint64_t stream;
    int pdl;   // launch before the last kernel is done (sm_90+)
    int size;  // of this struct, as the caller knows it
};
struct EightBitCall {
    EightBitArgs args;
    uint64_t stream;
    uint32_t split;  // blocks along K; of Hopper's kernel all blocks
    int is_gemv;
    int rows;    // of x in a block: 8 or 16 of the gemv, 16, 32, 64 or 128 of the gemm; 0: Hopper's
                 // kernel
    int blocks;  // scales are of 128-blocks
    int pdl, size;
};

}  // namespace qk
