// Vectors by the compiler's extensions alone: any processor. simd/vec.h lists what an instruction set defines.
#pragma once

#include "simd/padded.h"

namespace qkv {
namespace QKV_ISA {

constexpr int LANES = 4, REGISTERS = 16;

using vec = float __attribute__((vector_size(LANES * 4)));
using ivec = int32_t __attribute__((vector_size(LANES * 4)));
using uvec = uint32_t __attribute__((vector_size(LANES * 4)));

static inline bool any(ivec mask) {
    int32_t seen = 0;
    for (int i = 0; i < LANES; ++i) seen |= mask[i];
    return seen != 0;
}

struct Exponent {
    vec x, whole, fraction;

    [[gnu::always_inline]] explicit Exponent(vec x) : x(x) {
        const vec least = vec{} - 127.0f, most = vec{} + 128.0f;
        const vec bounded = x < -127.0f ? least : (x > 128.0f ? most : x);
        // Adding 1.5 * 2^23 rounds to the nearest integer.
        const vec nearest = (bounded + 12582912.0f) - 12582912.0f;
        whole = nearest > bounded ? nearest - 1.0f : nearest;
        fraction = bounded - whole;
    }

    [[gnu::always_inline]] vec scale(vec y) const {
        const ivec bits = (__builtin_convertvector(whole, ivec) + 127) << 23;
        return x < -126.0f ? vec{} : y * (vec)bits;
    }
};

static inline float from_f16(uint16_t x) {
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
}

static inline uint16_t to_f16(float x) {
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
}

static inline vec load_f32(const void* data) {
    vec x;
    std::memcpy(&x, data, sizeof x);
    return x;
}

static inline vec load_bf16(const void* data) {
    uvec bits;
    for (int i = 0; i < LANES; ++i) bits[i] = (uint32_t)((const uint16_t*)data)[i] << 16;
    return (vec)bits;
}

static inline vec load_f16(const void* data) {
    vec x = {};
    for (int i = 0; i < LANES; ++i) x[i] = from_f16(((const uint16_t*)data)[i]);
    return x;
}

static inline vec load_i8(const void* data) {
    vec x = {};
    for (int i = 0; i < LANES; ++i) x[i] = ((const int8_t*)data)[i];
    return x;
}

static inline vec load_first_f32(const void* data, int64_t n) { return load_f32(Padded<float, LANES>(data, n).data); }
static inline vec load_first_bf16(const void* data, int64_t n) {
    return load_bf16(Padded<uint16_t, LANES>(data, n).data);
}
static inline vec load_first_f16(const void* data, int64_t n) {
    return load_f16(Padded<uint16_t, LANES>(data, n).data);
}
static inline vec load_first_i8(const void* data, int64_t n) { return load_i8(Padded<int8_t, LANES>(data, n).data); }

static inline vec load_fours_f32(const char* data, int64_t) { return load_f32(data); }
static inline vec load_fours_bf16(const char* data, int64_t) { return load_bf16(data); }
static inline vec load_fours_f16(const char* data, int64_t) { return load_f16(data); }

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
