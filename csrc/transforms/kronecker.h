// y = diagonal * (A0 (x) C (x) B) x for each row after the product, and the transpose before it:
// the orthogonal transforms of QuIP and QuIP#, in float32.
//
// A row is a box (a0, c, b). A block computes one output index `c_out` of the axis c, for one row
// at a time:
//
//      load    box[i0, i1] = sum over c of C[c_out, c] * x[i0, c, i1]        registers
//      mix b   a Hadamard transform: features 8 * lane + r of 256            registers, shuffles
//                                    and 8 that are 256 * 8^i apart          shared memory
//              or a dense factor: a warp has four rows of the box            shared memory
//      mix a0  a dense factor: a thread has 8 outputs of two columns         shared memory
//      store   y[i0, c_out, i1]
//
// A Hadamard order is cut into c and b, so that a box stays small and several SMs compute one row.
// The arithmetic of a row does not depend on the other rows.
#pragma once
#include "../ptx/warp.h"
#include "arguments.h"

namespace qk {

constexpr int kTransformThreads = 256, kTransformWarps = kTransformThreads / 32;
/// Blocks per SM that the compiler leaves registers for.
constexpr int kBlocksAtOnce = 4;
/// Features that a lane loads, and that a warp loads; log2 of both.
constexpr int kLaneFeatures = 8, kWarpFeatures = 32 * kLaneFeatures, kLaneBits = 3, kWarpBits = 8;
/// Rows of the box that a warp mixes at a time; the largest order of a dense factor, over 32.
constexpr int kRowsAtOnce = 4, kLanesOfOrder = 4;

/// The outer feature of an inner feature: x is gathered before the product, y is scattered after
/// it.
QK_DEVICE int outer_feature(const TransformArgs& args, int inner) {
    return args.perm != nullptr ? load_global(args.perm + inner) : inner;
}

// ---------------------------------------------------------------- loads
template <typename X>
QK_DEVICE void load_features(float (&v)[kLaneFeatures], const X* p) {
    const Words4 words = load_global(reinterpret_cast<const Words4*>(p));
    QK_UNROLL
    for (int i = 0; i < 4; i++) {
        v[2 * i] = to_float(low_of<X>(words.w[i]));
        v[2 * i + 1] = to_float(high_of<X>(words.w[i]));
    }
}
template <>
QK_DEVICE void load_features<float>(float (&v)[kLaneFeatures], const float* p) {
    QK_UNROLL
    for (int h = 0; h < 2; h++) {
        const Words4 words = load_global(reinterpret_cast<const Words4*>(p) + h);
        QK_UNROLL
        for (int i = 0; i < 4; i++) {
            v[4 * h + i] = bits_to_float(words.w[i]);
        }
    }
}

/// v += weight * features e .. e + 7 of the box at index c of its middle axis, loaded one by one.
template <typename X, bool AFTER>
QK_DEVICE void add_features(float (&v)[kLaneFeatures], const TransformArgs& args, const X* row,
                            int e, int c, float weight) {
    QK_UNROLL
    for (int r = 0; r < kLaneFeatures; r++) {
        if (e + r < args.a0 * args.b) {
            const int inner = ((e + r) / args.b * args.c + c) * args.b + (e + r) % args.b;
            if (AFTER) {
                v[r] += weight * to_float(load_global(row + inner));
            } else {
                const int k = outer_feature(args, inner);
                v[r] += weight *
                        (to_float(load_global(row + k)) * to_float(load_global(args.diagonal + k)));
            }
        }
    }
}

/// Element (c_out, c) of the middle axis's factor. A Hadamard factor has elements +-1.
QK_DEVICE float middle(const TransformArgs& args, const float* factor1_row, int c_out, int c) {
    if (args.factor1 != nullptr) {
        return load_shared(factor1_row + c);
    }
    uint32_t odd = c_out & c;
    QK_UNROLL
    for (int d = 16; d > 0; d /= 2) {
        odd ^= odd >> d;
    }
    return odd & 1 ? -1.0f : 1.0f;
}

/// v += features e .. e + 7 of the box, summed over the middle axis.
template <typename X, bool AFTER>
QK_DEVICE void sum_middle(float (&v)[kLaneFeatures], const TransformArgs& args, const X* row, int e,
                          const float* factor1_row, int c_out) {
    if (!args.is_aligned) {
        for (int c = 0; c < args.c; c++) {
            add_features<X, AFTER>(v, args, row, e, c, middle(args, factor1_row, c_out, c));
        }
        return;
    }
    const int first = e / args.b * args.c * args.b + e % args.b;
    QK_UNROLL_BY(4)  // so that several loads are in flight
    for (int c = 0; c < args.c; c++) {
        float x[kLaneFeatures], factor[kLaneFeatures];
        load_features(x, row + first + c * args.b);
        if (!AFTER) {
            load_features(factor, args.diagonal + first + c * args.b);
        }
        const float weight = middle(args, factor1_row, c_out, c);
        QK_UNROLL
        for (int r = 0; r < kLaneFeatures; r++) {
            v[r] += weight * (AFTER ? x[r] : x[r] * factor[r]);
        }
    }
}

// ---------------------------------------------------------------- the last axis
/// The first `stages` stages of a Hadamard transform over the index of a register.
QK_DEVICE void butterflies(float (&v)[kLaneFeatures], int stages) {
    QK_UNROLL
    for (int k = 0; k < kLaneBits; k++) {
        if (k < stages) {
            QK_UNROLL
            for (int r = 0; r < kLaneFeatures; r++) {
                if ((r >> k) % 2 == 0) {
                    const float a = v[r], b = v[r + (1 << k)];
                    v[r] = a + b;
                    v[r + (1 << k)] = a - b;
                }
            }
        }
    }
}

/// Loads a row of x into the box, and runs the Hadamard stages within 256 neighbours.
template <typename X, bool AFTER>
QK_DEVICE void load_box(const TransformArgs& args, const X* row, float* box,
                        const float* factor1_row, int c_out) {
    const int elements = args.a0 * args.b, lane = lane_index();
    for (int chunk = warp_index() * kWarpFeatures; chunk < elements;
         chunk += kTransformWarps * kWarpFeatures) {
        const int e = chunk + lane * kLaneFeatures;
        float v[kLaneFeatures] = {};
        if (e < elements) {
            sum_middle<X, AFTER>(v, args, row, e, factor1_row, c_out);
        }
        butterflies(v, args.log_b);
        for (int bit = 0; bit < args.log_b - kLaneBits && bit < 5; bit++) {
            const bool upper = lane >> bit & 1;
            QK_UNROLL
            for (int r = 0; r < kLaneFeatures; r++) {
                const float other = shuffle_xor(v[r], 1 << bit);
                v[r] = upper ? other - v[r] : v[r] + other;
            }
        }
        if (e < elements) {  // shared memory has whole groups of kLaneFeatures
            QK_UNROLL
            for (int h = 0; h < 2; h++) {
                Words4 half;
                QK_UNROLL
                for (int i = 0; i < 4; i++) {
                    half.w[i] = float_to_bits(v[h * 4 + i]);
                }
                store_shared(reinterpret_cast<Words4*>(box + e) + h, half);
            }
        }
    }
}

/// The Hadamard stages over 256 features and more, three at a time.
QK_DEVICE void far_stages(const TransformArgs& args, float* box) {
    const int elements = args.a0 * args.b;
    for (int bit = kWarpBits; bit < args.log_b; bit += kLaneBits) {
        const int whole = 1 << (bit + kLaneBits), items = (elements + whole - 1) / whole << bit;
        for (int i = thread_index(); i < items; i += kTransformThreads) {
            const int first = (i >> bit << (bit + kLaneBits)) + i % (1 << bit);
            float v[kLaneFeatures];
            QK_UNROLL
            for (int r = 0; r < kLaneFeatures; r++) {
                const int at = first + (r << bit);
                v[r] = at < elements ? load_shared(box + at) : 0;
            }
            butterflies(v, args.log_b - bit);
            QK_UNROLL
            for (int r = 0; r < kLaneFeatures; r++) {
                const int at = first + (r << bit);
                if (at < elements) {
                    store_shared(box + at, v[r]);
                }
            }
        }
        sync_block();
    }
}

/// Elements between rows of a factor in shared memory: whole 16-byte units.
QK_HOST_DEVICE int padded_order(int order) { return (order + 7) / 8 * 8; }

/// Copies a factor to shared memory: element [i][o] is the weight of input i in output o. Zeros pad
/// each row.
QK_DEVICE void load_factor(Half* to, const Half* factor, int order, bool transposed) {
    const int stride = padded_order(order);
    for (int at = thread_index(); at < order * stride; at += kTransformThreads) {
        const int i = at / stride, o = at % stride;
        Half value = {0};
        if (o < order) {
            value = load_global(factor + (transposed ? i * order + o : o * order + i));
        }
        store_shared(to + at, value);
    }
}

/// A dense factor over the box's last axis, in place.
QK_DEVICE void mix_last(const TransformArgs& args, float* box, const Half* factor) {
    const int stride = padded_order(args.b), lane = lane_index();
    for (int first = warp_index() * kRowsAtOnce; first < args.a0;
         first += kTransformWarps * kRowsAtOnce) {
        float sums[kRowsAtOnce][kLanesOfOrder] = {};
        for (int i = 0; i < args.b; i++) {
            float x[kRowsAtOnce];
            QK_UNROLL
            for (int r = 0; r < kRowsAtOnce; r++) {
                x[r] = first + r < args.a0 ? load_shared(box + (first + r) * args.b + i) : 0;
            }
            QK_UNROLL
            for (int q = 0; q < kLanesOfOrder; q++) {
                const int o = q * 32 + lane;
                if (o < args.b) {
                    const float f = to_float(load_shared(factor + i * stride + o));
                    QK_UNROLL
                    for (int r = 0; r < kRowsAtOnce; r++) {
                        sums[r][q] += f * x[r];
                    }
                }
            }
        }
        sync_warp();  // all lanes have read these rows
        QK_UNROLL
        for (int r = 0; r < kRowsAtOnce; r++) {
            QK_UNROLL
            for (int q = 0; q < kLanesOfOrder; q++) {
                if (first + r < args.a0 && q * 32 + lane < args.b) {
                    store_shared(box + (first + r) * args.b + q * 32 + lane, sums[r][q]);
                }
            }
        }
    }
    sync_block();
}

// ---------------------------------------------------------------- the first axis, and the end
/// Position of feature k in codebook_order of qkernels/layouts/weight_only.py.
QK_HOST_DEVICE int codebook_place(int k) {
    const int word = k % 256 / 16, s = k % 16 / 8 * 4 + k % 8 / 2;
    return k / 256 * 256 + s * 32 + word / 2 % 2 * 16 + word % 2 * 8 + word / 4 * 2 + k % 2;
}

template <typename T, bool AFTER>
QK_DEVICE void store_feature(const TransformArgs& args, T* row, int inner, float value) {
    value *= args.scale;
    int at = inner;
    if (AFTER) {
        at = outer_feature(args, inner);
        value *= to_float(load_global(args.diagonal + at));
        if (args.bias != nullptr) {
            value += to_float(load_global(static_cast<const T*>(args.bias) + at));
        }
    } else if (args.is_codebook) {
        at = codebook_place(inner);
    }
    store_global(row + at, from_float<T>(value));
}

/// Mixes the box along its first axis and stores it to the row of y.
template <typename T, bool AFTER>
QK_DEVICE void store_box(const TransformArgs& args, T* row, const float* box, const Half* factor,
                         int c_out) {
    if (args.factor0 == nullptr) {  // a0 is 1
        for (int e = thread_index(); e < args.b; e += kTransformThreads) {
            store_feature<T, AFTER>(args, row, c_out * args.b + e, load_shared(box + e));
        }
        return;
    }
    constexpr int outputs = 8;
    const int stride = padded_order(args.a0), groups = stride / outputs, half = (args.b + 1) / 2;
    for (int item = thread_index(); item < groups * half; item += kTransformThreads) {
        const int group = item / half, columns[2] = {item % half, item % half + half};
        const bool has_second = columns[1] < args.b;
        float sums[outputs][2] = {};
        for (int i = 0; i < args.a0; i++) {
            const Words4 words =
                load_shared(reinterpret_cast<const Words4*>(factor + i * stride) + group);
            const float x[2] = {load_shared(box + i * args.b + columns[0]),
                                has_second ? load_shared(box + i * args.b + columns[1]) : 0};
            QK_UNROLL
            for (int k = 0; k < outputs; k++) {
                const uint32_t w = words.w[k / 2];
                const float f = to_float(k % 2 ? high_of<Half>(w) : low_of<Half>(w));
                sums[k][0] += f * x[0];
                sums[k][1] += f * x[1];
            }
        }
        QK_UNROLL
        for (int k = 0; k < outputs; k++) {
            const int i0 = group * outputs + k;
            QK_UNROLL
            for (int c = 0; c < 2; c++) {
                if (i0 < args.a0 && (c == 0 || has_second)) {
                    const int inner = (i0 * args.c + c_out) * args.b + columns[c];
                    store_feature<T, AFTER>(args, row, inner, sums[k][c]);
                }
            }
        }
    }
}

/// Bytes of a block's shared memory: box, one row of the middle factor, first and last factor.
QK_HOST_DEVICE int transform_shared(const TransformArgs& args) {
    const int factor1_row = args.factor1 != nullptr ? args.c : 0;
    return (args.a0 * args.b + 7) / 8 * 32 + (factor1_row + 3) / 4 * 16 +
           (args.factor0 != nullptr ? args.a0 * padded_order(args.a0) * 2 : 0) +
           (args.factor2 != nullptr ? args.b * padded_order(args.b) * 2 : 0);
}

/// Grid: (rows at a time, c). X: dtype of x; T: the 16-bit type of everything else.
template <typename X, typename T, bool AFTER>
__global__ void __launch_bounds__(kTransformThreads, kBlocksAtOnce)
    transform_kernel(const __grid_constant__ TransformArgs args) {
    const int c_out = block_index_y(), t = thread_index();
    auto* box = reinterpret_cast<float*>(shared_memory());
    auto* factor1_row = box + (args.a0 * args.b + 7) / 8 * 8;
    auto* factor0 =
        reinterpret_cast<Half*>(factor1_row + (args.factor1 != nullptr ? (args.c + 3) / 4 * 4 : 0));
    auto* factor2 = factor0 + (args.factor0 != nullptr ? args.a0 * padded_order(args.a0) : 0);

    // The last kernel may write x, but not the factors. The transform before the product uses the
    // transposed factors.
    if (args.factor0 != nullptr) {
        load_factor(factor0, args.factor0, args.a0, !AFTER);
    }
    if (args.factor2 != nullptr) {
        load_factor(factor2, args.factor2, args.b, !AFTER);
    }
    for (int c = t; args.factor1 != nullptr && c < args.c; c += kTransformThreads) {
        const int at = AFTER ? c_out * args.c + c : c * args.c + c_out;
        store_shared(factor1_row + c, to_float(load_global(args.factor1 + at)));
    }
    let_next_kernel_start();
    wait_for_last_kernel();

    for (int m = block_index_x(); m < args.m; m += blocks_x()) {
        T* row = static_cast<T*>(args.y) + int64_t(m) * args.width;
        sync_block();  // the factors are there, and no thread still reads the last box
        load_box<X, AFTER>(args, static_cast<const X*>(args.x) + int64_t(m) * args.n, box,
                           factor1_row, c_out);
        sync_block();
        if (args.factor2 != nullptr) {
            mix_last(args, box, factor2);
        } else {
            far_stages(args, box);
        }
        store_box<T, AFTER>(args, row, box, factor0, c_out);
        // The product reads whole tiles, so the features past the last one are set to zero.
        for (int k = args.n + t; c_out == 0 && k < args.width; k += kTransformThreads) {
            store_global(row + codebook_place(k), T{0});
        }
    }
}

}  // namespace qk
