// Scalers of which each lane holds a part: the four lanes that share rows have different runs, or
// different words of the scales, and hand them to each other when a tile is used. A lane loads, and
// keeps for the tiles to come, a quarter of what it needs.
//
// All of a kind run over K in order and have no zero points; see qkernels/triton_kernels/scalers.py
// for what the bits mean. Tensors are (groups or blocks, N), the rows next to each other.
#pragma once
#include "../ptx/warp.h"
#include "scalers.h"

namespace qk {

/// What lane `from` (0..3) of this lane's four brings.
template <typename V>
QK_DEVICE V of_quad(V value, int from) {
    return shuffle_from(value, lane_index() / 4 * 4 + from);
}

/// d times a scale of 6 bits that means -32 .. 31, of its low four and its high two.
QK_DEVICE float signed_six(float d, uint32_t nibble, uint32_t top) {
    return d * float(int(nibble | top << 4) - 32);
}

QK_DEVICE float half_bits(uint32_t bits) { return to_float(Half{uint16_t(bits & 0xFFFF)}); }

/// What the scalers here have in common.
template <int SCALE_GROUPS, bool HAS_MIN, int DEPTH>
struct Quad {
    static constexpr int kGroups = SCALE_GROUPS;
    static constexpr bool kHasMin = HAS_MIN, kElements = true, kOutliers = false;
    static constexpr int kDepth = DEPTH;

    struct Rows {
        int row[2];
        QK_DEVICE Rows(const WeightOnlyArgs&, int first) : row{first, first + 8} {}
    };
    /// 32 bits a row.
    struct Raw {
        uint32_t w[2];
    };

    /// word(row) of the rows there are, 0 of others.
    template <typename F>
    QK_DEVICE static void of_rows(uint32_t (&words)[2], const WeightOnlyArgs& args,
                                  const Rows& rows, F word) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            words[r] = rows.row[r] < args.n ? word(rows.row[r]) : 0;
        }
    }
};

/// Item `at` of row `row` of the (.., N) tensor at `p`.
template <typename V>
QK_DEVICE uint32_t item(const WeightOnlyArgs& args, const void* p, int at, int row) {
    return load_global(static_cast<const V*>(p) + int64_t(at) * args.n + row);
}
/// A float16 scale in the low half, a float16 minimum in the high one.
QK_DEVICE uint32_t halves(const WeightOnlyArgs& args, const void* low, const void* high, int at,
                          int row) {
    return item<uint16_t>(args, low, at, row) | item<uint16_t>(args, high, at, row) << 16;
}

/// d of 32 features, and with HAS_MIN m, weight = d * value + m: GGUF's q4_0, q5_0, q8_0; q4_1,
/// q5_1.
template <int SCALE_GROUPS, bool HAS_MIN>
struct Blocks : Quad<SCALE_GROUPS, HAS_MIN, 4> {
    using Base = Quad<SCALE_GROUPS, HAS_MIN, 4>;
    using typename Base::Raw;
    using typename Base::Rows;

    /// Lane j has run j of the tile.
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        const int group = tile * SCALE_GROUPS + lane_index() % SCALE_GROUPS,
                  last = args.kp / 32 - 1;
        const int at = group < last ? group : last;
        Base::of_rows(raw.w, args, rows, [&](int row) {
            return HAS_MIN ? halves(args, args.scale, args.second, at, row)
                           : item<uint16_t>(args, args.scale, at, row);
        });
    }

    Raw raw;
    QK_DEVICE Blocks(const WeightOnlyArgs&, const Raw& fetched, int) : raw(fetched) {}

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int run, int) const {
        const uint32_t both = of_quad(raw.w[r], run);
        return {half_bits(both), HAS_MIN ? -half_bits(both >> 16) : 0};
    }
};

/// q4_k and q5_k: 6-bit scale and minimum of 32 features. Lane j < 3 has word j of a block's three,
/// lane 3 d and dmin.
struct Q4K : Quad<4, true, 4> {
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        const int block = tile / 2, j = lane_index() % 4;
        of_rows(raw.w, args, rows, [&](int row) {
            return j < 3 ? item<uint32_t>(args, args.scale, block * 3 + j, row)
                         : halves(args, args.second, args.third, block, row);
        });
    }

    /// Bytes: scales and minima of the tile's four runs.
    uint32_t scales[2], minima[2];
    float d[2], dmin[2];
    QK_DEVICE Q4K(const WeightOnlyArgs&, const Raw& raw, int tile) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            const uint32_t a = of_quad(raw.w[r], 0), b = of_quad(raw.w[r], 1);
            const uint32_t c = of_quad(raw.w[r], 2), both = of_quad(raw.w[r], 3);
            const bool late = tile % 2 != 0;  // the second half of a block
            scales[r] = late ? (c & 0x0F0F0F0F) | (a >> 2 & 0x30303030) : a & 0x3F3F3F3F;
            minima[r] = late ? (c >> 4 & 0x0F0F0F0F) | (b >> 2 & 0x30303030) : b & 0x3F3F3F3F;
            d[r] = half_bits(both);
            dmin[r] = half_bits(both >> 16);
        }
    }

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int run, int) const {
        return {d[r] * float(scales[r] >> 8 * run & 0xFF),
                dmin[r] * float(minima[r] >> 8 * run & 0xFF)};
    }
};

/// q2_k: a byte for 16 features, scale in the low nibble, minimum in the high one. Lane j has the
/// bytes of runs 4j .. 4j + 3.
struct Q2K : Quad<16, true, 2> {
    struct Raw {
        uint32_t w[2], d[2];
    };
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        of_rows(raw.w, args, rows, [&](int row) {
            const int at = tile * 16 + lane_index() % 4 * 4;
            uint32_t four = 0;
            QK_UNROLL
            for (int i = 0; i < 4; i++) {
                four |= item<uint8_t>(args, args.scale, at + i, row) << 8 * i;
            }
            return four;
        });
        of_rows(raw.d, args, rows,
                [&](int row) { return halves(args, args.second, args.third, tile, row); });
    }

    const Raw& raw;
    uint32_t four[2];
    QK_DEVICE Q2K(const WeightOnlyArgs&, const Raw& fetched, int) : raw(fetched), four{} {}

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int run, int) {
        if (run % 4 == 0) {
            four[r] = of_quad(raw.w[r], run / 4);
        }
        const uint32_t both = four[r] >> 8 * (run % 4);
        return {half_bits(raw.d[r]) * float(both & 15),
                half_bits(raw.d[r] >> 16) * float(both >> 4 & 15)};
    }
};

/// q3_k: 6 bits for 16 features. Lane j < 3 has word j of a block's three, lane 3 d.
struct Q3K : Quad<16, false, 2> {
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        const int j = lane_index() % 4;
        of_rows(raw.w, args, rows, [&](int row) {
            return j < 3 ? item<uint32_t>(args, args.scale, tile * 3 + j, row)
                         : item<uint16_t>(args, args.second, tile, row);
        });
    }

    /// low: nibbles of runs 0-7 (low) and 8-15 (high), four a word; high: pairs of bits.
    uint32_t low[2][2], high[2];
    float d[2];
    QK_DEVICE Q3K(const WeightOnlyArgs&, const Raw& raw, int) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            low[r][0] = of_quad(raw.w[r], 0);
            low[r][1] = of_quad(raw.w[r], 1);
            high[r] = of_quad(raw.w[r], 2);
            d[r] = half_bits(of_quad(raw.w[r], 3));
        }
    }

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int run, int) const {
        const uint32_t nibble = low[r][run / 4 % 2] >> (run % 4 * 8 + run / 8 * 4) & 15;
        const uint32_t top = high[r] >> (run % 4 * 8 + run / 4 * 2) & 3;
        return {signed_six(d[r], nibble, top), 0};
    }
};

/// q6_k: int8 for 16 features, half a block a tile. Lane j has runs 2j and 2j + 1, and d above.
struct Q6K : Quad<8, false, 4> {
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        const int at = tile * 8 + lane_index() % 4 * 2;
        of_rows(raw.w, args, rows, [&](int row) {
            return item<uint8_t>(args, args.scale, at, row) |
                   item<uint8_t>(args, args.scale, at + 1, row) << 8 |
                   item<uint16_t>(args, args.second, tile / 2, row) << 16;
        });
    }

    Raw raw;
    uint32_t two[2];
    QK_DEVICE Q6K(const WeightOnlyArgs&, const Raw& fetched, int) : raw(fetched), two{} {}

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int run, int) {
        if (run % 2 == 0) {
            two[r] = of_quad(raw.w[r], run / 2);
        }
        const float scale = float(int8_t(two[r] >> 8 * (run % 2) & 0xFF));
        return {half_bits(raw.w[r] >> 16) * scale, 0};
    }
};

/// iq4_xs: 6 bits for 32 features. Even lanes have a block's low nibbles, odd ones d and, above,
/// the pairs of top bits.
struct Iq4Xs : Quad<4, false, 2> {
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        of_rows(raw.w, args, rows, [&](int row) {
            return lane_index() % 2 == 0 ? item<uint32_t>(args, args.scale, tile / 2, row)
                                         : halves(args, args.second, args.third, tile / 2, row);
        });
    }

    uint32_t low[2], high[2];
    float d[2];
    QK_DEVICE Iq4Xs(const WeightOnlyArgs&, const Raw& raw, int tile) {
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            const uint32_t both = of_quad(raw.w[r], 1);
            low[r] = of_quad(raw.w[r], 0) >> tile % 2 * 16;
            high[r] = both >> (16 + tile % 2 * 8);
            d[r] = half_bits(both);
        }
    }

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int run, int) const {
        const uint32_t nibble = low[r] >> run * 4 & 15, top = high[r] >> run * 2 & 3;
        return {signed_six(d[r], nibble, top), 0};
    }
};

/// SpQR: 3-bit codes of scale and zero point for a group of a row, and what they mean for a group
/// of `row_group` rows, s_s, z_s, s_z, z_z. Runs are slices, so groups of any size will do. Lane j
/// has runs j * SCALE_GROUPS / 4 and on.
///
///   weight = scale * (code - zero) = scale * code - minus, zero points being no integers
template <int SCALE_GROUPS>
struct TwoLevel : Quad<SCALE_GROUPS, true, 2> {
    using typename Quad<SCALE_GROUPS, true, 2>::Rows;
    static constexpr bool kOutliers = true;
    static constexpr int kOwn = SCALE_GROUPS / 4;

    /// stats: a byte a run.
    struct Raw {
        uint32_t stats[2];
        Words2 second[2][kOwn];
    };
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        raw.stats[0] = raw.stats[1] = 0;
        QK_UNROLL
        for (int i = 0; i < kOwn; i++) {
            int slice = tile * SCALE_GROUPS + i * 4 + lane_index() % 4;
            const int slices = (args.kp + 15) / 16;
            slice = slice < slices ? slice : slices - 1;
            const int group = args.slice_group != nullptr ? load_global(args.slice_group + slice)
                              : args.shift >= 0           ? slice * 16 >> args.shift
                                                          : slice * 16 / args.group;
            QK_UNROLL
            for (int r = 0; r < 2; r++) {
                raw.second[r][i] = {};
                if (rows.row[r] < args.n) {
                    raw.stats[r] |= item<uint8_t>(args, args.scale, group, rows.row[r]) << 8 * i;
                    const int row_groups = (args.n + args.row_group - 1) / args.row_group;
                    const int64_t at = int64_t(group) * row_groups + rows.row[r] / args.row_group;
                    raw.second[r][i] = load_global(static_cast<const Words2*>(args.second) + at);
                }
            }
        }
    }

    const Raw& raw;
    float scale[2], minus[2];  // of this lane's run among the four in use
    QK_DEVICE TwoLevel(const WeightOnlyArgs&, const Raw& fetched, int)
        : raw(fetched), scale{}, minus{} {}

    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int run, int) {
        if (run % 4 == 0) {
            const uint32_t stat = raw.stats[r] >> 8 * (run / 4);
            const Words2 of = raw.second[r][run / 4];
            scale[r] = half_bits(of.w[0]) * (float(stat & 7) - half_bits(of.w[1]));
            minus[r] = scale[r] * (half_bits(of.w[0] >> 16) *
                                   (float(stat >> 3 & 7) - half_bits(of.w[1] >> 16)));
        }
        return {of_quad(scale[r], run % 4), of_quad(minus[r], run % 4)};
    }
};

}  // namespace qk
