// E8P, the codes of QuIP#: each code stands for eight weights (qkernels/formats/e8p.py).
//
// A word has two codes and decodes like a word of 2-bit codes: pairs 0-3 belong to the first code,
// pairs 4-7 to the second. A word of the codebook has eight nibbles, nibbles k and k + 4 for pair
// k. The codebook has 256 words for E8P itself, and 256 for the residual of 3 bits. Decoded weights
// are in units of 1/2.
#pragma once
#include "decoders.h"

namespace qk {

/// A ^ B ^ C.
constexpr int kXor3 = 0xF0 ^ 0xCC ^ 0xAA;

/// Two codes -> eight nibbles q of each; the weights are q - 7.5.
///
/// The high byte selects a word of the codebook: eight odd nibbles o, each for the value o - 8. The
/// low byte has a sign per nibble, o -> 16 - o. If the number of signs is odd, the first one is
/// flipped, so that the number is even. The parity of the byte says whether half a unit is added or
/// subtracted, which makes the odd nibbles even.
QK_DEVICE void e8p_nibbles(uint32_t codes, const uint32_t* book, uint32_t (&nibbles)[2]) {
    uint32_t odd = codes & 0x00FF00FF;
    odd ^= odd >> 4;
    odd ^= odd >> 2;
    odd = (odd ^ odd >> 1) & 0x00010001;
    const uint32_t signs = (codes & 0x00FF00FF) ^ odd;
    QK_UNROLL
    for (int c = 0; c < 2; c++) {
        uint32_t flips = signs >> 16 * c & 0xFF;
        flips = (flips | flips << 12) & 0x000F000F;
        flips = (flips | flips << 6) & 0x03030303;
        flips = (flips | flips << 3) & 0x11111111;
        nibbles[c] = lop3<kXor3>(load_shared(book + (codes >> (16 * c + 8) & 0xFF)), flips * 14,
                                 (odd >> 16 * c & 1) * 0x11111111);
    }
}

/// 2 bits: exact, like `HalfInteger`.
template <typename T>
struct E8p : Basic {
    static constexpr int kWidth = 2, kPairs = 8, kBook = 256;

    static QK_DEVICE void split(uint32_t word, uint32_t, const Table& table,
                                uint32_t (&pairs)[kPairs]) {
        uint32_t nibbles[2];
        e8p_nibbles(word, table.book, nibbles);
        QK_UNROLL
        for (int s = 0; s < kPairs; s++) {
            pairs[s] = lop3<kAndOr>(shifted_right(nibbles[s / 4], s % 4 * 4 - 1), 0x001E001E,
                                    Magic<T>::kBits | 0x10001);
        }
    }
    static QK_HOST_DEVICE uint32_t offset(float) { return 0; }
    static QK_HOST_DEVICE uint32_t finish(uint32_t values, uint32_t) {
        return halved<T, 8>(values);
    }

    /// A word of nibbles is a word of 4-bit codes.
    using Nibbles = Linear<T, 4>;
    static constexpr float kZero = 7.5f;
    static constexpr int kTogether = Nibbles::kTogether;
    static QK_HOST_DEVICE constexpr float added(int s) { return Nibbles::added(s % 4); }
    static QK_DEVICE void raw(uint32_t word, uint32_t, const Table& table,
                              uint32_t (&pairs)[kPairs]) {
        uint32_t nibbles[2];
        e8p_nibbles(word, table.book, nibbles);
        QK_UNROLL
        for (int c = 0; c < 2; c++) {
            uint32_t four[4];
            Nibbles::raw(nibbles[c], 0, table, four);
            QK_UNROLL
            for (int s = 0; s < 4; s++) {
                pairs[c * 4 + s] = four[s];
            }
        }
    }
};

/// 3 and 4 bits: a second code for the residual of the first, added in float32 and rounded once.
template <typename T, int BITS>
struct E8pResidual : Basic {
    static constexpr int kWidth = 2, kPairs = 8;
    static constexpr int kHigh = BITS == 3 ? 2 : 4, kHighStep = 16;
    static constexpr int kBook = BITS == 3 ? 512 : 256;
    static constexpr bool kFinished = true;
    /// 1 / ROUNDING[bits].residual_scale of qkernels/formats/e8p.py
    static constexpr float kResidualScale = BITS == 3 ? float(1 / 2.04) : float(1 / 3.45);

    /// Nibble `k` minus 7.5, or minus 8 for the residual codebook of 3 bits.
    template <bool HALF>
    static QK_HOST_DEVICE float units(uint32_t nibbles, int k) {
        constexpr uint32_t magic = 0x4A800000 | uint32_t(HALF);  // 2^22, in steps of a half
        return bits_to_float(lop3<kAndOr>(shifted_right(nibbles, k * 4 - 1), 0x1E, magic)) -
               4194312.0f;
    }
    static QK_DEVICE void split(uint32_t word, uint32_t high, const Table& table,
                                uint32_t (&pairs)[kPairs]) {
        constexpr bool half = BITS == 4;
        uint32_t first[2], second[2];
        e8p_nibbles(word, table.book, first);
        if (half) {
            e8p_nibbles(high, table.book, second);
        } else {
            second[0] = load_shared(table.book + 256 + (high & 0xFF));
            second[1] = load_shared(table.book + 256 + (high >> 8 & 0xFF));
        }
        QK_UNROLL
        for (int s = 0; s < kPairs; s++) {
            T values[2];
            QK_UNROLL
            for (int b = 0; b < 2; b++) {
                const int k = s % 4 + b * 4;
                values[b] = from_float<T>(units<true>(first[s / 4], k) +
                                          units<half>(second[s / 4], k) * kResidualScale);
            }
            pairs[s] = pair(values[0], values[1]);
        }
    }
    static QK_DEVICE void raw(uint32_t word, uint32_t high, const Table& table,
                              uint32_t (&pairs)[kPairs]) {
        split(word, high, table, pairs);
    }
    static QK_HOST_DEVICE uint32_t offset(float) { return 0; }
    static QK_HOST_DEVICE uint32_t finish(uint32_t values, uint32_t) { return values; }
};

}  // namespace qk
