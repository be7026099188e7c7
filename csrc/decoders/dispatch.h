// From a number known at run time to a decoder's type.
#pragma once
#include "decoders.h"
#include "e8p.h"

/// Every code, with the decoder that T's values come from; the tests name them in this order.
#define QK_CODES(X)               \
    X(kLinear2, Linear<T, 2>)     \
    X(kLinear3, Linear<T, 3>)     \
    X(kLinear4, Linear<T, 4>)     \
    X(kLinear8, Linear<T, 8>)     \
    X(kLut16, Lut16<T>)           \
    X(kE4M3, Float8<T, 4>)        \
    X(kE5M2, Float8<T, 5>)        \
    X(kCentered3, Centered<T, 3>) \
    X(kCentered4, Centered<T, 4>) \
    X(kCentered5, Centered<T, 5>) \
    X(kCentered6, Centered<T, 6>) \
    X(kCentered8, Centered<T, 8>) \
    X(kCounted2, Counted<T, 2>)   \
    X(kCounted3, Counted<T, 3>)   \
    X(kCounted4, Counted<T, 4>)   \
    X(kCounted5, Counted<T, 5>)   \
    X(kHalfway2, Halfway<T, 2>)   \
    X(kHalfway3, Halfway<T, 3>)   \
    X(kHalfway4, Halfway<T, 4>)   \
    X(kE8p2, E8p<T>)              \
    X(kE8p3, E8pResidual<T, 3>)   \
    X(kE8p4, E8pResidual<T, 4>)

namespace qk {

#define QK_NUMBER(CODE, ...) CODE,
enum Code : int { QK_CODES(QK_NUMBER) };
#undef QK_NUMBER

template <typename T, int CODE>
struct DecoderOf;
#define QK_DECODER(CODE, ...) \
    template <typename T>     \
    struct DecoderOf<T, CODE> : __VA_ARGS__ {};
QK_CODES(QK_DECODER)
#undef QK_DECODER

}  // namespace qk
