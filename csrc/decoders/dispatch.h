// The number of every kind of code, and its decoder.
#pragma once
#include "decoders.h"
#include "e8p.h"

/// Every kind of code with its decoder for T. tests/cuda/test_decoders.py has the same order.
#define QK_CODES(X)                     \
    X(kLinear2, Linear<T, 2>)           \
    X(kLinear3, Linear<T, 3>)           \
    X(kLinear4, Linear<T, 4>)           \
    X(kLinear8, Linear<T, 8>)           \
    X(kLut16, Lut16<T>)                 \
    X(kE4M3, Float8<T, 4>)              \
    X(kE5M2, Float8<T, 5>)              \
    X(kSigned3, Signed<T, 3>)           \
    X(kSigned4, Signed<T, 4>)           \
    X(kSigned5, Signed<T, 5>)           \
    X(kSigned6, Signed<T, 6>)           \
    X(kSigned8, Signed<T, 8>)           \
    X(kUnsigned2, Unsigned<T, 2>)       \
    X(kUnsigned3, Unsigned<T, 3>)       \
    X(kUnsigned4, Unsigned<T, 4>)       \
    X(kUnsigned5, Unsigned<T, 5>)       \
    X(kHalfInteger2, HalfInteger<T, 2>) \
    X(kHalfInteger3, HalfInteger<T, 3>) \
    X(kHalfInteger4, HalfInteger<T, 4>) \
    X(kE8p2, E8p<T>)                    \
    X(kE8p3, E8pResidual<T, 3>)         \
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
