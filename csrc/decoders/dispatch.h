// From a number known at run time to a decoder's type.
#pragma once
#include "decoders.h"
#include "e8p.h"

namespace qk {

/// qkernels/backends/cuda/weight_only.py names them by the same numbers.
enum Code : int {
    kLinear2,
    kLinear3,
    kLinear4,
    kLinear8,
    kLut16,
    kE4M3,
    kE5M2,
    kHalfway2,
    kHalfway3,
    kHalfway4,
    kE8p2,
    kE8p3,
    kE8p4,
};

template <typename T, int CODE>
struct DecoderOf;
template <typename T>
struct DecoderOf<T, kLinear2> : Linear<T, 2> {};
template <typename T>
struct DecoderOf<T, kLinear3> : Linear<T, 3> {};
template <typename T>
struct DecoderOf<T, kLinear4> : Linear<T, 4> {};
template <typename T>
struct DecoderOf<T, kLinear8> : Linear<T, 8> {};
template <typename T>
struct DecoderOf<T, kLut16> : Lut16<T> {};
template <typename T>
struct DecoderOf<T, kE4M3> : Float8<T, 4> {};
template <typename T>
struct DecoderOf<T, kE5M2> : Float8<T, 5> {};
template <typename T>
struct DecoderOf<T, kHalfway2> : Halfway<T, 2> {};
template <typename T>
struct DecoderOf<T, kHalfway3> : Halfway<T, 3> {};
template <typename T>
struct DecoderOf<T, kHalfway4> : Halfway<T, 4> {};
template <typename T>
struct DecoderOf<T, kE8p2> : E8p<T, 2> {};
template <typename T>
struct DecoderOf<T, kE8p3> : E8pResidual<T, 3> {};
template <typename T>
struct DecoderOf<T, kE8p4> : E8pResidual<T, 4> {};

}  // namespace qk
