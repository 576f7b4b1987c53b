// Numbers of any dtype as fp32, and back.
#pragma once

#include <algorithm>
#include <type_traits>

#include "abi/problem.h"
#include "simd/vec.h"

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
    if (dtype == Dtype::u8) return ((const uint8_t*)data)[i];
    if (dtype == Dtype::i8) return ((const int8_t*)data)[i];
    const uint16_t x = ((const uint16_t*)data)[i];
    return dtype == Dtype::bf16 ? from_bf16(x) : from_f16(x);
}

static inline void write(Dtype dtype, void* data, int64_t i, float x) {
    if (dtype == Dtype::f32)
        ((float*)data)[i] = x;
    else
        ((uint16_t*)data)[i] = dtype == Dtype::bf16 ? to_bf16(x) : to_f16(x);
}

// Calls work with the dtype of queries, keys and values as a constant.
template <class Work>
static inline void for_dtype(Dtype dtype, Work work) {
    switch (dtype) {
        case Dtype::f32: return work(std::integral_constant<Dtype, Dtype::f32>());
        case Dtype::bf16: return work(std::integral_constant<Dtype, Dtype::bf16>());
        default: return work(std::integral_constant<Dtype, Dtype::f16>());
    }
}

#if defined(__AVX512F__)
// A vector of bf16 or fp16.
static inline vec widened(Dtype dtype, __m256i halves) {
    if (dtype == Dtype::f16) return (vec)_mm512_cvtph_ps(halves);
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
#elif defined(__AVX2__)
static inline vec widened(Dtype dtype, __m128i halves) {
    if (dtype == Dtype::f16) return (vec)_mm256_cvtph_ps(halves);
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}
#endif

// A vector of neighbours. The dtype is best a constant.
static inline vec load_as(Dtype dtype, const void* data) {
    if (dtype == Dtype::f32) return load((const float*)data);
#if defined(__AVX512F__)
    if (size_of(dtype) == 2) return widened(dtype, _mm256_loadu_si256((const __m256i*)data));
    if (dtype == Dtype::i8) return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)data)));
#elif defined(__AVX2__)
    if (size_of(dtype) == 2) return widened(dtype, _mm_loadu_si128((const __m128i*)data));
    if (dtype == Dtype::i8) return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)data)));
#endif
    vec x = {};
    for (int i = 0; i < LANES; ++i) x[i] = read(dtype, data, i);
    return x;
}

// `load_part` of less than a vector.
static inline vec load_less(Dtype dtype, const void* data, int64_t count) {
#if defined(__AVX512F__)
    const __mmask16 lanes = (__mmask16)((1u << count) - 1);
    if (dtype == Dtype::f32) return (vec)_mm512_maskz_loadu_ps(lanes, data);
    if (size_of(dtype) == 2) return widened(dtype, _mm256_maskz_loadu_epi16(lanes, data));
    if (dtype == Dtype::i8) return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, data)));
#endif
    char part[LANES * sizeof(float)] = {};
    std::memcpy(part, data, count * size_of(dtype));
    return load_as(dtype, part);
}

// The first `count` of a vector of neighbours, and zeros. Never a call: in the midst of a loop one keeps the next loads
// waiting, a tenth of the time of a few rows.
[[gnu::always_inline]] static inline vec load_part(Dtype dtype, const void* data, int64_t count) {
    return count >= LANES ? load_as(dtype, data) : load_less(dtype, data, count);
}

// Four neighbours of each of as many rows as a vector has room for, side by side. The stride of the rows is in bytes.
static inline vec load_fours(Dtype dtype, const char* data, int64_t stride) {
#if defined(__AVX512F__)
    if (dtype == Dtype::f32) {
        __m512 x = _mm512_castps128_ps512(_mm_loadu_ps((const float*)data));
        x = _mm512_mask_broadcast_f32x4(x, 0x00f0, _mm_loadu_ps((const float*)(data + stride)));
        x = _mm512_mask_broadcast_f32x4(x, 0x0f00, _mm_loadu_ps((const float*)(data + 2 * stride)));
        return (vec)_mm512_mask_broadcast_f32x4(x, 0xf000, _mm_loadu_ps((const float*)(data + 3 * stride)));
    }
    __m256i x = _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)data));
    x = _mm256_mask_broadcastq_epi64(x, 2, _mm_loadl_epi64((const __m128i*)(data + stride)));
    x = _mm256_mask_broadcastq_epi64(x, 4, _mm_loadl_epi64((const __m128i*)(data + 2 * stride)));
    return widened(dtype, _mm256_mask_broadcastq_epi64(x, 8, _mm_loadl_epi64((const __m128i*)(data + 3 * stride))));
#elif defined(__AVX2__)
    if (dtype == Dtype::f32) {
        const __m256 x = _mm256_castps128_ps256(_mm_loadu_ps((const float*)data));
        return (vec)_mm256_insertf128_ps(x, _mm_loadu_ps((const float*)(data + stride)), 1);
    }
    const __m128 x = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)data));
    return widened(dtype, _mm_castps_si128(_mm_loadh_pi(x, (const __m64*)(data + stride))));
#else
    static_assert(LANES == 4);
    (void)stride;
    return load_as(dtype, data);
#endif
}

// The first `count` lanes.
static inline void store_part(Dtype dtype, void* data, vec x, int64_t count) {
    count = std::min<int64_t>(count, LANES);
#if defined(__AVX512F__)
    const __mmask16 lanes = (__mmask16)((1u << count) - 1);
    if (dtype == Dtype::f32) return _mm512_mask_storeu_ps(data, lanes, (__m512)x);
    if (dtype == Dtype::f16) {
        const __m256i half = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm256_mask_storeu_epi16(data, lanes, half);
    }
#else
    if (dtype == Dtype::f32) {
        if (count == LANES)
            store((float*)data, x);
        else
            std::memcpy(data, &x, count * sizeof(float));
        return;
    }
#endif
    if (dtype == Dtype::f16) {
        for (int64_t i = 0; i < count; ++i) ((uint16_t*)data)[i] = to_f16(x[i]);
        return;
    }
    const uvec bits = (uvec)x;
    const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uvec half = (ivec)(x == x) ? rounded : (bits >> 16 | 0x40);
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(data, lanes, _mm512_cvtepi32_epi16((__m512i)half));
#else
    for (int64_t i = 0; i < count; ++i) ((uint16_t*)data)[i] = (uint16_t)half[i];
#endif
}

}  // namespace QKV_ISA
}  // namespace qkv
