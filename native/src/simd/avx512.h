// AVX-512: F, BW, DQ and VL. simd/vec.h lists what an instruction set defines.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace qkv {
namespace QKV_ISA {

constexpr int LANES = 16, REGISTERS = 32;

using vec = float __attribute__((vector_size(LANES * 4)));
using ivec = int32_t __attribute__((vector_size(LANES * 4)));
using uvec = uint32_t __attribute__((vector_size(LANES * 4)));
using pair_vec = __m512i;
using half_vec = __m256i;

static inline bool any(ivec mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }

struct Exponent {
    vec x, fraction;

    [[gnu::always_inline]] explicit Exponent(vec x)
        : x(x), fraction((vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)) {}

    [[gnu::always_inline]] vec scale(vec y) const {
        const __m512 least = (__m512)(vec{} - 126.0f);
        const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, least, _CMP_NLT_UQ);
        return (vec)_mm512_maskz_scalef_ps(counts, (__m512)y, (__m512)x);
    }
};

static inline float from_f16(uint16_t x) { return _cvtsh_ss(x); }
static inline uint16_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline vec widen_bf16(__m256i x) { return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
static inline vec widen_f16(__m256i x) { return (vec)_mm512_cvtph_ps(x); }
static inline vec widen_i8(__m128i x) { return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }

static inline vec load_f32(const void* data) {
    vec x;
    std::memcpy(&x, data, sizeof x);
    return x;
}
static inline vec load_bf16(const void* data) { return widen_bf16(_mm256_loadu_si256((const __m256i*)data)); }
static inline vec load_f16(const void* data) { return widen_f16(_mm256_loadu_si256((const __m256i*)data)); }
static inline vec load_i8(const void* data) { return widen_i8(_mm_loadu_si128((const __m128i*)data)); }

static inline __mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << count) - 1); }

static inline vec load_first_f32(const void* data, int64_t count) {
    return (vec)_mm512_maskz_loadu_ps(first_lanes(count), data);
}
static inline vec load_first_bf16(const void* data, int64_t count) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(count), data));
}
static inline vec load_first_f16(const void* data, int64_t count) {
    return widen_f16(_mm256_maskz_loadu_epi16(first_lanes(count), data));
}
static inline vec load_first_i8(const void* data, int64_t count) {
    return widen_i8(_mm_maskz_loadu_epi8(first_lanes(count), data));
}

static inline vec load_fours_f32(const char* data, int64_t stride) {
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps((const float*)data));
    x = _mm512_mask_broadcast_f32x4(x, 0x00f0, _mm_loadu_ps((const float*)(data + stride)));
    x = _mm512_mask_broadcast_f32x4(x, 0x0f00, _mm_loadu_ps((const float*)(data + 2 * stride)));
    return (vec)_mm512_mask_broadcast_f32x4(x, 0xf000, _mm_loadu_ps((const float*)(data + 3 * stride)));
}
static inline __m256i load_fours_u16(const char* data, int64_t stride) {
    __m256i x = _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)data));
    x = _mm256_mask_broadcastq_epi64(x, 2, _mm_loadl_epi64((const __m128i*)(data + stride)));
    x = _mm256_mask_broadcastq_epi64(x, 4, _mm_loadl_epi64((const __m128i*)(data + 2 * stride)));
    return _mm256_mask_broadcastq_epi64(x, 8, _mm_loadl_epi64((const __m128i*)(data + 3 * stride)));
}
static inline vec load_fours_bf16(const char* data, int64_t stride) { return widen_bf16(load_fours_u16(data, stride)); }
static inline vec load_fours_f16(const char* data, int64_t stride) { return widen_f16(load_fours_u16(data, stride)); }

static inline void store_first_f32(void* data, vec x, int64_t count) {
    _mm512_mask_storeu_ps(data, first_lanes(count), (__m512)x);
}
static inline void store_first_f16(void* data, vec x, int64_t count) {
    const __m256i half = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(data, first_lanes(count), half);
}
static inline void store_first_u16(void* data, uvec x, int64_t count) {
    _mm256_mask_storeu_epi16(data, first_lanes(count), _mm512_cvtepi32_epi16((__m512i)x));
}

static inline pair_vec repeat_pair(uint32_t x) { return _mm512_set1_epi32((int)x); }
static inline pair_vec load_pairs(const void* data) { return _mm512_loadu_si512(data); }
static inline pair_vec load_first_pairs(const void* data, int64_t count) {
    return _mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), data);
}
static inline void store_halves(void* data, half_vec x) { _mm256_storeu_si256((__m256i*)data, x); }
static inline half_vec permute_halves(half_vec x, const uint16_t* from) {
    return _mm256_permutexvar_epi16(_mm256_loadu_si256((const __m256i*)from), x);
}
static inline pair_vec alternate_low(pair_vec a, pair_vec b) { return _mm512_unpacklo_epi16(a, b); }
static inline pair_vec alternate_high(pair_vec a, pair_vec b) { return _mm512_unpackhi_epi16(a, b); }

// sum[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1], of int16.
static inline vec dot_i16(vec sum, pair_vec a, pair_vec b) {
#if defined(__AVX512VNNI__)
    return (vec)_mm512_dpwssd_epi32((__m512i)sum, a, b);
#else
    return (vec)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(a, b));
#endif
}

}  // namespace QKV_ISA
}  // namespace qkv
