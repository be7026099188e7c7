// Scalers: where the scale and the zero point of (row, feature) come from.
//
// A kernel is compiled for one class like `Plain`. Of a lane's two rows, q and q + 8 of its warp's
// 16:
//
//   kGroups       scales of a tile and row, 0 for any number
//   kHasMin      weight = scale * value - zero, instead of scale * (value - zero)
//   kElements   the gemm scales each weight (runs are short), not sums of a run
//   kOutliers   sparse weights are added
//   kDepth      tiles that a warp of the gemv has on their way
//   Rows        what stays the same for all tiles
//   fetch       only loads, so that it can be done long before
//   a value     of the class itself: the scales of one tile while it is used. All lanes of a warp
//   make
//               it and `get` of it together, run after run.
//
// `Plain` has the scalers of GPTQ, bitsandbytes and FP8. Which of them is the same for every
// thread, so its branches cost little and no kernel is compiled per kind. quad_scalers.h has the
// others.
#pragma once
#include "../ptx/arithmetic.h"
#include "../ptx/memory.h"
#include "arguments.h"

namespace qk {

/// As loaded: bits of the scale or its 8-bit code; bits of the outer scale or the zero point.
struct RawScale {
    uint32_t bits, other;
};
struct ScaleZero {
    float scale, zero;
};

/// The scales of one output row.
class RowScales {
  public:
    QK_DEVICE RowScales(const WeightOnlyArgs& args, int row)
        : live_(row < args.n),
          row_(row / args.row_group),
          stride_((args.n + args.row_group - 1) / args.row_group),
          flat_(int64_t(row) * args.k) {}

    /// kk: feature in kernel order; past the last one it stands for the last.
    QK_DEVICE RawScale fetch(const WeightOnlyArgs& args, int kk) const {
        if (!live_) {
            return {0, 0};
        }
        const bool flat = args.scaling == kScaleFlat || args.scaling == kNestedFlat;
        const bool nested = args.scaling == kNested || args.scaling == kNestedFlat;
        kk = kk < args.kp ? kk : args.kp - 1;
        int64_t at;
        if (flat) {
            at = block(args, kk);
        } else if (args.slice_group != nullptr) {
            at = int64_t(load_global(args.slice_group + kk / 16)) * stride_ + row_;
        } else {
            at = int64_t(args.shift >= 0 ? kk >> args.shift : kk / args.group) * stride_ + row_;
        }
        if (nested) {
            const float outer = load_global(args.nested_outer + block(args, kk) / 256);
            return {load_global(static_cast<const uint8_t*>(args.scale) + at),
                    float_to_bits(outer)};
        }
        const uint32_t zero = args.scaling == kGroup ? load_global(args.zero + at) : 0;
        if (args.scale_type == kFloat32) {
            return {load_global(static_cast<const uint32_t*>(args.scale) + at), zero};
        }
        return {load_global(static_cast<const uint16_t*>(args.scale) + at), zero};
    }

    QK_DEVICE static ScaleZero finish(const WeightOnlyArgs& args, const RawScale& raw) {
        if (args.scaling == kNested || args.scaling == kNestedFlat) {
            const float inner = load_global(args.nested_map + raw.bits) * bits_to_float(raw.other);
            return {inner + load_global(args.nested_offset), 0};
        }
        const float zero = float(raw.other);
        if (args.scale_type == kFloat16) {
            return {to_float(Half{uint16_t(raw.bits)}), zero};
        }
        return {bits_to_float(args.scale_type == kBFloat16 ? raw.bits << 16 : raw.bits), zero};
    }

  private:
    bool live_;
    int row_, stride_;
    int64_t flat_;

    /// Number of the block in the flattened matrix.
    QK_DEVICE int64_t block(const WeightOnlyArgs& args, int kk) const {
        return args.shift >= 0 ? (flat_ + kk) >> args.shift : (flat_ + kk) / args.group;
    }
};

/// Both in one, not inlined: for weights whose scales change so often that they are looked up as
/// needed.
QK_CALLED ScaleZero scale_at(const WeightOnlyArgs* args, RowScales scales, int kk) {
    return RowScales::finish(*args, scales.fetch(*args, kk));
}

/// Any of `Scaling`. SCALE_GROUPS of 1, 2, 4: loaded with the codes; 0: looked up when needed, if
/// need be for each weight.
template <int SCALE_GROUPS>
struct Plain {
    static constexpr int kGroups = SCALE_GROUPS, kHeld = SCALE_GROUPS == 0 ? 1 : SCALE_GROUPS;
    static constexpr bool kHasMin = false, kElements = false, kOutliers = false;
    static constexpr int kDepth = SCALE_GROUPS == 1 || SCALE_GROUPS == 2 ? 4 : 2;

    struct Rows {
        RowScales of[2];
        QK_DEVICE Rows(const WeightOnlyArgs& args, int first)
            : of{RowScales(args, first), RowScales(args, first + 8)} {}
    };
    struct Raw {
        RawScale of[2][kHeld];
    };

    /// features: of a tile.
    QK_DEVICE static void fetch(Raw& raw, const WeightOnlyArgs& args, const Rows& rows, int tile,
                                int features) {
        if (SCALE_GROUPS > 0) {
            QK_UNROLL
            for (int r = 0; r < 2; r++) {
                QK_UNROLL
                for (int i = 0; i < kHeld; i++) {
                    raw.of[r][i] = rows.of[r].fetch(args, tile * features + i * (features / kHeld));
                }
            }
        }
    }

    const Raw& raw;
    QK_DEVICE Plain(const WeightOnlyArgs&, const Raw& fetched, int) : raw(fetched) {}

    /// Of row r of the two; kk: the run's first feature.
    QK_DEVICE ScaleZero get(const WeightOnlyArgs& args, const Rows& rows, int r, int run,
                            int kk) const {
        return SCALE_GROUPS == 0 ? scale_at(&args, rows.of[r], kk)
                                 : RowScales::finish(args, raw.of[r][run]);
    }
};

}  // namespace qk
