// AVX-512 with dot products of pairs of bf16.
#pragma once

#include "simd/avx512.h"

#define QKV_DOT_BF16
// Attention with neither bf16 nor int8 is as in avx512, which computes it (attention/kernel.cpp).
#define QKV_EXTENDS_BASE

namespace qkv {
namespace QKV_ISA {

// sum[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1].
static inline vec dot_bf16(vec sum, pair_vec a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)a);
}

static inline half_vec round_to_bf16(vec x) { return (half_vec)_mm512_cvtneps_pbh((__m512)x); }

// Pairs of the numbers in the same lanes.
static inline vec pair_bf16(vec low, vec high) {
    alignas(64) static constexpr uint16_t ORDER[2 * LANES] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31,
    };
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (vec)_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), halves);
}

}  // namespace QKV_ISA
}  // namespace qkv
