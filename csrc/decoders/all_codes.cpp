// Decodes words on the host, for a test that compares every code with the Python reference.
#include "dispatch.h"

namespace qk {
namespace {

template <typename T, int CODE>
void decode(const uint32_t* words, const uint32_t* high, const Table& table, int count, float zero,
            uint32_t* out) {
    using D = DecoderOf<T, CODE>;
    for (int i = 0; i < count; i++) {
        uint32_t pairs[D::kPairs];
        D::split(words[i], high[i], table, pairs);
        for (int s = 0; s < D::kPairs; s++) {
            out[i * D::kPairs + s] = D::finish(pairs[s], D::offset(zero));
        }
    }
}

using Function = void (*)(const uint32_t*, const uint32_t*, const Table&, int, float, uint32_t*);
template <typename T>
Function find(int code) {
#define QK_DECODE(CODE, ...) decode<T, CODE>,
    const Function all[] = {QK_CODES(QK_DECODE)};
#undef QK_DECODE
    return all[code];
}

}  // namespace
}  // namespace qk

/// words, high (count); out (count, pairs of a word), each two values of the 16-bit type.
extern "C" void qk_decode(int code, int is_bfloat, const uint32_t* words, const uint32_t* high,
                          const uint32_t* table, int count, float zero, uint32_t* out) {
    qk::Table entries;
    memcpy(entries.w, table, sizeof entries.w);
    const auto decode = is_bfloat ? qk::find<qk::BFloat>(code) : qk::find<qk::Half>(code);
    decode(words, high, entries, count, zero, out);
}

/// float32 -> the 16-bit type -> float32, in place: the conversions themselves.
extern "C" void qk_round(int is_bfloat, float* values, int count) {
    for (int i = 0; i < count; i++) {
        values[i] = is_bfloat ? qk::to_float(qk::from_float<qk::BFloat>(values[i]))
                              : qk::to_float(qk::from_float<qk::Half>(values[i]));
    }
}
