// Activations to 8-bit codes: one block quantizes one row of x, optionally after RMSNorm or SiLU.
//
//   SHARED     what shares a scale           codes
//   kToken     a row                         int8 round(x * 127 / absmax), e4m3 x / scale
//   kGroup128  128 features of a row         e4m3
//   kTensor    everything, scale is given    int8 round(x / scale) + zero point, e4m3
//
// The arithmetic is that of qkernels/formats (eightbit.py, fp8.py), operation by operation in
// float32, so that codes agree bit for bit: divisions are IEEE's, rounding is half to even, fp8
// saturates.
//
// Thread t has the features of units t, t + 256, ..., eight each. It keeps the first kKept of them
// in registers; what a row has beyond is read again.
//
// LLM.int8(): elements from `threshold` on count neither for the absmax nor in the codes, where
// they are 0, and set their column's bit in a mask. The block that finishes last, as a counter
// tells, turns the mask into a list for the matrix product to read, and leaves mask and counter
// zero. Where rows go by slices, a launch for all of them finds the list alone (no `codes`), and
// those for slices make codes alone (no `counter`).
#pragma once
#include "../ptx/eight_bit.h"
#include "arguments.h"

namespace qk {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;
constexpr int kUnit = 8, kKept = 4;
constexpr int kGroupUnits = 128 / kUnit;
/// The smallest scale of a token and absmax of a group, as formats/fp8.py has them.
constexpr float kTokenFloor = 1.0f / (448 * 512), kGroupFloor = 1e-4f;

template <typename T>
QK_DEVICE T element(const Words4& unit, int i) {
    return i % 2 ? high_of<T>(unit.w[i / 2]) : low_of<T>(unit.w[i / 2]);
}

/// Rounds to T and back, as every operation of a model does.
template <typename T>
QK_DEVICE float rounded(float f) {
    return to_float(from_float<T>(f));
}

/// Eight 16-bit numbers at feature 8 * u of `row`, zeros from K on.
template <typename T>
QK_DEVICE Words4 load_unit(const QuantizeArgs& args, const T* row, int u) {
    Words4 unit = {};
    if (args.vector) {
        return u * kUnit < args.k ? load_global(reinterpret_cast<const Words4*>(row) + u) : unit;
    }
    QK_UNROLL
    for (int i = 0; i < kUnit; i += 2) {
        const int k = u * kUnit + i;
        const T low = k < args.k ? load_global(row + k) : T{};
        const T high = k + 1 < args.k ? load_global(row + k + 1) : T{};
        unit.w[i / 2] = pair(low, high);
    }
    return unit;
}
template <typename T>
QK_DEVICE void store_unit(const QuantizeArgs& args, T* row, int u, const Words4& unit) {
    if (args.vector) {
        if (u * kUnit < args.k) {
            store_global(reinterpret_cast<Words4*>(row) + u, unit);
        }
        return;
    }
    QK_UNROLL
    for (int i = 0; i < kUnit; i++) {
        if (u * kUnit + i < args.k) {
            store_global(row + u * kUnit + i, element<T>(unit, i));
        }
    }
}

/// A row of x as it comes in: x, or silu(x) * up, rounded where a model rounds.
template <typename T>
QK_DEVICE Words4 incoming(const QuantizeArgs& args, int u) {
    const int64_t at = int64_t(block_index_x()) * args.k;
    Words4 unit = load_unit(args, static_cast<const T*>(args.x) + at, u);
    if (args.up != nullptr) {
        const Words4 up = load_unit(args, static_cast<const T*>(args.up) + at, u);
        T made[kUnit];
        QK_UNROLL
        for (int i = 0; i < kUnit; i++) {
            const float gate = to_float(element<T>(unit, i));
            const float silu = rounded<T>(gate / (1.0f + expf(-gate)));
            made[i] = from_float<T>(silu * to_float(element<T>(up, i)));
        }
        QK_UNROLL
        for (int i = 0; i < kUnit; i += 2) {
            unit.w[i / 2] = pair(made[i], made[i + 1]);
        }
    }
    return unit;
}
/// x / rms(x) * weight, rounded to T after each step; x itself without a norm.
template <typename T>
QK_DEVICE Words4 normed(const QuantizeArgs& args, Words4 unit, int u, float inverse) {
    if (args.norm != nullptr) {
        const Words4 weight = load_unit(args, static_cast<const T*>(args.norm), u);
        QK_UNROLL
        for (int i = 0; i < kUnit; i += 2) {
            T made[2];
            QK_UNROLL
            for (int b = 0; b < 2; b++) {
                const float x = rounded<T>(to_float(element<T>(unit, i + b)) * inverse);
                made[b] = from_float<T>(x * to_float(element<T>(weight, i + b)));
            }
            unit.w[i / 2] = pair(made[0], made[1]);
        }
    }
    return unit;
}

QK_DEVICE bool is_outlier(const QuantizeArgs& args, float x) {
    return args.columns != nullptr && fabsf(x) >= args.threshold;
}
/// The largest |x| of a unit as bits, which order like it, NaN above all. Outliers do not count.
template <typename T>
QK_DEVICE uint32_t largest(const QuantizeArgs& args, const Words4& unit) {
    uint32_t size = 0;
    QK_UNROLL
    for (int i = 0; i < kUnit; i++) {
        const float x = to_float(element<T>(unit, i));
        const uint32_t bits = is_outlier(args, x) ? 0 : float_to_bits(x) & 0x7FFFFFFF;
        size = bits > size ? bits : size;
    }
    return size;
}

QK_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

/// The sum over the block, in an order of its own, to every thread. `slots`: 8 words no one else
/// uses.
QK_DEVICE float block_sum(float value, float* slots) {
    QK_UNROLL
    for (int d = 16; d > 0; d /= 2) {
        value += shuffle_xor(value, d);
    }
    if (lane_index() == 0) {
        store_shared(slots + warp_index(), value);
    }
    sync_block();
    value = 0;
    QK_UNROLL
    for (int w = 0; w < kRowWarps; w++) {
        value += load_shared(slots + w);
    }
    return value;
}
QK_DEVICE uint32_t block_largest(uint32_t value, uint32_t* slots) {
    QK_UNROLL
    for (int d = 16; d > 0; d /= 2) {
        value = larger(value, shuffle_xor(value, d));
    }
    if (lane_index() == 0) {
        store_shared(slots + warp_index(), value);
    }
    sync_block();
    QK_UNROLL
    for (int w = 0; w < kRowWarps; w++) {
        value = larger(value, load_shared(slots + w));
    }
    return value;
}

/// int8 code of x as a byte. `scale` multiplies per token, and divides otherwise.
template <int SHARED>
QK_DEVICE uint32_t int8_code(const QuantizeArgs& args, float x, float scale, float zero,
                             bool live) {
    float value;
    if (SHARED == kToken) {
        value = x * scale;
        value = is_outlier(args, x) ? 0 : round_even(fminf(fmaxf(value, -127.0f), 127.0f));
    } else {
        // Beyond 1024 nothing changes any more, and integers are exact.
        value = round_even(fminf(fmaxf(x / scale, -1024.0f), 1024.0f)) + zero;
        value = live ? fminf(fmaxf(value, -128.0f), 127.0f) : 0;
    }
    return uint32_t(int(value)) & 0xFF;
}

/// The outlier columns from the mask, in order, and how many; mask and counter become zero again.
QK_DEVICE void list_columns(const QuantizeArgs& args, int* shared) {
    const int words = (args.k + 31) / 32, t = thread_index();
    const int each = (words + kRowThreads - 1) / kRowThreads, first = t * each;
    const int end = first + each < words ? first + each : words;
    auto* mask = reinterpret_cast<uint32_t*>(args.counter + 1);
    int mine = 0;
    for (int w = first; w < end; w++) {
        mine += count_ones(load_l2(mask + w));
    }
    int before = mine;  // becomes the count of all threads up to this one
    QK_UNROLL
    for (int d = 1; d < 32; d *= 2) {
        const int other = shuffle_up(before, d);
        before += int(lane_index()) >= d ? other : 0;
    }
    if (lane_index() == 31) {
        store_shared(shared + warp_index(), before);
    }
    sync_block();
    int total = 0, at = before - mine;
    QK_UNROLL
    for (int w = 0; w < kRowWarps; w++) {
        const int count = load_shared(shared + w);
        at += w < int(warp_index()) ? count : 0;
        total += count;
    }
    for (int w = first; w < end; w++) {
        for (uint32_t bits = load_l2(mask + w); bits != 0; bits &= bits - 1) {
            store_global(args.columns + at++, w * 32 + lowest_one(bits));
        }
        store_global(mask + w, 0u);
    }
    if (t == 0) {
        store_global(args.columns + args.k, total);
        store_global(args.counter, 0);
    }
}

/// Grid: (M). Shared memory: kQuantizeShared.
constexpr size_t kQuantizeShared = 4 * kRowWarps * sizeof(float);
template <typename T, bool INT8, int SHARED>
__global__ void __launch_bounds__(kRowThreads) quantize_kernel(QuantizeArgs args) {
    auto* slots = reinterpret_cast<float*>(shared_memory());
    const int t = thread_index(), row = block_index_x(), units = args.kp / kUnit;
    let_next_kernel_start();
    wait_for_last_kernel();

    Words4 kept[kKept];
    float squares = 0;
    QK_UNROLL
    for (int i = 0; i < kKept; i++) {
        const int u = t + i * kRowThreads;
        kept[i] = u < units ? incoming<T>(args, u) : Words4{};
    }
    float inverse = 1;
    if (args.norm != nullptr) {
        for (int i = 0, u = t; u < units; i++, u += kRowThreads) {
            Words4 unit = {};
            QK_UNROLL
            for (int c = 0; c < kKept; c++) {  // kept[i], but by constants
                unit = c == i ? kept[c] : unit;
            }
            unit = i < kKept ? unit : incoming<T>(args, u);
            QK_UNROLL
            for (int e = 0; e < kUnit; e++) {
                const float x = to_float(element<T>(unit, e));
                squares += x * x;
            }
        }
        const float mean = block_sum(squares, slots) / float(args.k);
        inverse = 1.0f / sqrtf(mean + args.eps);
        QK_UNROLL
        for (int i = 0; i < kKept; i++) {
            const int u = t + i * kRowThreads;
            if (u < units) {
                kept[i] = normed<T>(args, kept[i], u, inverse);
            }
        }
    }

    float scale = 1;
    if (SHARED == kToken && args.codes != nullptr) {
        uint32_t size = 0;
        QK_UNROLL
        for (int i = 0; i < kKept; i++) {
            size = larger(size, largest<T>(args, kept[i]));
        }
        for (int u = t + kKept * kRowThreads; u < units; u += kRowThreads) {
            const Words4 unit = normed<T>(args, incoming<T>(args, u), u, inverse);
            size = larger(size, largest<T>(args, unit));
        }
        const float absmax =
            bits_to_float(block_largest(size, reinterpret_cast<uint32_t*>(slots + kRowWarps)));
        float stored;
        if (INT8) {
            stored = absmax / 127.0f;
            scale = absmax == 0 ? 0 : 127.0f * (1.0f / absmax);
        } else {
            stored = absmax / 448.0f;
            stored = stored < kTokenFloor ? kTokenFloor : stored;  // keeps NaN, unlike fmaxf
            scale = stored;
        }
        if (t == 0) {
            store_global(args.scale + row, stored);
        }
    } else if (SHARED == kTensor) {
        scale = load_global(args.scale);
    }
    const float zero = args.zero != nullptr ? float(load_global(args.zero)) : 0;

    // Whole warps go round together, for they exchange groups' maxima and outliers' bits.
    for (int i = 0, first = t - int(lane_index()); first < units; i++, first += kRowThreads) {
        const int u = first + lane_index();
        const bool live = u < units;
        Words4 unit = {};
        if (i < kKept) {
            QK_UNROLL
            for (int c = 0; c < kKept; c++) {
                unit = c == i ? kept[c] : unit;
            }
        } else if (live) {
            unit = normed<T>(args, incoming<T>(args, u), u, inverse);
        }
        if (SHARED == kGroup128) {
            uint32_t size = largest<T>(args, unit);
            QK_UNROLL
            for (int d = kGroupUnits / 2; d > 0; d /= 2) {
                size = larger(size, shuffle_xor(size, d));
            }
            const float absmax = bits_to_float(size);
            scale = (absmax < kGroupFloor ? kGroupFloor : absmax) / 448.0f;
            if (live && u % kGroupUnits == 0 && u * kUnit < args.k) {
                store_global(args.scale + int64_t(u / kGroupUnits) * args.m + row, scale);
            }
        }
        Words2 codes = {};
        uint32_t outliers = 0;
        QK_UNROLL
        for (int e = 0; e < kUnit; e += 2) {
            const float low = to_float(element<T>(unit, e)),
                        high = to_float(element<T>(unit, e + 1));
            uint32_t both;
            if (INT8) {
                const int k = u * kUnit + e;
                both = int8_code<SHARED>(args, low, scale, zero, k < args.k) |
                       int8_code<SHARED>(args, high, scale, zero, k + 1 < args.k) << 8;
            } else {
                both = e4m3_codes(low / scale, high / scale);
            }
            codes.w[e / 4] |= both << e % 4 * 8;
            outliers |= (uint32_t(is_outlier(args, low)) | uint32_t(is_outlier(args, high)) << 1)
                        << e;
        }
        if (live && args.codes != nullptr) {
            store_global(reinterpret_cast<Words2*>(args.codes + int64_t(row) * args.kp) + u, codes);
            if (args.rounded != nullptr) {
                store_unit(args, static_cast<T*>(args.rounded) + int64_t(row) * args.k, u, unit);
            }
        }
        if (INT8 && SHARED == kToken && args.counter != nullptr) {
            // The bits of four neighbours are a word of the mask.
            outliers <<= lane_index() % 4 * 8;
            outliers |= shuffle_xor(outliers, 1);
            outliers |= shuffle_xor(outliers, 2);
            if (outliers != 0 && lane_index() % 4 == 0) {
                atomic_or(reinterpret_cast<uint32_t*>(args.counter + 1) + u / 4, outliers);
            }
        }
    }
    if (INT8 && SHARED == kToken && args.counter != nullptr) {
        auto* last = reinterpret_cast<int*>(slots) + 2 * kRowWarps;
        fence_global();
        sync_block();  // all of this block's bits, before one thread says so
        if (t == 0) {
            store_shared(last, int(atomic_add_acq_rel(args.counter, 1) == args.m - 1));
        }
        sync_block();
        if (load_shared(last)) {
            list_columns(args, last + 1);
        }
    }
}

}  // namespace qk
