// E8P, the codes of QuIP#: each stands for eight weights, as qkernels/formats/e8p.py has them.
//
// A word has two codes and decodes like a word of 2-bit codes: pairs 0-3 are the first code's,
// pairs 4-7 the second's. The codebook has eight nibbles a word, nibble k and k + 4 for pair k: 256
// words for E8P itself, 256 for the residual of 3 bits. Weights come out in units of a half.
#pragma once
#include "decoders.h"

namespace qk {

/// A ^ B ^ C.
constexpr int kXor3 = 0xF0 ^ 0xCC ^ 0xAA;

/// Two codes -> of each eight nibbles q, q - 7.5 being the weights.
///
/// The high byte picks a word of the codebook, eight odd nibbles o for o - 8. The low byte holds
/// signs, o -> 16 - o, the first one flipped if their number is odd: so it is even, and its parity
/// says instead whether half a unit is added or taken off, which makes the odd nibbles even.
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
            pairs[s] = lop3<kAndOr>(moved(nibbles[s / 4], s % 4 * 4 - 1), 0x001E001E,
                                    Magic<T>::kBits | 0x10001);
        }
    }
    static QK_BOTH uint32_t offset(float) { return 0; }
    static QK_BOTH uint32_t finish(uint32_t both, uint32_t) { return halved<T, 8>(both); }
};

/// 3 and 4 bits: a second code for what the first one leaves, added in float32 and rounded once.
template <typename T, int BITS>
struct E8pResidual : Basic {
    static constexpr int kWidth = 2, kPairs = 8;
    static constexpr int kHigh = BITS == 3 ? 2 : 4, kHighStep = 16;
    static constexpr int kBook = BITS == 3 ? 512 : 256;
    static constexpr bool kFinished = true;
    /// 1 / ROUNDING[bits].share of qkernels/formats/e8p.py
    static constexpr float kShare = BITS == 3 ? float(1 / 2.04) : float(1 / 3.45);

    /// Nibble `k` less 7.5, or less 8 for the points of the third bit.
    template <bool HALF>
    static QK_BOTH float units(uint32_t nibbles, int k) {
        constexpr uint32_t magic = 0x4A800000 | uint32_t(HALF);  // 2^22, in steps of a half
        return bits_to_float(lop3<kAndOr>(moved(nibbles, k * 4 - 1), 0x1E, magic)) - 4194312.0f;
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
            T both[2];
            QK_UNROLL
            for (int b = 0; b < 2; b++) {
                const int k = s % 4 + b * 4;
                both[b] = from_float<T>(units<true>(first[s / 4], k) +
                                        units<half>(second[s / 4], k) * kShare);
            }
            pairs[s] = pair(both[0], both[1]);
        }
    }
    static QK_BOTH uint32_t offset(float) { return 0; }
    static QK_BOTH uint32_t finish(uint32_t both, uint32_t) { return both; }
};

}  // namespace qk
