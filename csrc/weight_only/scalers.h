// Scalers: they read the scale and the zero point of (row, feature).
//
// A kernel is compiled for one scaler class, such as `Plain`. A lane has two rows of W, rows q and
// q + 8 of its warp's 16. Members of a scaler class:
//
//   kGroups     scale groups in a tile of one row, 0 for any number
//   kHasMin     weight = scale * value - zero, instead of scale * (value - zero)
//   kElements   the gemm scales each weight, because scale groups are short; otherwise it scales
//               the sum of a scale group
//   kOutliers   sparse weights are added
//   kDepth      tiles that a warp of the gemv has in flight
//   Rows        what is the same for all tiles of the two rows
//   Raw         registers that `fetch` fills
//   fetch       loads, and does nothing else, so it can run long before the scales are used
//   (object)    the scales of one tile while it is multiplied. All lanes of a warp construct it and
//               call `get` together, for one scale group after another
//
// `Plain` is the scaler of GPTQ, bitsandbytes and FP8: of the kinds that have `AnyPlain` in
// qkernels/layouts/codecs.py. The kind (`Scaling`) is the same for every thread, so its
// branches cost little and one kernel serves all kinds. quad_scalers.h has the other
// scalers.
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

/// The scales of one output row.
class RowScales {
  public:
    QK_DEVICE RowScales(const WeightOnlyArgs& args, int row)
        : live_(row < args.n),
          row_(row / args.row_group),
          stride_((args.n + args.row_group - 1) / args.row_group),
          flat_(int64_t(row) * args.k) {}

    /// kk: feature in kernel order; a feature past the last one reads the scale of the last.
    QK_DEVICE RawScale fetch(const WeightOnlyArgs& args, int kk) const {
        if (!live_) {
            return {0, 0};
        }
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

    bool live_;
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
    static constexpr int kDepth = SCALE_GROUPS == 1 || SCALE_GROUPS == 2 ? 4 : 2;

    struct Rows {
        RowScales scales[2];
        QK_DEVICE Rows(const WeightOnlyArgs& args, int first)
            : scales{RowScales(args, first), RowScales(args, first + 8)} {}
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

}  // namespace qk
