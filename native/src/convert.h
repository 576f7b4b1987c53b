// Rows of 16-bit numbers as fp32, and back.
#pragma once

#include "problem.h"
#include "vec.h"

namespace qkv {
namespace QKV_ISA {

static inline float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float from_f16(uint16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, magnitude = x & 0x7fff;
    uint32_t bits;
    if (magnitude >= 0x7c00) {
        bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    } else if (magnitude >= 0x400) {
        bits = sign | ((magnitude << 13) + 0x38000000);
    } else {  // subnormal: magnitude * 2^-24
        const float small = (float)magnitude * 5.9604644775390625e-8f;
        std::memcpy(&bits, &small, sizeof bits);
        bits |= sign;
    }
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
#endif
}

static inline uint16_t to_f16(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded magnitude in the last bits
        float y;
        std::memcpy(&y, &magnitude, sizeof y);
        y += 0.5f;
        std::memcpy(&bits, &y, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
#endif
}

static inline float read(Dtype dtype, const void* data, int64_t i) {
    if (dtype == Dtype::f32) return ((const float*)data)[i];
    const uint16_t x = ((const uint16_t*)data)[i];
    return dtype == Dtype::bf16 ? from_bf16(x) : from_f16(x);
}

static inline void write(Dtype dtype, void* data, int64_t i, float x) {
    if (dtype == Dtype::f32)
        ((float*)data)[i] = x;
    else
        ((uint16_t*)data)[i] = dtype == Dtype::bf16 ? to_bf16(x) : to_f16(x);
}

// `count` numbers of a row as fp32.
static inline void widen(Dtype dtype, const uint16_t* from, float* to, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
        const __m256i half = _mm256_loadu_si256((const __m256i*)(from + i));
        const __m512 wide = dtype == Dtype::bf16
                                ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))
                                : _mm512_cvtph_ps(half);
        _mm512_storeu_ps(to + i, wide);
    }
#elif defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
        const __m128i half = _mm_loadu_si128((const __m128i*)(from + i));
        const __m256 wide = dtype == Dtype::bf16
                                ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))
                                : _mm256_cvtph_ps(half);
        _mm256_storeu_ps(to + i, wide);
    }
#endif
    for (; i < count; ++i) to[i] = dtype == Dtype::bf16 ? from_bf16(from[i]) : from_f16(from[i]);
}

}  // namespace QKV_ISA
}  // namespace qkv
