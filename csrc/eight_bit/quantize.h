// Activations to 8-bit codes: one block quantizes one row of x, optionally after RMSNorm or SiLU.
//
//   GRANULARITY  elements with one scale     codes
//   kToken       a row                       int8 round(x * 127 / absmax), e4m3 x / scale
//   kGroup128    128 features of a row       e4m3
//   kTensor      all, the scale is an input  int8 round(x / scale) + zero point, e4m3
//
// The arithmetic is the same as in qkernels/formats (eightbit.py, fp8.py), operation by operation
// in float32, so that codes agree bit for bit: divisions are IEEE divisions, rounding is half to
// even, fp8 saturates.
//
// Thread t has units t, t + 256, ..., of eight features each. It holds the first kCached units in
// registers; it reads the others again.
//
// LLM.int8(): an element whose size is `threshold` or more does not count for the absmax, its code
// is 0, and it sets its column's bit in a mask. A counter tells which block finishes last; that
// block turns the mask into a list for the matrix product, and leaves mask and counter zero. If
// rows are computed in slices, one launch for all rows writes only the list (no `codes`), and the
// launches for slices write only codes (no `counter`).
#pragma once
#include "../ptx/eight_bit.h"
#include "arguments.h"

namespace qk {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;
constexpr int kUnit = 8, kCached = 4;
constexpr int kGroupUnits = 128 / kUnit;
/// The smallest scale of a token and the smallest absmax of a group, as in formats/fp8.py.
constexpr float kTokenFloor = 1.0f / (448 * 512), kGroupFloor = 1e-4f;

/// Element i of a unit: of eight 16-bit numbers in a Words4, or of four in a Words2.
template <typename T, typename Unit>
QK_DEVICE T element(const Unit& unit, int i) {
    return i % 2 ? high_of<T>(unit.w[i / 2]) : low_of<T>(unit.w[i / 2]);
}

/// Rounds to T and back, as a model does after every operation.
template <typename T>
QK_DEVICE float rounded(float f) {
    return to_float(from_float<T>(f));
}

/// Loads eight 16-bit numbers at feature 8 * u of `row`, zeros from K on.
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

/// A unit before RMSNorm: x, or silu(x) * up, rounded where a model rounds.
template <typename T>
QK_DEVICE Words4 incoming(const QuantizeArgs& args, int u) {
    const int64_t at = int64_t(block_index_x()) * args.k;
    Words4 unit = load_unit(args, static_cast<const T*>(args.x) + at, u);
    if (args.up != nullptr) {
        const Words4 up = load_unit(args, static_cast<const T*>(args.up) + at, u);
        T result[kUnit];
        QK_UNROLL
        for (int i = 0; i < kUnit; i++) {
            const float gate = to_float(element<T>(unit, i));
            const float silu = rounded<T>(gate / (1.0f + expf(-gate)));
            result[i] = from_float<T>(silu * to_float(element<T>(up, i)));
        }
        QK_UNROLL
        for (int i = 0; i < kUnit; i += 2) {
            unit.w[i / 2] = pair(result[i], result[i + 1]);
        }
    }
    return unit;
}
/// RMSNorm: x / rms(x) * weight, rounded to T after each step; x itself if there is no norm.
template <typename T>
QK_DEVICE Words4 normed(const QuantizeArgs& args, Words4 unit, int u, float inverse) {
    if (args.norm != nullptr) {
        const Words4 weight = load_unit(args, static_cast<const T*>(args.norm), u);
        QK_UNROLL
        for (int i = 0; i < kUnit; i += 2) {
            T result[2];
            QK_UNROLL
            for (int b = 0; b < 2; b++) {
                const float x = rounded<T>(to_float(element<T>(unit, i + b)) * inverse);
                result[b] = from_float<T>(x * to_float(element<T>(weight, i + b)));
            }
            unit.w[i / 2] = pair(result[0], result[1]);
        }
    }
    return unit;
}

/// The outliers are the elements of at least `threshold`, if there can be any.
struct Outliers {
    bool any = false;
    float threshold = 0;
};
QK_DEVICE bool is_outlier(const Outliers& outliers, float x) {
    return outliers.any && fabsf(x) >= outliers.threshold;
}

QK_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

/// The larger of `sizes` and |x| of a unit, a maximum in each half; NaN is largest. Outliers are
/// skipped.
template <typename T, typename Unit>
QK_DEVICE uint32_t largest(const Outliers& outliers, const Unit& unit, uint32_t sizes = 0) {
    QK_UNROLL
    for (int w = 0; w < int(sizeof(Unit) / 4); w++) {
        uint32_t two = unit.w[w];
        if (outliers.any) {
            two &= is_outlier(outliers, to_float(low_of<T>(two))) ? 0xFFFF0000 : 0xFFFFFFFF;
            two &= is_outlier(outliers, to_float(high_of<T>(two))) ? 0x0000FFFF : 0xFFFFFFFF;
        }
        sizes = larger_sizes<T>(sizes, two);
    }
    return sizes;
}
/// The maximum of both halves as bits of a float32, which have the same order.
template <typename T>
QK_DEVICE uint32_t size_of(uint32_t sizes) {
    return larger(float_to_bits(to_float(low_of<T>(sizes))),
                  float_to_bits(to_float(high_of<T>(sizes))));
}

/// A scale, and its inverse as codes need it: int8 codes per token are x * inverse, rounded, and
/// all others are of `quotient`. power: of a tensor's scale.
struct alignas(16) Scale {
    float value, inverse, power;
};
template <bool INT8>
QK_DEVICE Scale token_scale(float absmax) {
    if (INT8) {
        return {absmax / 127.0f, absmax == 0 ? 0 : 127.0f * (1.0f / absmax)};
    }
    float scale = absmax / 448.0f;
    scale = scale < kTokenFloor ? kTokenFloor : scale;  // passes NaN on, unlike fmaxf
    return {scale, 1.0f / scale};
}
QK_DEVICE Scale group_scale(float absmax) {
    const float scale = (absmax < kGroupFloor ? kGroupFloor : absmax) / 448.0f;
    return {scale, 1.0f / scale};
}
/// A tensor's scale may have any size. `value` and x times a power of two have the same quotients,
/// and normal inverses and remainders.
QK_DEVICE Scale tensor_scale(float scale) {
    const float power = scale > 0x1p100f ? 0x1p-60f : scale < 0x1p-80f ? 0x1p62f : 1.0f;
    return {scale * power, 1.0f / (scale * power), power};
}

/// x / scale as IEEE division gives it, for a 16-bit float x: x * inverse, clamped far above the
/// largest code, and one correction by the exact remainder. That is right for every significand of
/// x (11 bits) and of a scale (24 bits), as trying all of them shows. Remainders are exact unless
/// the quotient is below 2^-22, and its code zero. The clamp lets inf stay inf. All quotients of a
/// scale that is inf are NaN; one of them, inf / inf, has to be.
template <int GRANULARITY>
QK_DEVICE float quotient(float x, const Scale& scale) {
    x = GRANULARITY == kTensor ? x * scale.power : x;
    const float near = fminf(fmaxf(x * scale.inverse, -4096.0f), 4096.0f);
    return fmaf(-fmaf(near, scale.value, -x), scale.inverse, near);
}

/// The sum over the block, in a fixed order, for every thread. slots: 8 words of shared memory that
/// nothing else uses.
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
    value = warp_largest(value);
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

/// int8 code of a scaled number, as a byte.
template <int GRANULARITY>
QK_DEVICE uint32_t int8_code(float value, float zero, bool live) {
    if (GRANULARITY == kToken) {
        value = round_even(fminf(fmaxf(value, -127.0f), 127.0f));
    } else {
        // Codes of larger values are the same, and integers up to 1024 are exact.
        value = round_even(fminf(fmaxf(value, -1024.0f), 1024.0f)) + zero;
        value = fminf(fmaxf(value, -128.0f), 127.0f);
    }
    return uint32_t(int(live ? value : 0)) & 0xFF;
}

/// Sets `codes`, which are zero, to those of a unit, four a word. live: how many features from the
/// unit's first one exist.
template <typename T, bool INT8, int GRANULARITY, typename Unit>
QK_DEVICE void codes_of(uint32_t (&codes)[sizeof(Unit) / 8], const Unit& unit,
                        const Outliers& outliers, const Scale& scale, float zero, int live) {
    QK_UNROLL
    for (int e = 0; e < int(sizeof(Unit) / 2); e += 2) {
        uint32_t code[2];
        float value[2];
        QK_UNROLL
        for (int i = 0; i < 2; i++) {
            const float x = to_float(element<T>(unit, e + i));
            if (INT8 && GRANULARITY == kToken) {
                code[i] = int8_code<kToken>(x * scale.inverse, 0, !is_outlier(outliers, x));
            } else {
                value[i] = quotient<GRANULARITY>(x, scale);
                code[i] = int8_code<kTensor>(value[i], zero, e + i < live);
            }
        }
        const uint32_t two = INT8 ? code[0] | code[1] << 8 : e4m3_codes(value[0], value[1]);
        codes[e / 4] |= two << e % 4 * 8;
    }
}

/// Writes the outlier columns of the mask, in order, and their number; clears mask and counter.
QK_DEVICE void list_columns(const QuantizeArgs& args, int* shared) {
    const int words = (args.k + 31) / 32, t = thread_index();
    const int each = (words + kRowThreads - 1) / kRowThreads, first = t * each;
    const int end = first + each < words ? first + each : words;
    auto* mask = reinterpret_cast<uint32_t*>(args.counter + 1);
    int mine = 0;
    for (int w = first; w < end; w++) {
        mine += count_ones(load_l2(mask + w));
    }
    int before = mine;  // the loop adds the counts of the lower lanes
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
template <typename T, bool INT8, int GRANULARITY>
__global__ void __launch_bounds__(kRowThreads) quantize_kernel(QuantizeArgs args) {
    auto* slots = reinterpret_cast<float*>(shared_memory());
    const int t = thread_index(), row = block_index_x(), units = args.kp / kUnit;
    let_next_kernel_start();
    wait_for_last_kernel();

    Words4 cached[kCached];
    float squares = 0;
    QK_UNROLL
    for (int i = 0; i < kCached; i++) {
        const int u = t + i * kRowThreads;
        cached[i] = u < units ? incoming<T>(args, u) : Words4{};
    }
    float inverse = 1;
    if (args.norm != nullptr) {
        for (int i = 0, u = t; u < units; i++, u += kRowThreads) {
            Words4 unit = {};
            QK_UNROLL
            for (int c = 0; c < kCached; c++) {  // cached[i], but indexed by constants
                unit = c == i ? cached[c] : unit;
            }
            unit = i < kCached ? unit : incoming<T>(args, u);
            QK_UNROLL
            for (int e = 0; e < kUnit; e++) {
                const float x = to_float(element<T>(unit, e));
                squares += x * x;
            }
        }
        const float mean = block_sum(squares, slots) / float(args.k);
        inverse = 1.0f / sqrtf(mean + args.eps);
        QK_UNROLL
        for (int i = 0; i < kCached; i++) {
            const int u = t + i * kRowThreads;
            if (u < units) {
                cached[i] = normed<T>(args, cached[i], u, inverse);
            }
        }
    }

    const Outliers outliers{args.columns != nullptr, args.threshold};
    Scale scale = {};
    if (GRANULARITY == kToken && args.codes != nullptr) {
        uint32_t sizes = 0;
        QK_UNROLL
        for (int i = 0; i < kCached; i++) {
            sizes = largest<T>(outliers, cached[i], sizes);
        }
        for (int u = t + kCached * kRowThreads; u < units; u += kRowThreads) {
            sizes = largest<T>(outliers, normed<T>(args, incoming<T>(args, u), u, inverse), sizes);
        }
        scale = token_scale<INT8>(bits_to_float(
            block_largest(size_of<T>(sizes), reinterpret_cast<uint32_t*>(slots + kRowWarps))));
        if (t == 0) {
            store_global(args.scale + row, scale.value);
        }
    } else if (GRANULARITY == kTensor) {
        scale = tensor_scale(load_global(args.scale));
    }
    const float zero = args.zero != nullptr ? float(load_global(args.zero)) : 0;

    // Whole warps iterate together, because they exchange maxima of groups and bits of outliers.
    for (int i = 0, first = t - int(lane_index()); first < units; i++, first += kRowThreads) {
        const int u = first + lane_index();
        const bool live = u < units;
        Words4 unit = {};
        if (i < kCached) {
            QK_UNROLL
            for (int c = 0; c < kCached; c++) {
                unit = c == i ? cached[c] : unit;
            }
        } else if (live) {
            unit = normed<T>(args, incoming<T>(args, u), u, inverse);
        }
        if (GRANULARITY == kGroup128) {
            uint32_t size = size_of<T>(largest<T>(outliers, unit));
            QK_UNROLL
            for (int d = kGroupUnits / 2; d > 0; d /= 2) {
                size = larger(size, shuffle_xor(size, d));
            }
            scale = group_scale(bits_to_float(size));
            if (live && u % kGroupUnits == 0 && u * kUnit < args.k) {
                store_global(args.scale + int64_t(u / kGroupUnits) * args.m + row, scale.value);
            }
        }
        Words2 codes = {};
        codes_of<T, INT8, GRANULARITY>(codes.w, unit, outliers, scale, zero, args.k - u * kUnit);
        if (live && args.codes != nullptr) {
            store_global(reinterpret_cast<Words2*>(args.codes + int64_t(row) * args.kp) + u, codes);
            if (args.rounded != nullptr) {
                store_unit(args, static_cast<T*>(args.rounded) + int64_t(row) * args.k, u, unit);
            }
        }
        if (INT8 && GRANULARITY == kToken && args.counter != nullptr) {
            uint32_t bits = 0;
            QK_UNROLL
            for (int e = 0; e < kUnit; e++) {
                bits |= uint32_t(is_outlier(outliers, to_float(element<T>(unit, e)))) << e;
            }
            bits <<= lane_index() % 4 * 8;  // the bits of four neighbours are a word of the mask
            bits |= shuffle_xor(bits, 1);
            bits |= shuffle_xor(bits, 2);
            if (bits != 0 && lane_index() % 4 == 0) {
                atomic_or(reinterpret_cast<uint32_t*>(args.counter + 1) + u / 4, bits);
            }
        }
    }
    if (INT8 && GRANULARITY == kToken && args.counter != nullptr) {
        auto* last = reinterpret_cast<int*>(slots) + 2 * kRowWarps;
        fence_global();
        sync_block();  // all bits of this block are set before one thread counts it
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
