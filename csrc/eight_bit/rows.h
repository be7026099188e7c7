// The rows of x for the 8-bit GEMV: codes that another kernel wrote, or 16-bit numbers that the
// GEMV quantizes itself.
//
// Codes of x do not depend on W, so all blocks of the second kind make the same ones. That costs
// less than a kernel before the product if x has few rows. A block needs the absmax of whole rows
// (kToken) while its first loads of W are in flight. The rest happens in the main loop: each
// element of x belongs to one warp, which quantizes the 128 features of a step as 32 lanes with
// four features each. Codes go to the lanes that multiply them through shared memory:
//
//   words of a row    0 ... 31                 32              33 ... 47
//                     codes of 128 features    scale (groups)  not used: 8 lanes read 8 banks each
//
// The arithmetic is that of quantize.h, so the codes have the same bits.
#pragma once
#include "outliers.h"
#include "quantize.h"

namespace qk {

constexpr int kStep = 128;
constexpr int kGemvBlock = 16, kEightWarps = 4, kEightThreads = 32 * kEightWarps, kEightDepth = 2;

/// n: the block's first row of W; q, j: the lane's row and column of four.
struct GemvPlace {
    int n, q, j;
};

/// A lane's codes of row q of each 8 rows of x, for one step: both halves of it.
template <int COLUMNS>
struct StepCodes {
    Words4 x[COLUMNS][2];
};

/// Rows whose codes are in device memory. COLUMNS_: rows of x, in units of 8.
template <int COLUMNS_>
struct StoredRows {
    static constexpr int COLUMNS = COLUMNS_, kShared = 0;
    static constexpr bool kQuantizes = false;
    using Part = StepCodes<COLUMNS>;  // what is loaded ahead

    const EightBitArgs& args;
    const GemvPlace& at;

    QK_DEVICE StoredRows(const EightBitArgs& its_args, const GemvPlace& its_place, unsigned char*)
        : args(its_args), at(its_place) {}

    QK_DEVICE void load(Part& to, int step, int end) const {
        QK_UNROLL
        for (int h = 0; h < 2; h++) {
            const int k = step * kStep + h * 64 + at.j * 16;
            QK_UNROLL
            for (int c = 0; c < COLUMNS; c++) {
                const int m = c * 8 + at.q;
                to.x[c][h] = step < end && k < args.kp && m < args.m
                                 ? load_global(reinterpret_cast<const Words4*>(
                                       args.x + int64_t(m) * args.kp + k))
                                 : Words4{};
            }
        }
    }
    QK_DEVICE void find_scales() {}
    QK_DEVICE const StepCodes<COLUMNS>& codes(const Part& part, int) { return part; }
    QK_DEVICE float group_scale(int m, int step) const {
        return load_global(args.x_scale + int64_t(step) * args.m + m);
    }
    QK_DEVICE float row_scale(int m) const { return scale_of_row(args, m); }
};

/// Up to ROWS rows of 16-bit numbers, args.x16. K is a multiple of 8, and x16 one of 16 bytes.
template <typename T, bool INT8, int GRANULARITY, int ROWS>
struct QuantizedRows {
    static constexpr int COLUMNS = 1, kRowWords = 48;
    static constexpr bool kQuantizes = true;
    /// codes of each warp's step; maxima of each warp; scales of rows
    static constexpr int kCodes = kEightWarps * ROWS * kRowWords, kMaxima = kEightWarps * ROWS;
    static constexpr int kShared = (kCodes + kMaxima) * 4 + ROWS * int(sizeof(Scale));
    struct Part {
        Words2 x[ROWS];  // four features of each row
    };

    const EightBitArgs& args;
    const GemvPlace& at;
    uint32_t *words, *maxima;
    Scale *scales, scale = {};
    float zero = 0;

    QK_DEVICE QuantizedRows(const EightBitArgs& its_args, const GemvPlace& its_place,
                            unsigned char* shared)
        : args(its_args), at(its_place) {
        auto* all = reinterpret_cast<uint32_t*>(shared);
        words = all + warp_index() * (ROWS * kRowWords);
        maxima = all + kCodes;
        scales = reinterpret_cast<Scale*>(maxima + kMaxima);
    }

    QK_DEVICE bool has_row(int m) const { return m < ROWS && m < args.m; }

    QK_DEVICE void load(Part& to, int step, int end) const {
        const int k = step * kStep + lane_index() * 4;
        const T* x = static_cast<const T*>(args.x16) + k;
        QK_UNROLL
        for (int m = 0; m < ROWS; m++) {
            to.x[m] = step < end && k < args.k && has_row(m)
                          ? load_global(reinterpret_cast<const Words2*>(x + int64_t(m) * args.k))
                          : Words2{};
        }
    }

    /// The scales of rows: each block reads all of x for them.
    QK_DEVICE void find_scales() {
        if (GRANULARITY == kTensor) {
            scale = tensor_scale(load_global(args.x_scale));
            zero = args.zero != nullptr ? float(load_global(args.zero)) : 0;
        }
        if (GRANULARITY != kToken) {
            return;
        }
        constexpr int kAhead = 8 / ROWS;  // a thread has eight loads in flight
        uint32_t sizes[ROWS] = {};
        const int t = thread_index(), units = args.k / kUnit;
        for (int first = t; first < units; first += kAhead * kEightThreads) {
            Words4 unit[ROWS][kAhead];
            QK_UNROLL
            for (int m = 0; m < ROWS; m++) {
                const auto* row = reinterpret_cast<const Words4*>(static_cast<const T*>(args.x16) +
                                                                  int64_t(m) * args.k);
                QK_UNROLL
                for (int i = 0; i < kAhead; i++) {
                    const int u = first + i * kEightThreads;
                    unit[m][i] = u < units && has_row(m) ? load_global(row + u) : Words4{};
                }
            }
            QK_UNROLL
            for (int m = 0; m < ROWS; m++) {
                QK_UNROLL
                for (int i = 0; i < kAhead; i++) {
                    sizes[m] = largest<T>({}, unit[m][i], sizes[m]);
                }
            }
        }
        QK_UNROLL
        for (int m = 0; m < ROWS; m++) {
            const uint32_t size = warp_largest(size_of<T>(sizes[m]));
            if (lane_index() == 0) {
                store_shared(maxima + m * kEightWarps + warp_index(), size);
            }
        }
        sync_block();
        if (t < ROWS) {
            uint32_t absmax = 0;
            QK_UNROLL
            for (int w = 0; w < kEightWarps; w++) {
                absmax = larger(absmax, load_shared(maxima + t * kEightWarps + w));
            }
            store_shared(scales + t, token_scale<INT8>(bits_to_float(absmax)));
        }
        sync_block();
    }

    /// The whole warp quantizes its step.
    QK_DEVICE StepCodes<1> codes(const Part& part, int step) {
        const int lane = lane_index(), k = step * kStep + lane * 4;
        sync_warp();  // no lane still reads the last step
        QK_UNROLL
        for (int m = 0; m < ROWS; m++) {
            if (!has_row(m)) {
                continue;
            }
            if (GRANULARITY == kToken) {
                scale = load_shared(scales + m);
            } else if (GRANULARITY == kGroup128) {
                const uint32_t size = warp_largest(size_of<T>(largest<T>({}, part.x[m])));
                scale = qk::group_scale(bits_to_float(size));
                if (lane == 0) {
                    store_shared(words + m * kRowWords + 32, float_to_bits(scale.value));
                }
            }
            uint32_t codes[1] = {};
            codes_of<T, INT8, GRANULARITY>(codes, part.x[m], {}, scale, zero, args.k - k);
            store_shared(words + m * kRowWords + lane, codes[0]);
        }
        sync_warp();
        StepCodes<1> result;
        QK_UNROLL
        for (int h = 0; h < 2; h++) {
            const uint32_t* from = words + at.q * kRowWords + h * 16 + at.j * 4;
            result.x[0][h] =
                has_row(at.q) ? load_shared(reinterpret_cast<const Words4*>(from)) : Words4{};
        }
        return result;
    }
    QK_DEVICE float group_scale(int m, int) const {
        return bits_to_float(load_shared(words + m * kRowWords + 32));
    }
    QK_DEVICE float row_scale(int m) const {
        return GRANULARITY == kTensor ? scale_of_row(args, m)
               : has_row(m)           ? load_shared(scales + m).value
                                      : 0;
    }
};

}  // namespace qk
