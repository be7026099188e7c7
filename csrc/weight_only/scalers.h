// Scalers: they read the scale and the zero point of (row, feature).
//
// A kernel is compiled for one scaler class, such as `Plain`. A lane has two rows of W, rows q and
// q + 8 of its warp's 16. Members of a scaler class:
//
//   kGroups     scale groups in a tile of one row, 0 for any number
//   kHasMin     weight = scale * value - zero, instead of scale * (value - zero)
//   kHasZero    whether there may be a zero point
//   kElements   the gemm scales each weight, because scale groups are short; otherwise it scales
//               the sum of a scale group
//   kOutliers   sparse weights are added
//   kHalfScales whether scales are float16 where x is: the Hopper kernel multiplies by them in 16
//               bits
//   Rows        what is the same for all tiles of two rows, which must exist
//   Raw         registers that `fetch` fills
//   fetch       loads, and does nothing else, so it can run long before the scales are used
//   take        makes the object hold the scales of one tile; all lanes of a warp call it together
//   get         the scales of a scale group; all lanes call it together, for one group after
//   another
// In the decode kernel for one row of x the four lanes share the slices of a tile: lane j has
// slices 2j and 2j + 1 of each eight. `Plain` has no such kernel.
//
//   Own, fetch_own, own  registers, their loads, and the scales of a row (0 or 1) for slice
//               8 half + 2j + odd
//   own_halves, own_odd  whether these depend on the half, and on `odd`, if a tile has `slices`
//
// `Plain` and `Grouped` are the scalers of GPTQ, bitsandbytes and FP8: of the kinds that have a
// `Scaling` in qkernels/layouts/codecs.py. `Grouped` is compiled for one kind. `Plain` looks at the
// kind at run time, and serves what is rare: see launch.h. quad_scalers.h has the other scalers.
//
#pragma once
#include "../ptx/arithmetic.h"
#include "../ptx/warp.h"
#include "arguments.h"

namespace qk {

/// As loaded. bits: the scale, or its 8-bit code. other: the outer scale, or the zero point.
struct RawScale {
    uint32_t bits, other;
};
struct ScaleZero {
    float scale, zero;
};

/// x / divisor, by the number that qkernels/backends/cuda/calls.py makes of the divisor. x < 2^24
/// and x * divisor < 2^30, as for the scale groups of up to 2^19 features.
QK_DEVICE int divided(int x, uint32_t divisor) { return multiply_high(2 * x + 1, divisor); }

/// The number of the rows' group, which share scales, that `row` is in. For long groups `divided`
/// may be one more.
QK_DEVICE int row_group_of(const WeightOnlyArgs& args, int row) {
    const int group = divided(row, args.row_divisor);
    return group - int(group * args.row_group > row);
}

/// The scales of one output row.
class RowScales {
  public:
    RowScales() = default;
    QK_DEVICE RowScales(const WeightOnlyArgs& args, int row)
        : row_(row / args.row_group),
          stride_((args.n + args.row_group - 1) / args.row_group),
          flat_(int64_t(row) * args.k) {}

    /// kk: feature in kernel order; a feature past the last one reads the scale of the last.
    QK_DEVICE RawScale fetch(const WeightOnlyArgs& args, int kk) const {
        kk = kk < args.kp ? kk : args.kp - 1;
        int64_t at;
        if (args.scaling == kScaleFlat || args.scaling == kNestedFlat) {
            at = block(args, kk);
        } else if (args.slice_group != nullptr) {
            at = int64_t(load_global(args.slice_group + kk / 16)) * stride_ + row_;
        } else {
            at = int64_t(args.shift >= 0 ? kk >> args.shift : kk / args.group) * stride_ + row_;
        }
        if (args.scaling == kNested || args.scaling == kNestedFlat) {
            const float outer = item<float>(args, 2, block(args, kk) / 256);
            return {item<uint8_t>(args, 0, at), float_to_bits(outer)};
        }
        const uint32_t zero = args.scaling == kGroup ? item<uint8_t>(args, 1, at) : 0;
        if (args.scale_type == kFloat32) {
            return {item<uint32_t>(args, 0, at), zero};
        }
        return {item<uint16_t>(args, 0, at), zero};
    }

    QK_DEVICE static ScaleZero finish(const WeightOnlyArgs& args, const RawScale& raw) {
        if (args.scaling == kNested || args.scaling == kNestedFlat) {
            const float inner = item<float>(args, 1, raw.bits) * bits_to_float(raw.other);
            return {inner + item<float>(args, 3, 0), 0};
        }
        const float zero = float(raw.other);
        if (args.scale_type == kFloat16) {
            return {to_float(Half{uint16_t(raw.bits)}), zero};
        }
        return {bits_to_float(args.scale_type == kBFloat16 ? raw.bits << 16 : raw.bits), zero};
    }

  private:
    /// Item `at` of the scaler's tensor number `tensor`.
    template <typename V>
    QK_DEVICE static V item(const WeightOnlyArgs& args, int tensor, int64_t at) {
        return load_global(static_cast<const V*>(args.scaler[tensor]) + at);
    }

    int row_, stride_;
    int64_t flat_;

    /// Index of the quantization block in the flattened matrix.
    QK_DEVICE int64_t block(const WeightOnlyArgs& args, int kk) const {
        return args.shift >= 0 ? (flat_ + kk) >> args.shift : (flat_ + kk) / args.group;
    }
};

/// `fetch` and `finish` in one call, not inlined: for weights whose scales change so often that the
/// kernel looks them up when it needs them.
QK_NOINLINE ScaleZero scale_at(const WeightOnlyArgs* args, RowScales scales, int kk) {
    return RowScales::finish(*args, scales.fetch(*args, kk));
}

/// Any kind of `Plain` scales. With 1, 2 or 4 SCALE_GROUPS in a tile, the scales are loaded with
/// the codes. With 0, they are looked up when they are needed, for each weight if need be.
template <int SCALE_GROUPS>
struct Plain {
    static constexpr int kGroups = SCALE_GROUPS, kLoaded = SCALE_GROUPS == 0 ? 1 : SCALE_GROUPS;
    static constexpr bool kHasMin = false, kElements = false, kOutliers = false;
    static constexpr bool kHasZero = true, kHalfScales = false;

    struct Rows {
        RowScales scales[2];
        Rows() = default;
        QK_DEVICE Rows(const WeightOnlyArgs& args, int first, int second)
            : scales{RowScales(args, first), RowScales(args, second)} {}
    };
    struct Raw {
        RawScale scales[2][kLoaded];
    };

    /// features: features of a tile.
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int features) {
        if (SCALE_GROUPS > 0) {
            QK_UNROLL
            for (int r = 0; r < 2; r++) {
                QK_UNROLL
                for (int i = 0; i < kLoaded; i++) {
                    raw.scales[r][i] =
                        rows.scales[r].fetch(args, tile * features + i * (features / kLoaded));
                }
            }
        }
    }

    Raw raw;
    QK_DEVICE void take(const WeightOnlyArgs&, const Raw& fetched, int) { raw = fetched; }

    /// The scale of row r (0 or 1). group: scale group of the tile; kk: its first feature.
    QK_DEVICE ScaleZero get(const WeightOnlyArgs& args, const Rows& rows, int r, int group,
                            int kk) const {
        return SCALE_GROUPS == 0 ? scale_at(&args, rows.scales[r], kk)
                                 : RowScales::finish(args, raw.scales[r][group]);
    }
};

/// Scales of kind KIND, in 16 bits if there are zero points. Their groups follow one another along
/// K: SCALE_GROUPS in a tile, 1, 2 or 4, or fewer than one.
template <int SCALE_GROUPS, int KIND>
struct Grouped {
    static_assert(KIND == kGroup || KIND == kScale || KIND == kNested, "");
    static constexpr int kGroups = SCALE_GROUPS;
    static constexpr bool kHasMin = false, kElements = false, kOutliers = false;
    static constexpr bool kHasZero = KIND == kGroup, kHalfScales = KIND == kGroup;

    /// The scales of the first group of each row, and its zero points or, for nested scales, the
    /// row's first block in the flattened matrix. Zero points belong to one row each.
    struct Rows {
        const unsigned char *scales[2], *zeros[2];
        int first[2];
        Rows() = default;
        QK_DEVICE Rows(const WeightOnlyArgs& args, int first_row, int second_row) {
            QK_UNROLL
            for (int r = 0; r < 2; r++) {
                const int row = r == 0 ? first_row : second_row;
                const int column = KIND == kGroup ? row : row_group_of(args, row);
                scales[r] = static_cast<const unsigned char*>(args.scaler[0]) +
                            int64_t(column) * scale_bytes(args);
                zeros[r] = static_cast<const unsigned char*>(args.scaler[1]) + column;
                first[r] = KIND == kNested ? column * (args.last_group + 1) : 0;
            }
        }
    };
    QK_DEVICE static int scale_bytes(const WeightOnlyArgs& args) {
        return KIND == kNested ? 1 : KIND == kScale && args.scale_type == kFloat32 ? 4 : 2;
    }
    /// other: the zero point, or the outer scale.
    struct Raw {
        uint32_t bits[SCALE_GROUPS][2], other[SCALE_GROUPS][2];
    };

    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        QK_UNROLL
        for (int g = 0; g < SCALE_GROUPS; g++) {
            load(raw.bits[g], raw.other[g], args, rows, tile * SCALE_GROUPS + g);
        }
    }
    /// Loads the scales of both rows for scale group `number`.
    QK_DEVICE static void load(uint32_t (&bits)[2], uint32_t (&other)[2],
                               const WeightOnlyArgs& args, const Rows& rows, int number) {
        number = divided(number, args.group_divisor);
        const int group = number < args.last_group ? number : args.last_group;
        const int64_t at = int64_t(group) * args.scale_stride;
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            const unsigned char* const scale =
                rows.scales[r] + int64_t(group) * args.scale_row_bytes;
            if (KIND == kNested) {
                bits[r] = load_global(scale);
                other[r] = load_global(static_cast<const uint32_t*>(args.scaler[2]) +
                                       ((rows.first[r] + group) >> 8));
            } else if (KIND == kScale && args.scale_type == kFloat32) {
                bits[r] = load_global(reinterpret_cast<const uint32_t*>(scale));
            } else {
                bits[r] = load_global(reinterpret_cast<const uint16_t*>(scale));
            }
            if (KIND == kGroup) {
                other[r] = load_global(rows.zeros[r] + at);
            }
        }
    }

    struct Own {
        uint32_t bits[SCALE_GROUPS == 1 ? 1 : 2][2], other[SCALE_GROUPS == 1 ? 1 : 2][2];
    };
    QK_HOST_DEVICE static constexpr bool own_halves(int slices) {
        return SCALE_GROUPS > 1 && slices > 8;
    }
    QK_HOST_DEVICE static constexpr bool own_odd(int slices) { return slices == SCALE_GROUPS; }
    QK_DEVICE static void fetch_own(Own& raw, const WeightOnlyArgs& args, const Rows& rows,
                                    int tile, int features) {
        const int slices = features / 16, j = lane_index() % 4;
        const bool halves = own_halves(slices);
        QK_UNROLL
        for (int i = 0; i < (halves || own_odd(slices) ? 2 : 1); i++) {
            const int slice = (halves ? i * 8 + j * 2 : j * 2 + i) % slices;
            load(raw.bits[i], raw.other[i], args, rows,
                 tile * SCALE_GROUPS + slice * SCALE_GROUPS / slices);
        }
    }
    QK_DEVICE static ScaleZero own(const WeightOnlyArgs& args, const Own& raw, int r, int half,
                                   int odd, int) {
        const int i = SCALE_GROUPS == 1 ? 0 : half + odd;
        return {scale_of(args, raw.bits[i][r], raw.other[i][r]),
                KIND == kGroup ? float(raw.other[i][r]) : 0};
    }

    ScaleZero scales[SCALE_GROUPS][2];
    QK_DEVICE void take(const WeightOnlyArgs& args, const Raw& raw, int) {
        QK_UNROLL
        for (int i = 0; i < SCALE_GROUPS * 2; i++) {
            const int g = i / 2, r = i % 2;
            scales[g][r] = {scale_of(args, raw.bits[g][r], raw.other[g][r]),
                            KIND == kGroup ? float(raw.other[g][r]) : 0};
        }
    }
    QK_DEVICE static float scale_of(const WeightOnlyArgs& args, uint32_t bits, uint32_t other) {
        if (KIND == kNested) {
            const float* const map = static_cast<const float*>(args.scaler[1]);
            const float offset = load_global(static_cast<const float*>(args.scaler[3]));
            return load_global(map + bits) * bits_to_float(other) + offset;
        }
        if (args.scale_type == kFloat16) {
            return to_float(Half{uint16_t(bits)});
        }
        return bits_to_float(KIND == kGroup || args.scale_type == kBFloat16 ? bits << 16 : bits);
    }
    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int group, int) const {
        return scales[group][r];
    }
};

}  // namespace qk
