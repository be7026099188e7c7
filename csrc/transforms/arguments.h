// Arguments of the transform before or after the products of QuIP and QuIP#: one side of
// qkernels/formats/incoherent.py, in the weight-only layout.
#pragma once
#include <cstdint>

namespace qk {

struct Half;

struct TransformArgs {
    const void* x;         // (M, n): the 16-bit type before the product, float32 after it
    void* y;               // (M, width), the 16-bit type
    const Half* diagonal;  // (n): factors of x before the product, of y after it
    const void* bias;      // (n) of y, the 16-bit type, or null
    const int* perm;       // (n) or null: the outer feature of each inner feature
    const Half* factor0;   // (a0, a0) or null
    const Half* factor1;   // (c, c) or null: Hadamard
    const Half* factor2;   // (b, b) or null: Hadamard
    float scale;           // a further factor of y
    int m, n, width;
    int a0, c, b;     // a row is a box of these orders, n = a0 * c * b
    int log_b;        // log2 of b if the transform of that axis is Hadamard, else 0
    int is_codebook;  // y is in the order of codes of eight weights
    // The box is whole groups of eight features that are neighbours in memory, 16-byte aligned.
    int is_aligned;
};

/// One launch. qkernels/backends/cuda/transforms.py has the same structs.
struct TransformCall {
    TransformArgs args;
    uint64_t stream;
    uint32_t rows, shared;  // blocks along M, each for every `rows`-th row; bytes of shared memory
    int is_bfloat;          // the 16-bit type
    int is_after;           // after the product, inner to outer features; else before it
    int pdl;                // programmatic dependent launch (sm_90+)
    int size;               // bytes of this struct in the caller's build
};

}  // namespace qk
