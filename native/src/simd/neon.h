// NEON, which every aarch64 processor has. simd/vec.h lists what an instruction set defines.
#pragma once

#include <arm_neon.h>

#include "simd/padded.h"

namespace qkv {
namespace QKV_ISA {

constexpr int LANES = 4, REGISTERS = 32;

using vec = float __attribute__((vector_size(LANES * 4)));
using ivec = int32_t __attribute__((vector_size(LANES * 4)));
using uvec = uint32_t __attribute__((vector_size(LANES * 4)));

static inline bool any(ivec mask) { return vmaxvq_u32((uint32x4_t)mask) != 0; }

struct Exponent {
    vec x, whole, fraction;

    [[gnu::always_inline]] explicit Exponent(vec x) : x(x) {
        const float32x4_t least = vdupq_n_f32(-127.0f), most = vdupq_n_f32(128.0f);
        const vec bounded = (vec)vminq_f32(vmaxq_f32((float32x4_t)x, least), most);  // NaN stays
        whole = (vec)vrndmq_f32((float32x4_t)bounded);
        fraction = bounded - whole;
    }

    [[gnu::always_inline]] vec scale(vec y) const {
        const ivec bits = ((ivec)vcvtq_s32_f32((float32x4_t)whole) + 127) << 23;
        return x < -126.0f ? vec{} : y * (vec)bits;
    }
};

static inline float from_f16(uint16_t x) {
    float16_t half;
    std::memcpy(&half, &x, sizeof half);
    return (float)half;
}
static inline uint16_t to_f16(float x) {
    const float16_t half = (float16_t)x;
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

static inline vec load_f32(const void* data) { return (vec)vld1q_f32((const float*)data); }
static inline uint16x4_t load_u16(const void* data) { return vld1_u16((const uint16_t*)data); }
static inline vec load_bf16(const void* data) { return (vec)vshll_n_u16(load_u16(data), 16); }
static inline vec load_f16(const void* data) { return (vec)vcvt_f32_f16(vreinterpret_f16_u16(load_u16(data))); }
static inline vec load_i8(const void* data) {
    int32_t four;
    std::memcpy(&four, data, sizeof four);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return (vec)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
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

static inline void store_first(void* data, uint16x4_t x, int64_t count) {
    if (count == LANES)
        std::memcpy(data, &x, sizeof x);
    else
        std::memcpy(data, &x, count * sizeof(uint16_t));
}
static inline void store_first_f16(void* data, vec x, int64_t count) {
    store_first(data, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)), count);
}
static inline void store_first_u16(void* data, uvec x, int64_t count) {
    store_first(data, vmovn_u32((uint32x4_t)x), count);
}

}  // namespace QKV_ISA
}  // namespace qkv
