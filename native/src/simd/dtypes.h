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

// Calls work with the dtype as a constant.
template <class Work>
static inline void for_dtype(Dtype dtype, Work work) {
    switch (dtype) {
        case Dtype::f32: return work(std::integral_constant<Dtype, Dtype::f32>());
        case Dtype::bf16: return work(std::integral_constant<Dtype, Dtype::bf16>());
        default: return work(std::integral_constant<Dtype, Dtype::f16>());
    }
}

// A vector of neighbours. The dtype is best a constant.
static inline vec load_as(Dtype dtype, const void* data) {
    switch (dtype) {
        case Dtype::f32: return load_f32(data);
        case Dtype::bf16: return load_bf16(data);
        case Dtype::f16: return load_f16(data);
        case Dtype::i8: return load_i8(data);
        case Dtype::u8: break;
    }
    vec x = {};
    for (int i = 0; i < LANES; ++i) x[i] = ((const uint8_t*)data)[i];
    return x;
}

// `load_part` of less than a vector.
static inline vec load_less(Dtype dtype, const void* data, int64_t count) {
    switch (dtype) {
        case Dtype::f32: return load_first_f32(data, count);
        case Dtype::bf16: return load_first_bf16(data, count);
        case Dtype::f16: return load_first_f16(data, count);
        case Dtype::i8: return load_first_i8(data, count);
        case Dtype::u8: break;
    }
    vec x = {};
    for (int64_t i = 0; i < count; ++i) x[i] = ((const uint8_t*)data)[i];
    return x;
}

// The first `count` of a vector of neighbours, and zeros. Always inlined: a call within a loop delays the next loads, a
// tenth of the time of a short query.
[[gnu::always_inline]] static inline vec load_part(Dtype dtype, const void* data, int64_t count) {
    return count >= LANES ? load_as(dtype, data) : load_less(dtype, data, count);
}

// Four neighbours of each of LANES / 4 rows, side by side. The stride of the rows is in bytes.
static inline vec load_fours(Dtype dtype, const char* data, int64_t stride) {
    switch (dtype) {
        case Dtype::f32: return load_fours_f32(data, stride);
        case Dtype::bf16: return load_fours_bf16(data, stride);
        default: return load_fours_f16(data, stride);
    }
}

// Numbers of bf16 in the lower halves of lanes, rounded to nearest even; NaN stays NaN.
static inline uvec bits_of_bf16(vec x) {
    const uvec bits = (uvec)x;
    const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (ivec)(x == x) ? rounded : (bits >> 16 | 0x40);
}

// The first `count` lanes.
static inline void store_part(Dtype dtype, void* data, vec x, int64_t count) {
    count = std::min<int64_t>(count, LANES);
    if (dtype == Dtype::f32) return store_first_f32(data, x, count);
    if (dtype == Dtype::f16) return store_first_f16(data, x, count);
    store_first_u16(data, bits_of_bf16(x), count);
}

// The numbers as they are after `store_part`, as fp32.
static inline vec round_to(Dtype dtype, vec x) {
    if (dtype == Dtype::f32) return x;
    if (dtype == Dtype::bf16) return (vec)(bits_of_bf16(x) << 16);
    uint16_t halves[LANES];
    store_first_f16(halves, x, LANES);
    return load_f16(halves);
}

}  // namespace QKV_ISA
}  // namespace qkv
