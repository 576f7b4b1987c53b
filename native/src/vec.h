// A vector of floats as wide as the instruction set, from the compiler's vector extensions.
// Intrinsics stand only where no extension exists: rounding, power-of-two scaling, 16-bit conversions and dot products.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace qkv {
namespace QKV_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

static inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

static inline vec set1(float x) { return vec{} + x; }

// The larger of the two; b where a is NaN.
static inline vec max(vec a, vec b) { return a > b ? a : b; }

static inline bool any(ivec mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
    int32_t seen = 0;
    for (int i = 0; i < LANES; ++i) seen |= mask[i];
    return seen != 0;
#endif
}

// 2^x with a relative error of 1.5 ulp; exactly 1 at 0; exactly 0 below 2^-126 and at -inf; NaN stays NaN.
static inline vec exp2(vec x) {
#if defined(__AVX512F__)
    const vec whole = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    // Adding 1.5 * 2^23 rounds to an integer; what is out of range is dealt with at the end.
    const vec magic = set1(12582912.0f);
    const vec bounded = x < -127.0f ? set1(-127.0f) : (x > 128.0f ? set1(128.0f) : x);
    const vec whole = (bounded + magic) - magic;
#endif
    const vec f = x - whole;
    // Minimax of the relative error on [-1/2, 1/2], among the polynomials that are 1 at 0.
    vec p = set1(0.001326472726f);
    p = p * f + 0.0096715127f;
    p = p * f + 0.05550733744f;
    p = p * f + 0.2402224208f;
    p = p * f + 0.6931469776f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    const vec scaled = (vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    const ivec exponent = (__builtin_convertvector(whole, ivec) + 127) << 23;
    const vec scaled = p * (vec)exponent;
#endif
    return x < -126.0f ? set1(0.0f) : scaled;
}

}  // namespace QKV_ISA
}  // namespace qkv
