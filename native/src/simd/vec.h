// A vector of floats as wide as the instruction set, from the compiler's vector extensions.
// Intrinsics stand only where no extension exists: rounding, power-of-two scaling, 16-bit conversions and dot products.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

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

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;  // of vectors
#else
constexpr int REGISTERS = 16;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));

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

// Lane i of the result is lane from(i) of a, or lane from(i) - LANES of b.
template <class From, int... I>
static inline vec shuffle(vec a, vec b, From, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, From::at(I)...);
}

template <class From>
static inline vec shuffle(vec a, vec b, From from) {
    return shuffle(a, b, from, std::make_integer_sequence<int, LANES>());
}

// The lanes of both that a butterfly of this distance brings to the first of two vectors, and to the second.
template <int DISTANCE>
struct First {
    static constexpr int at(int i) { return i & DISTANCE ? LANES + (i ^ DISTANCE) : i; }
};
template <int DISTANCE>
struct Second {
    static constexpr int at(int i) { return i & DISTANCE ? LANES + i : i ^ DISTANCE; }
};

template <int DISTANCE>
struct Across {
    static constexpr int at(int i) { return i ^ DISTANCE; }
};

// Lane i of a[j] changes places with lane j of a[i], within each COUNT lanes.
template <int COUNT = LANES, int DISTANCE = 1>
[[gnu::always_inline]] static inline void transpose(vec* a) {
    if constexpr (DISTANCE < COUNT) {
        for (int i = 0; i < COUNT; ++i) {
            if (i & DISTANCE) continue;
            const vec x = a[i], y = a[i + DISTANCE];
            a[i] = shuffle(x, y, First<DISTANCE>());
            a[i + DISTANCE] = shuffle(x, y, Second<DISTANCE>());
        }
        transpose<COUNT, 2 * DISTANCE>(a);
    }
}

// Lane i of the result is the sum over the lanes of a[i].
template <int DISTANCE = 1, int COUNT = LANES>
static inline vec sum_each(vec* a) {
    if constexpr (COUNT > 1) {
        for (int i = 0; i < COUNT / 2; ++i) {
            const vec x = a[2 * i], y = a[2 * i + 1];
            a[i] = shuffle(x, y, First<DISTANCE>()) + shuffle(x, y, Second<DISTANCE>());
        }
        return sum_each<2 * DISTANCE, COUNT / 2>(a);
    }
    return a[0];
}

// 2^x with a relative error of 1.2 ulp; exactly 1 at 0; exactly 0 below 2^-126 and at -inf; NaN stays NaN.
[[gnu::always_inline]] static inline vec exp2(vec x) {
#if defined(__AVX512F__)
    const vec f = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
#else
    const vec bounded = x < -127.0f ? set1(-127.0f) : (x > 128.0f ? set1(128.0f) : x);
#if defined(__AVX2__)
    const vec whole = (vec)_mm256_floor_ps((__m256)bounded);
#else
    // Adding 1.5 * 2^23 rounds to the nearest integer.
    const vec nearest = (bounded + 12582912.0f) - 12582912.0f;
    const vec whole = nearest > bounded ? nearest - 1.0f : nearest;
#endif
    const vec f = bounded - whole;
#endif
    // Minimax of the relative error on [0, 1], among the polynomials that are 1 at 0.
    vec p = set1(0.00186713f);
    p = p * f + 0.00901703f;
    p = p * f + 0.05579991f;
    p = p * f + 0.24016445f;
    p = p * f + 0.69315131f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)set1(-126.0f), _CMP_NLT_UQ);
    return (vec)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)x);  // by 2^floor(x)
#else
    const ivec exponent = (__builtin_convertvector(whole, ivec) + 127) << 23;
    return x < -126.0f ? set1(0.0f) : p * (vec)exponent;
#endif
}

// Asks for memory. Not into the nearest cache, whose few requests under way would hold up what is read.
static inline void prefetch(const char* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

}  // namespace QKV_ISA
}  // namespace qkv
