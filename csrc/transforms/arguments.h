// What the kernel around QuIP's and QuIP#'s products is given: one side of qkernels/formats/
// incoherent.py, as the weight-only layout keeps it.
#pragma once
#include <cstdint>

namespace qk {

struct Half;

struct TransformArgs {
    const void* x;         // (M, n): the 16-bit type before the product, float32 after it
    void* y;               // (M, width), the 16-bit type
    const Half* diagonal;  // (n): what x is multiplied by, or y
    const void* bias;      // (n) of y, the 16-bit type, or null
    const int* perm;       // (n) or null: which outer feature each inner one is
    const Half* factor0;   // (a0, a0) or null
    const Half* factor1;   // (c, c) or null: Hadamard
    const Half* factor2;   // (b, b) or null: Hadamard
    float scale;           // y is also multiplied by it
    int m, n, width;
    int a0, c, b;     // a row is a box of these, n = a0 * c * b
    int log_b;        // of b where that axis is Hadamard's, else 0
    int is_codebook;  // y in the order of codes of eight weights
    int is_aligned;  // eight features of x that are neighbours in the box are so in memory, 16-byte
                     // aligned, and there are no other
};

/// One launch, as Python asks for it: qkernels/backends/cuda/transforms.py has the same structs.
struct TransformCall {
    TransformArgs args;
    uint64_t stream;
    uint32_t rows, shared;  // blocks along M, each of which takes every `rows`-th row; bytes
    int is_bfloat;          // of what is not float32
    int is_after;           // the product: to the outer features; else from them
    int pdl;                // launch before the last kernel is done (sm_90+)
    int size;               // of this struct, as the caller knows it
};

}  // namespace qk
