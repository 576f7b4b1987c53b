// The norm of one row by its root mean square (abi/rms_norm.h).
//
// Squares are summed in NORM_SUMS vectors side by side, an order that depends on the width alone, so a row has the same
// bits wherever it is computed. All else is rounded as by torch's operators.
#pragma once

#include <cmath>

#include "abi/rms_norm.h"
#include "simd/transpose.h"
#include "sizes.h"

namespace qkv {
namespace QKV_ISA {

template <class DtypeConstant>
static inline float sum_of_squares(DtypeConstant dtype, const char* x, int64_t width) {
    constexpr int64_t ITEM = size_of(DtypeConstant::value);
    vec sums[NORM_SUMS] = {};
    int64_t d = 0;
    for (; d + NORM_SUMS * LANES <= width; d += NORM_SUMS * LANES)
        for (int i = 0; i < NORM_SUMS; ++i) {
            const vec part = load_as(dtype, x + (d + i * LANES) * ITEM);
            sums[i] += part * part;
        }
    for (; d < width; d += LANES) {
        const vec part = load_part(dtype, x + d * ITEM, width - d);
        sums[0] += part * part;
    }
    for (int i = 1; i < NORM_SUMS; ++i) sums[0] += sums[i];
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += sums[0][i];
    return sum;
}

template <Gain GAIN, class DtypeConstant>
static inline void scale_row(const RmsNorm& n, DtypeConstant dtype, float factor, const char* x, char* out) {
    constexpr int64_t ITEM = size_of(DtypeConstant::value);
    for_columns(n.width, [&](int64_t d, int64_t count) {
        const vec y = load_part(dtype, x + d * ITEM, count) * factor;
        if (!n.gains) return store_part(dtype, out + d * ITEM, y, count);
        vec gain = load_part(dtype, (const char*)n.gains + d * ITEM, count);
        if constexpr (GAIN == Gain::one_more) gain = gain + 1.0f;
        store_part(dtype, out + d * ITEM, (GAIN == Gain::rounded ? round_to(dtype, y) : y) * gain, count);
    });
}

// Writes the norm of a row of x, which may be out.
static inline void rms_norm_row(const RmsNorm& n, const char* x, char* out) {
    for_dtype(n.dtype, [&](auto dtype) {
        const float mean = sum_of_squares(dtype, x, n.width) / (float)n.width;
        const float factor = 1.0f / std::sqrt(mean + n.eps);
        switch (n.gain) {
            case Gain::rounded: return scale_row<Gain::rounded>(n, dtype, factor, x, out);
            case Gain::widened: return scale_row<Gain::widened>(n, dtype, factor, x, out);
            case Gain::one_more: return scale_row<Gain::one_more>(n, dtype, factor, x, out);
        }
    });
}

}  // namespace QKV_ISA
}  // namespace qkv
