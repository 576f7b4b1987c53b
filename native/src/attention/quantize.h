// Rows of heads rounded to int8, with a scale each.
#pragma once

#include <algorithm>
#include <limits>

#include "mask/query_tile.h"
#include "simd/transpose.h"

namespace qkv {
namespace QKV_ISA {

// Rounds a row to i8: to = from / scale, where scale, which is returned, is a 127th of its largest number.
static inline float quantize_row(Dtype dtype, const char* from, int64_t width, int8_t* to) {
    constexpr float ROUNDING = 12582912.0f;  // Adding 1.5 * 2^23 rounds to the nearest integer.
    const int64_t item = size_of(dtype);
    vec abs_max = {};
    for_columns(width, [&](int64_t d, int64_t count) {
        const vec x = load_part(dtype, from + d * item, count), size = x < 0.0f ? -x : x;
        abs_max = size > abs_max ? size : (size == size ? abs_max : size);  // NaN stays
    });
    float scale = 0;
    for (int i = 0; i < LANES; ++i) scale = abs_max[i] > scale || abs_max[i] != abs_max[i] ? abs_max[i] : scale;
    scale /= 127.0f;
    const float divisor = std::max(scale, std::numeric_limits<float>::min());
    for_columns(width, [&](int64_t d, int64_t count) {
        const vec x = load_part(dtype, from + d * item, count) / divisor + ROUNDING - ROUNDING;
        for (int64_t i = 0; i < count; ++i) to[d + i] = x[i] == x[i] ? (int8_t)x[i] : 0;
    });
    return scale;
}

}  // namespace QKV_ISA
}  // namespace qkv
