// Scalers that are spread over four lanes: the four lanes with the same rows hold different scale
// groups, or different words of the scales, and exchange them by shuffles when a tile is used. So a
// lane loads, and holds for the tiles to come, only a quarter of the scales it needs.
//
// Scale groups follow one another along K, and there are no zero points.
// qkernels/triton_kernels/scalers.py says what the bits mean. Tensors are (groups or blocks, N),
// with the rows of W next to each other.
#pragma once
#include "../ptx/warp.h"
#include "scalers.h"

namespace qk {

/// The value of lane `from` (0..3) of this lane's four.
template <typename V>
QK_DEVICE V from_quad(V value, int from) {
    return shuffle_from(value, lane_index() / 4 * 4 + from);
}

/// d times a 6-bit scale, -32 .. 31, given as its low four bits and its high two.
QK_DEVICE float signed_six(float d, uint32_t nibble, uint32_t top) {
    return d * float(int(nibble | top << 4) - 32);
}

QK_DEVICE float half_bits(uint32_t bits) { return to_float(Half{uint16_t(bits & 0xFFFF)}); }

/// Base of the scalers in this file.
template <int SCALE_GROUPS, bool HAS_MIN>
struct Quad {
    static constexpr int kGroups = SCALE_GROUPS;
    static constexpr bool kHasMin = HAS_MIN, kElements = true, kOutliers = false;
    static constexpr bool kHasZero = false, kHalfScales = false;

    struct Rows {
        int row[2];
        Rows() = default;
        QK_DEVICE Rows(const WeightOnlyArgs&, int first, int second) : row{first, second} {}
    };
    /// 32 bits per row.
    struct Raw {
        uint32_t w[2];
    };

    /// words[r] = word(row)
    template <typename F>
    QK_DEVICE static void load_rows(uint32_t (&words)[2], const Rows& rows, F word) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            words[r] = word(rows.row[r]);
        }
    }
};

/// Item `at` of row `row` of the (.., N) tensor at `p`.
template <typename V>
QK_DEVICE uint32_t item(const WeightOnlyArgs& args, const void* p, int at, int row) {
    return load_global(static_cast<const V*>(p) + int64_t(at) * args.n + row);
}
/// A float16 scale in the low half of a word, a float16 minimum in the high half.
QK_DEVICE uint32_t halves(const WeightOnlyArgs& args, const void* low, const void* high, int at,
                          int row) {
    return item<uint16_t>(args, low, at, row) | item<uint16_t>(args, high, at, row) << 16;
}

/// The group of 32 features whose scale this lane loads: scale group j of the tile. Lanes past the
/// last feature load the last group's.
template <int SCALE_GROUPS>
QK_DEVICE int group_of_lane(const WeightOnlyArgs& args, int tile) {
    const int group = tile * SCALE_GROUPS + lane_index() % SCALE_GROUPS, last = args.kp / 32 - 1;
    return group < last ? group : last;
}

/// Base of the scalers whose lanes have one scale group of the tile each, in one word a row.
/// Scaler: its static `scale_of` makes the scales of a word.
template <typename Scaler, int SCALE_GROUPS, bool HAS_MIN>
struct GroupALane : Quad<SCALE_GROUPS, HAS_MIN> {
    using typename Quad<SCALE_GROUPS, HAS_MIN>::Raw;
    using typename Quad<SCALE_GROUPS, HAS_MIN>::Rows;

    Raw raw;
    QK_DEVICE void take(const WeightOnlyArgs&, const Raw& fetched, int) { raw = fetched; }

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int group, int) const {
        return Scaler::scale_of(from_quad(raw.w[r], group));
    }

    // A lane has the scales of its own group already.
    QK_HOST_DEVICE static constexpr bool own_halves(int) { return false; }
    QK_HOST_DEVICE static constexpr bool own_odd(int) { return false; }
    using Own = Raw;
    QK_DEVICE static void fetch_own(Own& raw, const WeightOnlyArgs& args, const Rows& rows,
                                    int tile, int features) {
        Scaler::fetch(raw, args, rows, tile, features);
    }
    QK_DEVICE static ScaleZero own(const WeightOnlyArgs&, const Own& raw, int r, int, int, int) {
        return Scaler::scale_of(raw.w[r]);
    }
};

/// GGUF's q4_0, q5_0 and q8_0: a scale d per 32 features. With HAS_MIN, q4_1 and q5_1: also m, and
/// weight = d * value + m.
template <int SCALE_GROUPS, bool HAS_MIN>
struct Blocks : GroupALane<Blocks<SCALE_GROUPS, HAS_MIN>, SCALE_GROUPS, HAS_MIN> {
    using Base = Quad<SCALE_GROUPS, HAS_MIN>;
    static constexpr bool kHalfScales = true;

    QK_DEVICE static void fetch(typename Base::Raw& raw, const WeightOnlyArgs& args,
                                const typename Base::Rows& rows, int tile, int) {
        const int at = group_of_lane<SCALE_GROUPS>(args, tile);
        Base::load_rows(raw.w, rows, [&](int row) {
            return HAS_MIN ? halves(args, args.scaler[0], args.scaler[1], at, row)
                           : item<uint16_t>(args, args.scaler[0], at, row);
        });
    }
    QK_DEVICE static ScaleZero scale_of(uint32_t word) {
        return {half_bits(word), HAS_MIN ? -half_bits(word >> 16) : 0};
    }
};

/// MXFP4: a scale 2^(code - 127) per 32 features, as a byte.
template <int SCALE_GROUPS>
struct E8M0 : GroupALane<E8M0<SCALE_GROUPS>, SCALE_GROUPS, false> {
    using Base = Quad<SCALE_GROUPS, false>;

    QK_DEVICE static void fetch(typename Base::Raw& raw, const WeightOnlyArgs& args,
                                const typename Base::Rows& rows, int tile, int) {
        const int at = group_of_lane<SCALE_GROUPS>(args, tile);
        Base::load_rows(raw.w, rows,
                        [&](int row) { return item<uint8_t>(args, args.scaler[0], at, row); });
    }
    QK_DEVICE static ScaleZero scale_of(uint32_t code) {
        // The exponent of a float32; 2^-127 is not a normal number.
        return {bits_to_float(code != 0 ? code << 23 : 0x00400000), 0};
    }
};

/// q4_k and q5_k: a 6-bit scale and a 6-bit minimum per 32 features. Lane j < 3 has word j of a
/// block's three, lane 3 has d and dmin.
struct Q4K : Quad<4, true> {
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        const int block = tile / 2, j = lane_index() % 4;
        load_rows(raw.w, rows, [&](int row) {
            return j < 3 ? item<uint32_t>(args, args.scaler[0], block * 3 + j, row)
                         : halves(args, args.scaler[1], args.scaler[2], block, row);
        });
    }

    /// A byte per scale group: scales and minima of the tile's four.
    uint32_t scales[2], minima[2];
    float d[2], dmin[2];
    QK_DEVICE void take(const WeightOnlyArgs&, const Raw& raw, int tile) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            const uint32_t a = from_quad(raw.w[r], 0), b = from_quad(raw.w[r], 1);
            const uint32_t c = from_quad(raw.w[r], 2), word = from_quad(raw.w[r], 3);
            const bool second_half = tile % 2 != 0;  // of the block
            scales[r] = second_half ? (c & 0x0F0F0F0F) | (a >> 2 & 0x30303030) : a & 0x3F3F3F3F;
            minima[r] =
                second_half ? (c >> 4 & 0x0F0F0F0F) | (b >> 2 & 0x30303030) : b & 0x3F3F3F3F;
            d[r] = half_bits(word);
            dmin[r] = half_bits(word >> 16);
        }
    }

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int group, int) const {
        return {d[r] * float(scales[r] >> 8 * group & 0xFF),
                dmin[r] * float(minima[r] >> 8 * group & 0xFF)};
    }

    /// Byte j of the block's three words, for group j of the tile; d and dmin.
    QK_HOST_DEVICE static constexpr bool own_halves(int) { return false; }
    QK_HOST_DEVICE static constexpr bool own_odd(int) { return false; }
    struct Own {
        uint32_t a[2], b[2], c[2], d[2];
    };
    QK_DEVICE static void fetch_own(Own& raw, const WeightOnlyArgs& args, const Rows& rows,
                                    int tile, int) {
        const int block = tile / 2, j = lane_index() % 4;
        const auto* bytes = static_cast<const uint8_t*>(args.scaler[0]) + j;
        const auto byte = [&](int word) {
            return [=, &args](int row) -> uint32_t {
                return load_global(bytes + (int64_t(block * 3 + word) * args.n + row) * 4);
            };
        };
        load_rows(raw.a, rows, byte(0));
        load_rows(raw.b, rows, byte(1));
        load_rows(raw.c, rows, byte(2));
        load_rows(raw.d, rows, [&](int row) {
            return halves(args, args.scaler[1], args.scaler[2], block, row);
        });
    }
    QK_DEVICE static ScaleZero own(const WeightOnlyArgs&, const Own& raw, int r, int, int,
                                   int tile) {
        // The first half of a block has six bits of a and of b, the second half four bits of c and
        // two of a and of b.
        const bool second_half = tile % 2 != 0;
        const uint32_t low = second_half ? 15 : 63, high = second_half ? 0x30 : 0;
        const uint32_t scale =
            lop3<kAndOr>(raw.a[r] >> 2, high, (second_half ? raw.c[r] : raw.a[r]) & low);
        const uint32_t minimum =
            lop3<kAndOr>(raw.b[r] >> 2, high, (second_half ? raw.c[r] >> 4 : raw.b[r]) & low);
        return {half_bits(raw.d[r]) * float(scale), half_bits(raw.d[r] >> 16) * float(minimum)};
    }
};

/// q2_k: a byte per 16 features, with the scale in the low nibble and the minimum in the high one.
/// Lane j has the bytes of scale groups 4j .. 4j + 3.
struct Q2K : Quad<16, true> {
    struct Raw {
        uint32_t w[2], d[2];
    };
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        load_rows(raw.w, rows, [&](int row) {
            const int at = tile * 16 + lane_index() % 4 * 4;
            uint32_t four = 0;
            QK_UNROLL
            for (int i = 0; i < 4; i++) {
                four |= item<uint8_t>(args, args.scaler[0], at + i, row) << 8 * i;
            }
            return four;
        });
        load_rows(raw.d, rows,
                  [&](int row) { return halves(args, args.scaler[1], args.scaler[2], tile, row); });
    }

    Raw raw;
    uint32_t four[2];
    QK_DEVICE void take(const WeightOnlyArgs&, const Raw& fetched, int) { raw = fetched; }

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int group, int) {
        if (group % 4 == 0) {
            four[r] = from_quad(raw.w[r], group / 4);
        }
        return scale_of(four[r] >> 8 * (group % 4), raw.d[r]);
    }
    QK_DEVICE static ScaleZero scale_of(uint32_t byte, uint32_t d) {
        return {half_bits(d) * float(byte & 15), half_bits(d >> 16) * float(byte >> 4 & 15)};
    }

    /// The bytes of groups 2j, 2j + 1, 8 + 2j and 9 + 2j.
    QK_HOST_DEVICE static constexpr bool own_halves(int) { return true; }
    QK_HOST_DEVICE static constexpr bool own_odd(int) { return true; }
    using Own = Raw;
    QK_DEVICE static void fetch_own(Own& raw, const WeightOnlyArgs& args, const Rows& rows,
                                    int tile, int) {
        load_rows(raw.w, rows, [&](int row) {
            uint32_t four = 0;
            QK_UNROLL
            for (int i = 0; i < 4; i++) {
                const int at = tile * 16 + i / 2 * 8 + lane_index() % 4 * 2 + i % 2;
                four |= item<uint8_t>(args, args.scaler[0], at, row) << 8 * i;
            }
            return four;
        });
        load_rows(raw.d, rows,
                  [&](int row) { return halves(args, args.scaler[1], args.scaler[2], tile, row); });
    }
    QK_DEVICE static ScaleZero own(const WeightOnlyArgs&, const Own& raw, int r, int half, int odd,
                                   int) {
        return scale_of(raw.w[r] >> 8 * (half * 2 + odd), raw.d[r]);
    }
};

/// q3_k: a 6-bit scale per 16 features. Lane j < 3 has word j of a block's three, lane 3 has d.
struct Q3K : Quad<16, false> {
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        const int j = lane_index() % 4;
        load_rows(raw.w, rows, [&](int row) {
            return j < 3 ? item<uint32_t>(args, args.scaler[0], tile * 3 + j, row)
                         : item<uint16_t>(args, args.scaler[1], tile, row);
        });
    }

    /// low: low four bits of the scales, of groups 0-7 in the low nibbles and 8-15 in the high
    /// ones, four bytes per word. high: the top two bits of each scale.
    uint32_t low[2][2], high[2];
    float d[2];
    QK_DEVICE void take(const WeightOnlyArgs&, const Raw& raw, int) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            low[r][0] = from_quad(raw.w[r], 0);
            low[r][1] = from_quad(raw.w[r], 1);
            high[r] = from_quad(raw.w[r], 2);
            d[r] = half_bits(from_quad(raw.w[r], 3));
        }
    }

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int group, int) const {
        const uint32_t nibble = low[r][group / 4 % 2] >> (group % 4 * 8 + group / 8 * 4) & 15;
        const uint32_t top = high[r] >> (group % 4 * 8 + group / 4 * 2) & 3;
        return {signed_six(d[r], nibble, top), 0};
    }

    /// low: a byte for each of two groups, whose nibbles belong to the halves of the tile; high: a
    /// byte for each, too.
    QK_HOST_DEVICE static constexpr bool own_halves(int) { return true; }
    QK_HOST_DEVICE static constexpr bool own_odd(int) { return true; }
    struct Own {
        uint32_t low[2], high[2], d[2];
    };
    QK_DEVICE static void fetch_own(Own& raw, const WeightOnlyArgs& args, const Rows& rows,
                                    int tile, int) {
        const int j = lane_index() % 4;
        const auto* halves16 = static_cast<const uint16_t*>(args.scaler[0]) + j % 2;
        load_rows(raw.low, rows, [&](int row) -> uint32_t {
            return load_global(halves16 + (int64_t(tile * 3 + j / 2) * args.n + row) * 2);
        });
        load_rows(raw.high, rows, [&](int row) -> uint32_t {
            return load_global(halves16 + (int64_t(tile * 3 + 2) * args.n + row) * 2);
        });
        load_rows(raw.d, rows,
                  [&](int row) { return item<uint16_t>(args, args.scaler[1], tile, row); });
    }
    QK_DEVICE static ScaleZero own(const WeightOnlyArgs&, const Own& raw, int r, int half, int odd,
                                   int) {
        const int j = lane_index() % 4;
        const uint32_t nibble = raw.low[r] >> (odd * 8 + half * 4) & 15;
        const uint32_t top = raw.high[r] >> (odd * 8 + half * 4) >> j / 2 * 2 & 3;
        return {signed_six(half_bits(raw.d[r]), nibble, top), 0};
    }
};

/// q6_k: an int8 scale per 16 features; a tile is half a block. Lane j has scale groups 2j and
/// 2j + 1 in the low half of its word, and d in the high half.
struct Q6K : Quad<8, false> {
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        const int at = tile * 8 + lane_index() % 4 * 2;
        load_rows(raw.w, rows, [&](int row) {
            return item<uint8_t>(args, args.scaler[0], at, row) |
                   item<uint8_t>(args, args.scaler[0], at + 1, row) << 8 |
                   item<uint16_t>(args, args.scaler[1], tile / 2, row) << 16;
        });
    }

    Raw raw;
    uint32_t two[2];
    QK_DEVICE void take(const WeightOnlyArgs&, const Raw& fetched, int) { raw = fetched; }

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int group, int) {
        if (group % 2 == 0) {
            two[r] = from_quad(raw.w[r], group / 2);
        }
        return scale_of(two[r] >> 8 * (group % 2), raw.w[r]);
    }
    QK_DEVICE static ScaleZero scale_of(uint32_t byte, uint32_t word) {
        return {half_bits(word >> 16) * float(int8_t(byte & 0xFF)), 0};
    }

    // A lane has the scales of its own two groups already.
    QK_HOST_DEVICE static constexpr bool own_halves(int) { return false; }
    QK_HOST_DEVICE static constexpr bool own_odd(int) { return true; }
    using Own = Raw;
    QK_DEVICE static void fetch_own(Own& raw, const WeightOnlyArgs& args, const Rows& rows,
                                    int tile, int features) {
        fetch(raw, args, rows, tile, features);
    }
    QK_DEVICE static ScaleZero own(const WeightOnlyArgs&, const Own& raw, int r, int, int odd,
                                   int) {
        return scale_of(raw.w[r] >> 8 * odd, raw.w[r]);
    }
};

/// iq4_xs: a 6-bit scale per 32 features. Even lanes have the low nibbles of a block's scales, odd
/// lanes have d in the low half and the top bits of the scales in the high half.
struct Iq4Xs : Quad<4, false> {
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        load_rows(raw.w, rows, [&](int row) {
            return lane_index() % 2 == 0
                       ? item<uint32_t>(args, args.scaler[0], tile / 2, row)
                       : halves(args, args.scaler[1], args.scaler[2], tile / 2, row);
        });
    }

    uint32_t low[2], high[2];
    float d[2];
    QK_DEVICE void take(const WeightOnlyArgs&, const Raw& raw, int tile) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            const uint32_t word = from_quad(raw.w[r], 1);
            low[r] = from_quad(raw.w[r], 0) >> tile % 2 * 16;
            high[r] = word >> (16 + tile % 2 * 8);
            d[r] = half_bits(word);
        }
    }

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int group, int) const {
        const uint32_t nibble = low[r] >> group * 4 & 15, top = high[r] >> group * 2 & 3;
        return {signed_six(d[r], nibble, top), 0};
    }

    /// The block's words, of which a lane uses the bits of group j of the tile.
    QK_HOST_DEVICE static constexpr bool own_halves(int) { return false; }
    QK_HOST_DEVICE static constexpr bool own_odd(int) { return false; }
    struct Own {
        uint32_t low[2], high[2];
    };
    QK_DEVICE static void fetch_own(Own& raw, const WeightOnlyArgs& args, const Rows& rows,
                                    int tile, int) {
        load_rows(raw.low, rows,
                  [&](int row) { return item<uint32_t>(args, args.scaler[0], tile / 2, row); });
        load_rows(raw.high, rows, [&](int row) {
            return halves(args, args.scaler[1], args.scaler[2], tile / 2, row);
        });
    }
    QK_DEVICE static ScaleZero own(const WeightOnlyArgs&, const Own& raw, int r, int, int,
                                   int tile) {
        const int group = tile % 2 * 4 + lane_index() % 4;
        const uint32_t nibble = raw.low[r] >> group * 4 & 15;
        const uint32_t top = raw.high[r] >> (16 + group * 2) & 3;
        return {signed_six(half_bits(raw.high[r]), nibble, top), 0};
    }
};

/// SpQR: a group of a row has 3-bit codes of its scale and zero point; a group of `row_group` rows
/// has the scales and zero points of these codes, s_s, z_s, s_z and z_z. Every slice is a scale
/// group here, so quantization groups may have any size. Lane j has slices 4i + j.
///
///   weight = scale * (code - zero) = scale * code - minimum, because zero is not an integer
template <int SCALE_GROUPS>
struct TwoLevel : Quad<SCALE_GROUPS, true> {
    static constexpr bool kOutliers = true;
    static constexpr int kLaneGroups = SCALE_GROUPS / 4;

    /// second: the group of rows of each row.
    struct Rows {
        int row[2], second[2];
        Rows() = default;
        QK_DEVICE Rows(const WeightOnlyArgs& args, int first_row, int second_row)
            : row{first_row, second_row},
              second{row_group_of(args, first_row), row_group_of(args, second_row)} {}
    };
    /// stats: the codes of scale and zero point, a byte per scale group of this lane.
    struct Raw {
        uint32_t stats[2];
        Words2 second[2][kLaneGroups];
    };
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        QK_UNROLL
        for (int i = 0; i < kLaneGroups; i++) {
            load(raw, i, args, rows, tile * SCALE_GROUPS + i * 4 + lane_index() % 4);
        }
    }
    /// Loads number i of a lane's scale groups, which is slice `slice`.
    QK_DEVICE static void load(Raw& raw, int i, const WeightOnlyArgs& args, const Rows& rows,
                               int slice) {
        const int slices = (args.kp + 15) / 16;
        slice = slice < slices ? slice : slices - 1;
        const int group = args.slice_group != nullptr ? load_global(args.slice_group + slice)
                                                      : divided(slice, args.group_divisor);
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            const uint32_t stat = item<uint8_t>(args, args.scaler[0], group, rows.row[r]) << 8 * i;
            raw.stats[r] = i == 0 ? stat : raw.stats[r] | stat;
            const int64_t at = int64_t(group) * args.scale_stride + rows.second[r];
            raw.second[r][i] = load_global(static_cast<const Words2*>(args.scaler[1]) + at);
        }
    }

    Raw raw;
    float scale[2], minimum[2];  // of this lane's scale group among the four in use
    QK_DEVICE void take(const WeightOnlyArgs&, const Raw& fetched, int) { raw = fetched; }

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int group, int) {
        if (group % 4 == 0) {
            const ScaleZero of_lane = scale_of(raw, r, group / 4);
            scale[r] = of_lane.scale;
            minimum[r] = of_lane.zero;
        }
        return {from_quad(scale[r], group % 4), from_quad(minimum[r], group % 4)};
    }
    QK_DEVICE static ScaleZero scale_of(const Raw& raw, int r, int i) {
        const uint32_t stat = raw.stats[r] >> 8 * i;
        const Words2 second = raw.second[r][i];
        const float scale = half_bits(second.w[0]) * (float(stat & 7) - half_bits(second.w[1]));
        return {scale, scale * (half_bits(second.w[0] >> 16) *
                                (float(stat >> 3 & 7) - half_bits(second.w[1] >> 16)))};
    }

    QK_HOST_DEVICE static constexpr bool own_halves(int slices) { return slices > 8; }
    QK_HOST_DEVICE static constexpr bool own_odd(int) { return true; }
    using Own = Raw;
    QK_DEVICE static void fetch_own(Own& raw, const WeightOnlyArgs& args, const Rows& rows,
                                    int tile, int) {
        QK_UNROLL
        for (int i = 0; i < kLaneGroups; i++) {
            load(raw, i, args, rows,
                 tile * SCALE_GROUPS + i / 2 * 8 + lane_index() % 4 * 2 + i % 2);
        }
    }
    QK_DEVICE static ScaleZero own(const WeightOnlyArgs&, const Own& raw, int r, int half, int odd,
                                   int) {
        return scale_of(raw, r, half * 2 + odd);
    }
};

}  // namespace qk
