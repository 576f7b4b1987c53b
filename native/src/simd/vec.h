// A vector of floats as wide as the instruction set, from the compiler's vector extensions.
//
// simd/<isa>.h, the file named after the instruction set, defines what extensions do not:
//
//     LANES, REGISTERS                   floats of a vector; vector registers
//     vec, ivec, uvec                    vectors of float, int32_t, uint32_t
//     any(ivec)                          whether any lane is not 0
//     Exponent(vec x)                    x as a whole number and a .fraction in [0, 1); .scale(y) is y times 2 to the
//                                        whole, and 0 where x < -126; NaN stays NaN
//     from_f16, to_f16                   one number of fp16 as fp32, and rounded to it
//     load_f32, _bf16, _f16, _i8         a vector of neighbours, as fp32
//     load_first_f32, _bf16, _f16, _i8   the first `count` < LANES of them, and zeros
//     load_fours_f32, _bf16, _f16        four neighbours of each of LANES / 4 rows, `stride` bytes apart
//     store_first_f32, _f16, _u16        the first `count` <= LANES lanes; of _u16, their lower halves
//
// avx512 and those that extend it also have dot products of pairs of 16 bits, as does neonbf16:
//
//     pair_vec, half_vec                 LANES pairs; LANES numbers of 16 bits
//     repeat_pair                        a pair in all lanes
//     load_pairs, load_first_pairs       a vector of pairs; the first `count` < 2 LANES numbers of one, and zeros
//     alternate_low, alternate_high      pairs of the numbers in the same places of two vectors: of each 16 bytes, from
//                                        the first four and from the last four
//     permute_halves(x, from)            number from[i] of x as number i
//     store_halves                       LANES numbers of 16 bits
//     dot_i16                            multiply-adds of pairs of int16. Only avx512 and those that extend it
//     QKV_DOT_BF16                       defined for those with `dot_bf16`, `round_to_bf16` and `pair_bf16`
//
// neonbf16 has dot products of fours of int8 (QKV_DOT_I8), and amx has tile registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

// clang-format off
#define QKV_QUOTE(path) #path
#define QKV_FILE(path) QKV_QUOTE(path)
#include QKV_FILE(simd/QKV_ISA.h)
// clang-format on

namespace qkv {
namespace QKV_ISA {

static inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

static inline vec set1(float x) { return vec{} + x; }

// x, which the compiler must not merge with a sum into one multiply-add: a product is rounded first.
[[gnu::always_inline]] static inline vec rounded(vec x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

// The larger of the two; b where a is NaN.
static inline vec max(vec a, vec b) { return a > b ? a : b; }

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
    const Exponent exponent(x);
    const vec f = exponent.fraction;
    // Minimax of the relative error on [0, 1], among the polynomials that are 1 at 0.
    vec p = set1(0.00186713f);
    p = p * f + 0.00901703f;
    p = p * f + 0.05579991f;
    p = p * f + 0.24016445f;
    p = p * f + 0.69315131f;
    p = p * f + 1.0f;
    return exponent.scale(p);
}

// Prefetches `bytes` bytes into L2, not L1: L1 has few outstanding-miss slots, which demand loads need.
static inline void prefetch(const char* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

}  // namespace QKV_ISA
}  // namespace qkv
