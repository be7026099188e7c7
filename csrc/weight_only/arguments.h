// Arguments of the weight-only kernels. The weight is in the layout of
// qkernels/layouts/weight_only.py.
#pragma once
#include <cstdint>

namespace qk {

struct Words4;
struct Words2;

/// Kinds of the scaler `Plain`, which one kernel distinguishes at run time, and dtypes of scales.
/// qkernels/backends/cuda/calls.py has the same numbers. The kind is one number, because with a
/// flag for each property ptxas spills registers.
enum Scaling : int { kGroup, kScale, kScaleFlat, kNested, kNestedFlat };
enum ScaleType : int { kFloat32, kFloat16, kBFloat16 };

struct WeightOnlyArgs {
    const void* x;           // (M, K), the 16-bit type
    const Words4* qdata;     // (tiles, N, 4 x 16 bytes)
    const void* qhigh;       // high bits (tiles, N, 4 x 4, 8 or 16 bytes), if codes have them
    const int* perm;         // (KP) or null
    const int* slice_group;  // (KP / 16) or null
    const uint32_t* table;   // (8) of the 16-bit type, or a codebook, or null
    const void* scaler[4];   // `tensors` of the scales' row in qkernels/layouts/codecs.py, in order
    const int* row_offsets;  // of outliers, (N + 1)
    const uint32_t* col_vals;  // float16 value << 16 | input feature
    const void* x_columns;     // gemm with outliers: x^T (K, x_rows), in the checkpoint's order
    const void* bias;          // (N) or null
    void* y;                   // (M, N)
    float* partial;            // (split-K slices, blocks, rows of a block x columns of a block);
                               // hopper: (cut blocks, warpgroups, slices, 64 x columns)
    int* counter;              // (blocks; hopper: and 3 warpgroups), zero before and after
    int m, n, k, kp;
    int tiles, k_slice;          // tiles of 16 words along K: in all, and in a split-K slice
    int group, shift;            // features in a group, and log2 of it or -1
    int row_group, scale_group;  // rows, and features of a tile, that have the same scale
    int scaling, scale_type;     // of `Plain`: the kind, and the dtype of scaler[0]
    int x_stride;                // gemm: features of a row of x, in kernel order, a multiple of 8
    int whole;                   // hopper: blocks of outputs whose K is not cut, which come first
    int x_chunks;     // decode: whether x is in kernel order, in whole 16-byte chunks, which are
                      // aligned
    int x_tail;       // decode: whether K ends inside a tile
    int stage_bytes;  // decode: shared memory of a tile of a warp
    // `Grouped` and `TwoLevel`
    int scale_stride, scale_row_bytes;    // scales of a group: their number and bytes
    int last_group;                       // number of the last group
    uint32_t group_divisor, row_divisor;  // scale groups (or slices) in a group, rows that share
    int x_rows;    // gemm with outliers: rows of x, padded with zeros to a multiple of 8
    int is_float;  // whether y is float32
};

/// One launch. qkernels/backends/cuda/calls.py has the same struct.
struct WeightOnlyCall {
    WeightOnlyArgs args;
    uint64_t stream;
    uint32_t grid_x, grid_y, threads, shared;
    int kernel;         // 0: decode, 1: gemm, 2: hopper
    int is_bfloat;      // of x, y and bias
    int scale_groups;   // of `Plain`: scale groups in a tile of one row, 1, 2, 4, or 0 for any
    int rows, columns;  // decode: rows of W and of x of a block; hopper: columns
    int pdl;            // programmatic dependent launch (sm_90+)
    int size;           // bytes of this struct in the caller's build
};

}  // namespace qk
