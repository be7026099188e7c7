// Decoders: a word of codes -> pairs of 16-bit floats, exact, before scaling. One policy class per
// kind of code. qkernels/layouts/weight_only.py defines the words.
//
//   kWidth           bits of a code in its word (of 3, 5 and 6 bits, the low 2 or 4 are there)
//   kPairs           pairs of neighbouring features in a word
//   kHigh            words of high bits that a lane has per tile and row: 0, 1, 2 or 4
//   kHighStep        shift between the high bits of code words that share a word of high bits
//   kBook            words of a codebook that `split` looks up in shared memory
//   kTable           whether `split` reads the 16-entry table
//   split            word -> pairs[s]; values may be off by a constant or a power of two
//   offset           the zero point as `finish` takes it, in both halves
//   finish           subtracts the constant and the zero point
//   kFinished        whether `split` gives final values, so that `finish` returns its argument
//
// The decode kernel does not finish weights: it subtracts constants and zero points from sums.
//
//   raw              word -> pairs[s] = value + kZero + added(s), divided by kFactor
//   added            see raw; 0 for decoders whose `split` gives these values
//   kTogether        the period of `added`
//   kZero, kFactor   see raw
//
// Integer codes become floats without a conversion: OR-ing a code into the low mantissa bits of 2^m
// (m = 10 in float16, 7 in bfloat16) makes the float 2^m + code, in both halves of a word at once.
#pragma once
#include "../ptx/arithmetic.h"
#include "../ptx/memory.h"

namespace qk {

/// w: the 16 entries of a table, split into bytes: low bytes of entries 0-3, ... 12-15, then high
/// bytes. book: the codebook in shared memory; or a table of pairs, and 4 * lane in w[0].
struct Table {
    uint32_t w[8];
    const uint32_t* book;
};

/// Defaults: no high bits, no codebook, no table.
struct Basic {
    static constexpr int kHigh = 0, kHighStep = 0, kBook = 0;
    static constexpr bool kTable = false, kFinished = false;
    static constexpr float kZero = 0, kFactor = 1;
    static constexpr int kTogether = 1;

    static QK_HOST_DEVICE constexpr float added(int) { return 0; }
};

template <typename T>
struct Magic;
template <>
struct Magic<Half> {
    static constexpr uint32_t kBits = 0x64006400, kMinusZero = 0x80008000;
    static constexpr uint32_t kOne = 0x3C003C00, kMinusOne = 0xBC00BC00;
    static constexpr uint32_t kHalf = 0x38003800, kMinusMiddle = 0xE000;  // -2^m / 2
    static constexpr float kValue = 1024;
    static constexpr int kMantissa = 10;
};
template <>
struct Magic<BFloat> {
    static constexpr uint32_t kBits = 0x43004300, kMinusZero = 0x80008000;
    static constexpr uint32_t kOne = 0x3F803F80, kMinusOne = 0xBF80BF80;
    static constexpr uint32_t kHalf = 0x3F003F00, kMinusMiddle = 0xC280;
    static constexpr float kValue = 128;
    static constexpr int kMantissa = 7;
};

template <typename T>
QK_HOST_DEVICE uint32_t broadcast(float value) {
    return round_pair<T>(value, value);
}

/// word >> right; a negative `right` shifts to the left.
QK_HOST_DEVICE uint32_t shifted_right(uint32_t word, int right) {
    return right >= 0 ? word >> right : word << -right;
}

/// Unsigned integers of up to 6 bits, and of 8 bits in float16, minus a zero point.
template <typename T, int BITS>
struct Linear : Basic {
    static constexpr int kWidth = BITS == 3 ? 2 : BITS > 4 && BITS < 8 ? 4 : BITS;
    static constexpr int kPairs = 16 / kWidth;
    static constexpr int kHighStep = BITS - kWidth, kHigh = kHighStep * kPairs / 4;
    /// The constant that `split` adds to a code.
    static constexpr float kAdded = Magic<T>::kValue;

    /// high: the high bits of pair s are at bits s * kWidth and 16 + s * kWidth.
    static QK_HOST_DEVICE void split(uint32_t word, uint32_t high, const Table&,
                                     uint32_t (&pairs)[kPairs]) {
        spread<0>(word, high, Magic<T>::kBits, pairs);
    }
    /// pairs[s] = base | codes << UP.
    template <int UP>
    static QK_HOST_DEVICE void spread(uint32_t word, uint32_t high, uint32_t base,
                                      uint32_t (&pairs)[kPairs]) {
        constexpr uint32_t mask = (((1u << kWidth) - 1) << UP) * 0x10001;
        constexpr uint32_t high_mask = (((1u << kHighStep) - 1) << (kWidth + UP)) * 0x10001;
        QK_UNROLL
        for (int s = 0; s < kPairs; s++) {
            pairs[s] = lop3<kAndOr>(shifted_right(word, s * kWidth - UP), mask, base);
            if (kHigh > 0) {
                pairs[s] =
                    lop3<kAndOr>(shifted_right(high, (s - 1) * kWidth - UP), high_mask, pairs[s]);
            }
        }
    }
    static QK_HOST_DEVICE uint32_t offset(float zero) { return broadcast<T>(kAdded + zero); }
    static QK_HOST_DEVICE uint32_t finish(uint32_t values, uint32_t offset) {
        return fma2<T>(offset, Magic<T>::kMinusOne, values);
    }

    /// Several codes of a half have a place in the mantissa after one shift. The higher the place,
    /// the smaller the constant that is added, and the less a sum loses by its subtraction.
    static constexpr int kFits = (Magic<T>::kMantissa - BITS) / kWidth + 1;
    static constexpr int kTogether = kFits < 3 ? kFits : 3;
    static constexpr int kLowest =
        kTogether == 1 ? 0 : Magic<T>::kMantissa - BITS - (kTogether - 1) * kWidth;

    /// Lowest bit of the mantissa that the code of pair s has in `raw`.
    static QK_HOST_DEVICE constexpr int place(int s) { return kLowest + s % kTogether * kWidth; }
    static QK_HOST_DEVICE constexpr float added(int s) {
        return float(1 << (Magic<T>::kMantissa - place(s)));
    }

    static QK_HOST_DEVICE void raw(uint32_t word, uint32_t high, const Table&,
                                   uint32_t (&pairs)[kPairs]) {
        constexpr uint32_t mask = ((1u << kWidth) - 1) * 0x10001;
        constexpr uint32_t high_mask = (((1u << kHighStep) - 1) << kWidth) * 0x10001;
        QK_UNROLL
        for (int s = 0; s < kPairs; s++) {
            if (BITS == 8) {  // bytes s and s + 2, each below a byte of the constant
                pairs[s] = prmt(word, Magic<T>::kBits, 0x5250 + s * 0x101);
                continue;
            }
            const int shift = s / kTogether * kTogether * kWidth - kLowest;
            // 2^(mantissa - place), whose mantissa counts in steps of 2^-place
            const uint32_t base =
                Magic<T>::kBits - (uint32_t(place(s)) << Magic<T>::kMantissa) * 0x10001;
            pairs[s] = lop3<kAndOr>(shifted_right(word, shift), mask << place(s), base);
            if (kHigh > 0) {
                pairs[s] = lop3<kAndOr>(shifted_right(high, shift - kWidth), high_mask << place(s),
                                        pairs[s]);
            }
        }
    }
};

/// The bits of a normal number in both halves, at compile time: conversions to T are instructions.
template <typename T>
QK_HOST_DEVICE constexpr uint32_t constant2(float value) {
    const bool negative = value < 0;
    float size = negative ? -value : value;
    int exponent = 0;
    for (; size >= 2; size /= 2) {
        exponent++;
    }
    for (; size < 1; size *= 2) {
        exponent--;
    }
    const int bias = Magic<T>::kMantissa == 10 ? 15 : 127;
    const uint32_t bits = (uint32_t(exponent + bias) << Magic<T>::kMantissa) +
                          uint32_t((size - 1) * (1 << Magic<T>::kMantissa));
    return (bits | (negative ? 0x8000u : 0)) * 0x10001u;
}

/// Signed codes: unsigned integers minus 2^(BITS - 1).
template <typename T, int BITS>
struct Signed : Linear<T, BITS> {
    static constexpr float kZero = 1 << (BITS - 1);

    static QK_HOST_DEVICE uint32_t offset(float) { return 0; }
    static QK_HOST_DEVICE uint32_t finish(uint32_t values, uint32_t) {
        constexpr uint32_t less = constant2<T>(-(Linear<T, BITS>::kAdded + (1 << (BITS - 1))));
        return fma2<T>(values, Magic<T>::kOne, less);
    }
};

/// Unsigned codes.
template <typename T, int BITS>
struct Unsigned : Linear<T, BITS> {
    static QK_HOST_DEVICE uint32_t offset(float) { return 0; }
    static QK_HOST_DEVICE uint32_t finish(uint32_t values, uint32_t) {
        constexpr uint32_t less = constant2<T>(-Linear<T, BITS>::kAdded);
        return fma2<T>(values, Magic<T>::kOne, less);
    }
};

/// A float whose low bits are 2 * code + 1 -> code + 1/2 - LESS, exactly.
template <typename T, int LESS>
QK_HOST_DEVICE uint32_t halved(uint32_t values) {
    // -(2^m / 2 + LESS); the last bit of this float is worth 1/2
    constexpr uint32_t offset = (Magic<T>::kMinusMiddle + 2 * LESS) * 0x10001u;
    return fma2<T>(values, Magic<T>::kHalf, offset);
}

/// Half-integer codes: unsigned integers minus half of the largest one.
template <typename T, int BITS>
struct HalfInteger : Linear<T, BITS> {
    static constexpr float kZero = float((1 << BITS) - 1) / 2;

    static QK_HOST_DEVICE void split(uint32_t word, uint32_t high, const Table&,
                                     uint32_t (&pairs)[Linear<T, BITS>::kPairs]) {
        Linear<T, BITS>::template spread<1>(word, high, Magic<T>::kBits | 0x10001, pairs);
    }
    static QK_HOST_DEVICE uint32_t offset(float) { return 0; }
    static QK_HOST_DEVICE uint32_t finish(uint32_t values, uint32_t) {
        return halved<T, 1 << (BITS - 1)>(values);
    }
};

/// 8 bits in bfloat16, whose mantissa is too short for the addition of 2^m: through float32.
template <>
struct Linear<BFloat, 8> : Basic {
    static constexpr int kWidth = 8, kPairs = 2;
    static constexpr float kAdded = 0;

    static QK_HOST_DEVICE void split(uint32_t word, uint32_t, const Table&,
                                     uint32_t (&pairs)[kPairs]) {
        QK_UNROLL
        for (int s = 0; s < kPairs; s++) {
            const float even =
                bits_to_float(prmt(word, 0x4B000000, s ? 0x7441 : 0x7440)) - 8388608.0f;
            const float odd =
                bits_to_float(prmt(word, 0x4B000000, s ? 0x7443 : 0x7442)) - 8388608.0f;
            pairs[s] = prmt(float_to_bits(even), float_to_bits(odd), 0x7632);
        }
    }
    static QK_HOST_DEVICE void raw(uint32_t word, uint32_t high, const Table& table,
                                   uint32_t (&pairs)[kPairs]) {
        split(word, high, table, pairs);
    }
    static QK_HOST_DEVICE uint32_t offset(float zero) { return broadcast<BFloat>(zero); }
    static QK_HOST_DEVICE uint32_t finish(uint32_t values, uint32_t offset) {
        return fma2<BFloat>(offset, Magic<BFloat>::kMinusOne, values);
    }
};

/// 4-bit codes that index a table: NF4, FP4, IQ4_NL. Bytes are looked up four at a time.
template <typename T>
struct Lut16 : Basic {
    static constexpr int kWidth = 4, kPairs = 4;
    static constexpr bool kTable = true, kFinished = true;

    static QK_HOST_DEVICE void split(uint32_t word, uint32_t, const Table& t,
                                     uint32_t (&pairs)[kPairs]) {
        // prmt selects one of eight bytes by three bits of a nibble; a second prmt uses the fourth
        // bit.
        uint32_t low3 = word & 0x77777777, bit3 = lop3<kAndOr>(word >> 1, 0x44444444, 0x32103210);
        QK_UNROLL
        for (int half = 0; half < 2; half++) {
            const uint32_t low = prmt(prmt(t.w[0], t.w[1], low3), prmt(t.w[2], t.w[3], low3), bit3);
            const uint32_t high =
                prmt(prmt(t.w[4], t.w[5], low3), prmt(t.w[6], t.w[7], low3), bit3);
            pairs[half * 2] = prmt(low, high, 0x5140);
            pairs[half * 2 + 1] = prmt(low, high, 0x7362);
            low3 >>= 16;
            bit3 >>= 16;
        }
    }
    /// Looks up a byte, which is two codes, in the table of pairs (`fill_pairs`).
    static QK_DEVICE void raw(uint32_t word, uint32_t, const Table& table,
                              uint32_t (&pairs)[kPairs]) {
        const auto* book = reinterpret_cast<const unsigned char*>(table.book);
        QK_UNROLL
        for (int s = 0; s < kPairs; s++) {
            const uint32_t at = prmt(word, table.w[0], 0x5504 + s * 0x10);  // byte * 256 + lane * 4
            pairs[s] = load_shared(reinterpret_cast<const uint32_t*>(book + at));
        }
    }
    static QK_HOST_DEVICE uint32_t offset(float) { return 0; }
    static QK_HOST_DEVICE uint32_t finish(uint32_t values, uint32_t) { return values; }
};

/// 8-bit floats with EXPONENT bits of exponent: shifted into place, then the bias is corrected.
template <typename T, int EXPONENT>
struct Float8 : Basic {
    static constexpr int kWidth = 8, kPairs = 2;
    static constexpr bool kIsHalf = Magic<T>::kValue == 1024;
    // Mantissa bits of T minus those of the code.
    static constexpr int kShift = (kIsHalf ? 10 : 7) - (7 - EXPONENT);

    static QK_HOST_DEVICE void split(uint32_t word, uint32_t, const Table&,
                                     uint32_t (&pairs)[kPairs]) {
        QK_UNROLL
        for (int s = 0; s < kPairs; s++) {
            const uint32_t values = word >> s * 8;
            pairs[s] = lop3<kAndOr>(values << 8, 0x80008000, (values & 0x007F007F) << kShift);
        }
    }
    static QK_HOST_DEVICE uint32_t offset(float) { return 0; }
    static QK_HOST_DEVICE uint32_t finish(uint32_t values, uint32_t) {
        if (kIsHalf && EXPONENT == 5) {
            return values;
        }
        // 2^(bias of T - bias of the code): 2^8 in float16, 2^120 or 2^112 in bfloat16
        constexpr uint32_t factor = kIsHalf ? 0x5C005C00 : EXPONENT == 4 ? 0x7B807B80 : 0x77807780;
        return fma2<T>(values, factor, Magic<T>::kMinusZero);
    }
    /// In float16 the sums are multiplied by 2^8; in bfloat16 they would be too small for float32.
    static constexpr float kFactor = kIsHalf && EXPONENT == 4 ? 256 : 1;
    static QK_HOST_DEVICE void raw(uint32_t word, uint32_t high, const Table& table,
                                   uint32_t (&pairs)[kPairs]) {
        split(word, high, table, pairs);
        if (!kIsHalf) {
            QK_UNROLL
            for (int s = 0; s < kPairs; s++) {
                pairs[s] = finish(pairs[s], 0);
            }
        }
    }
};

}  // namespace qk
