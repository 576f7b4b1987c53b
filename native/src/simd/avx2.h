// AVX2, FMA and F16C. simd/vec.h lists what an instruction set defines.
#pragma once

#include <immintrin.h>

#include "simd/padded.h"

namespace qkv {
namespace QKV_ISA {

constexpr int LANES = 8, REGISTERS = 16;

using vec = float __attribute__((vector_size(LANES * 4)));
using ivec = int32_t __attribute__((vector_size(LANES * 4)));
using uvec = uint32_t __attribute__((vector_size(LANES * 4)));

static inline bool any(ivec mask) { return _mm256_movemask_epi8((__m256i)mask) != 0; }

struct Exponent {
    vec x, whole, fraction;

    [[gnu::always_inline]] explicit Exponent(vec x) : x(x) {
        const vec least = vec{} - 127.0f, most = vec{} + 128.0f;
        const vec bounded = x < -127.0f ? least : (x > 128.0f ? most : x);
        whole = (vec)_mm256_floor_ps((__m256)bounded);
        fraction = bounded - whole;
    }

    [[gnu::always_inline]] vec scale(vec y) const {
        const ivec bits = (__builtin_convertvector(whole, ivec) + 127) << 23;
        return x < -126.0f ? vec{} : y * (vec)bits;
    }
};

static inline float from_f16(uint16_t x) { return _cvtsh_ss(x); }
static inline uint16_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline vec widen_bf16(__m128i x) { return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16); }
static inline vec widen_f16(__m128i x) { return (vec)_mm256_cvtph_ps(x); }

static inline vec load_f32(const void* data) {
    vec x;
    std::memcpy(&x, data, sizeof x);
    return x;
}
static inline vec load_bf16(const void* data) { return widen_bf16(_mm_loadu_si128((const __m128i*)data)); }
static inline vec load_f16(const void* data) { return widen_f16(_mm_loadu_si128((const __m128i*)data)); }
static inline vec load_i8(const void* data) {
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)data)));
}

static inline vec load_first_f32(const void* data, int64_t n) { return load_f32(Padded<float, LANES>(data, n).data); }
static inline vec load_first_bf16(const void* data, int64_t n) {
    return load_bf16(Padded<uint16_t, LANES>(data, n).data);
}
static inline vec load_first_f16(const void* data, int64_t n) {
    return load_f16(Padded<uint16_t, LANES>(data, n).data);
}
static inline vec load_first_i8(const void* data, int64_t n) { return load_i8(Padded<int8_t, LANES>(data, n).data); }

static inline vec load_fours_f32(const char* data, int64_t stride) {
    const __m256 x = _mm256_castps128_ps256(_mm_loadu_ps((const float*)data));
    return (vec)_mm256_insertf128_ps(x, _mm_loadu_ps((const float*)(data + stride)), 1);
}
static inline __m128i load_fours_u16(const char* data, int64_t stride) {
    const __m128 x = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)data));
    return _mm_castps_si128(_mm_loadh_pi(x, (const __m64*)(data + stride)));
}
static inline vec load_fours_bf16(const char* data, int64_t stride) { return widen_bf16(load_fours_u16(data, stride)); }
static inline vec load_fours_f16(const char* data, int64_t stride) { return widen_f16(load_fours_u16(data, stride)); }

static inline void store_first_f32(void* data, vec x, int64_t count) {
    if (count == LANES)
        std::memcpy(data, &x, sizeof x);
    else
        std::memcpy(data, &x, count * sizeof(float));
}

static inline void store_first_f16(void* data, vec x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) ((uint16_t*)data)[i] = to_f16(x[i]);
}

static inline void store_first_u16(void* data, uvec x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) ((uint16_t*)data)[i] = (uint16_t)x[i];
}

}  // namespace QKV_ISA
}  // namespace qkv
