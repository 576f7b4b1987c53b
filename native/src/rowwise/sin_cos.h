// Sines and cosines of a vector of angles, however large.
#pragma once

#include <cmath>

#include "simd/vec.h"

namespace qkv {
namespace QKV_ISA {

struct SinCos {
    vec sin, cos;
};

constexpr float LARGEST_REDUCED = 2147483648.0f;  // 2^31: quarter turns are counted in 32 bits

// Both in fp64, so that only rounding to fp32 shows: within 0.501 ulp. What exceeds `LARGEST_REDUCED`, or is not
// finite, goes to the C library.
[[gnu::always_inline]] static inline SinCos sin_cos(vec angle) {
    using wide = double __attribute__((vector_size(LANES * 8)));

    const vec size = angle < 0.0f ? -angle : angle;
    const ivec is_small = size <= LARGEST_REDUCED;  // not so for NaN
    const wide x = __builtin_convertvector(is_small ? angle : vec{}, wide);

    // x = turns * pi / 2 + r, where |r| <= pi / 4. The first two parts of pi / 2 have 21 bits, so that their products
    // with a number of turns and what these leave of x are exact. Adding 1.5 * 2^52 rounds to the nearest integer.
    constexpr double HALF_PI[] = {0x1.921fbp+0, 0x1.5110ap-22, 0x1.4611a62633146p-42}, ROUNDING = 6755399441055744.0;
    const wide turns = (x * 0x1.45f306dc9c883p-1 + ROUNDING) - ROUNDING;
    const wide r = ((x - turns * HALF_PI[0]) - turns * HALF_PI[1]) - turns * HALF_PI[2];

    // Their Taylor series, cut off at 1e-11 of the whole.
    const wide z = r * r;
    wide s = z * (-1.0 / 39916800) + 1.0 / 362880;
    s = s * z - 1.0 / 5040;
    s = s * z + 1.0 / 120;
    s = s * z - 1.0 / 6;
    s = s * z * r + r;
    wide c = z * (1.0 / 479001600) - 1.0 / 3628800;
    c = c * z + 1.0 / 40320;
    c = c * z - 1.0 / 720;
    c = c * z + 1.0 / 24;
    c = c * z - 0.5;
    c = c * z + 1.0;

    const ivec quarter = __builtin_convertvector(turns, ivec);
    const ivec is_odd = (quarter & 1) != 0;
    const vec of_r = __builtin_convertvector(s, vec), of_rest = __builtin_convertvector(c, vec);
    const ivec sin_sign = (quarter & 2) << 30, cos_sign = ((quarter + 1) & 2) << 30;
    const ivec sin = (ivec)(is_odd ? of_rest : of_r) ^ sin_sign, cos = (ivec)(is_odd ? of_r : of_rest) ^ cos_sign;
    SinCos result = {(vec)sin, (vec)cos};
    if (any(~is_small))
        for (int i = 0; i < LANES; ++i) {
            if (is_small[i]) continue;
            result.sin[i] = (float)std::sin((double)angle[i]);
            result.cos[i] = (float)std::cos((double)angle[i]);
        }
    return result;
}

}  // namespace QKV_ISA
}  // namespace qkv
