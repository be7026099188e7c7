// Decodes words on the host, for a test that compares every code with the Python reference. It runs
// in one thread of the emulator, because codebooks are in shared memory.
//
// The test defines QK_CODES(X): X(class) for the decoder of each row of qkernels/layouts/codecs.py.
#include "e8p.h"

namespace qk {
namespace {

template <typename D>
void decode(const uint32_t* words, const uint32_t* high, const Table& table, int count, float zero,
            uint32_t* out) {
    for (int i = 0; i < count; i++) {
        uint32_t pairs[D::kPairs];
        D::split(words[i], high[i], table, pairs);
        for (int s = 0; s < D::kPairs; s++) {
            out[i * D::kPairs + s] = D::finish(pairs[s], D::offset(zero));
        }
    }
}

/// Decodes in the emulator. The first words of `table` are the codebook, if there is one.
template <typename D>
std::string run(const uint32_t* words, const uint32_t* high, const uint32_t* table, int count,
                float zero, uint32_t* out) {
    constexpr int book = D::kBook;
    return emulation::Machine::get().launch({1, 1, 1}, {32, 1, 1}, book * 4, [=] {
        auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
        Table entries = {{}, shared};
        if (thread_index() == 0) {
            for (int i = 0; i < book; i++) {
                store_shared(shared + i, table[i]);
            }
            if (D::kTable) {
                memcpy(entries.w, table, sizeof entries.w);
            }
            decode<D>(words, high, entries, count, zero, out);
        }
    });
}

using Function = std::string (*)(const uint32_t*, const uint32_t*, const uint32_t*, int, float,
                                 uint32_t*);
template <typename T>
Function find(int code) {
#define QK_RUN(...) run<__VA_ARGS__>,
    const Function all[] = {QK_CODES(QK_RUN)};
#undef QK_RUN
    return all[code];
}

}  // namespace
}  // namespace qk

/// words, high: (count). table: 8 words, or a codebook. out: (count, pairs of a word), each pair
/// two values of the 16-bit type. Returns the emulator's error message, or "".
extern "C" const char* qk_decode(int code, int is_bfloat, const uint32_t* words,
                                 const uint32_t* high, const uint32_t* table, int count, float zero,
                                 uint32_t* out) {
    static std::string error;
    const auto run = is_bfloat ? qk::find<qk::BFloat>(code) : qk::find<qk::Half>(code);
    error = run(words, high, table, count, zero, out);
    return error.c_str();
}

/// float32 -> the 16-bit type -> float32, in place: tests the conversions.
extern "C" void qk_round(int is_bfloat, float* values, int count) {
    for (int i = 0; i < count; i++) {
        values[i] = is_bfloat ? qk::to_float(qk::from_float<qk::BFloat>(values[i]))
                              : qk::to_float(qk::from_float<qk::Half>(values[i]));
    }
}
