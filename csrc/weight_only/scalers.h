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
//   kDepth      tiles that a warp of the gemv has in flight
//   Rows        what is the same for all tiles of two rows, which must exist
//   Raw         registers that `fetch` fills
//   fetch       loads, and does nothing else, so it can run long before the scales are used
//   (object)    the scales of one tile while it is multiplied. All lanes of a warp construct it and
//               call `get` together, for one scale group after another
//
// `Plain` and `Grouped` are the scalers of GPTQ, bitsandbytes and FP8: of the kinds that have a
// `Scaling` in qkernels/layouts/codecs.py. `Plain` looks at the kind at run time, so one kernel
// serves all of them. The decode kernel, whose speed depends on every instruction, has `Grouped`,
// which is compiled for one kind. quad_scalers.h has the other scalers.
//
#pragma once
#include "../ptx/arithmetic.h"
#include "../ptx/memory.h"
#include "arguments.h"

namespace qk {

/// As loaded. bits: the scale, or its 8-bit code. other: the outer scale, or the zero point.
struct RawScale {
    uint32_t bits, other;
};
struct ScaleZero {
    float scale, zero;
};

/// x / divisor for x < 2^24, by the number that qkernels/backends/cuda/calls.py makes of the divisor.
QK_DEVICE int divided(int x, uint32_t divisor) { return multiply_high(2 * x + 1, divisor); }

/// The scales of one output row.
class RowScales {
  public:
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
    static constexpr bool kHasZero = true;
    static constexpr int kDepth = SCALE_GROUPS == 1 || SCALE_GROUPS == 2 ? 4 : 2;

    struct Rows {
        RowScales scales[2];
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

    const Raw& raw;
    QK_DEVICE Plain(const WeightOnlyArgs&, const Raw& fetched, int) : raw(fetched) {}

    /// The scale of row r (0 or 1). group: scale group of the tile; kk: its first feature.
    QK_DEVICE ScaleZero get(const WeightOnlyArgs& args, const Rows& rows, int r, int group,
                            int kk) const {
        return SCALE_GROUPS == 0 ? scale_at(&args, rows.scales[r], kk)
                                 : RowScales::finish(args, raw.scales[r][group]);
    }
};

/// Scales of kind KIND, in 16 bits if there are zero points. Their groups follow one another along K: SCALE_GROUPS in a tile, 1, 2 or 4,
/// or fewer than one.
template <int SCALE_GROUPS, int KIND>
struct Grouped {
    static_assert(KIND == kGroup || KIND == kScale || KIND == kNested, "");
    static constexpr int kGroups = SCALE_GROUPS;
    static constexpr bool kHasMin = false, kOutliers = false, kHasZero = KIND == kGroup;

    /// The column of each row in the scales' tensor; of nested scales also the row's first block in
    /// the flattened matrix. Scales with zero points belong to one row each.
    struct Rows {
        int column[2], first[2];
        QK_DEVICE Rows(const WeightOnlyArgs& args, int first_row, int second_row)
            : column{first_row, second_row}, first{} {
            QK_UNROLL
            for (int r = 0; r < 2; r++) {
                if (KIND != kGroup) {
                    column[r] = divided(column[r], args.row_divisor);
                }
                first[r] = KIND == kNested ? column[r] * (args.last_group + 1) : 0;
            }
        }
    };
    /// other: the zero point, or the outer scale.
    struct Raw {
        uint32_t bits[SCALE_GROUPS][2], other[SCALE_GROUPS][2];
    };

    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int) {
        QK_UNROLL
        for (int g = 0; g < SCALE_GROUPS; g++) {
            const int number = divided(tile * SCALE_GROUPS + g, args.group_divisor);
            const int group = number < args.last_group ? number : args.last_group;
            const int at = group * args.scale_stride;
            if (KIND == kNested) {
                load<uint8_t>(raw.bits[g], args.scaler[0], at, rows);
                QK_UNROLL
                for (int r = 0; r < 2; r++) {
                    const int outer = (rows.first[r] + group) >> 8;
                    raw.other[g][r] =
                        load_global(static_cast<const uint32_t*>(args.scaler[2]) + outer);
                }
            } else if (KIND == kScale && args.scale_type == kFloat32) {
                load<uint32_t>(raw.bits[g], args.scaler[0], at, rows);
            } else {
                load<uint16_t>(raw.bits[g], args.scaler[0], at, rows);
            }
            if (KIND == kGroup) {
                load<uint8_t>(raw.other[g], args.scaler[1], at, rows);
            }
        }
    }
    /// Loads the scales of both rows from row `at` of the tensor.
    template <typename V>
    QK_DEVICE static void load(uint32_t (&to)[2], const void* tensor, int at, const Rows& rows) {
        const V* const from = static_cast<const V*>(tensor) + at;
        QK_UNROLL
        for (int r = 0; r < 2; r++) {
            to[r] = load_global(from + rows.column[r]);
        }
    }

    ScaleZero scales[SCALE_GROUPS][2];
    QK_DEVICE Grouped(const WeightOnlyArgs& args, const Raw& raw, int) {
        QK_UNROLL
        for (int i = 0; i < SCALE_GROUPS * 2; i++) {
            const int g = i / 2, r = i % 2;
            scales[g][r].zero = KIND == kGroup ? float(raw.other[g][r]) : 0;
            scales[g][r].scale = bits_to_float(raw.bits[g][r]);
            if (KIND == kNested) {
                const float* map = static_cast<const float*>(args.scaler[1]);
                const float* offset = static_cast<const float*>(args.scaler[3]);
                scales[g][r].scale = load_global(map + raw.bits[g][r]) *
                                         bits_to_float(raw.other[g][r]) +
                                     load_global(offset);
            }
        }
        if (KIND != kNested && args.scale_type == kFloat16) {
            QK_UNROLL
            for (int i = 0; i < SCALE_GROUPS * 2; i++) {
                scales[i / 2][i % 2].scale = to_float(Half{uint16_t(raw.bits[i / 2][i % 2])});
            }
        } else if (KIND != kNested && args.scale_type == kBFloat16) {
            QK_UNROLL
            for (int i = 0; i < SCALE_GROUPS * 2; i++) {
                scales[i / 2][i % 2].scale = bits_to_float(raw.bits[i / 2][i % 2] << 16);
            }
        }
    }
    QK_DEVICE ScaleZero get(const WeightOnlyArgs&, const Rows&, int r, int group, int) const {
        return scales[group][r];
    }
};

}  // namespace qk
