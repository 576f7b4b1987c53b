// NEON with dot products of pairs of bf16, and of four numbers of int8.
#pragma once

#include "simd/neon.h"

#define QKV_DOT_BF16
#define QKV_DOT_I8
// Attention with neither bf16 nor int8 is as in neon, which computes it (attention/kernel.cpp).
#define QKV_EXTENDS_BASE

namespace qkv {
namespace QKV_ISA {

using pair_vec = uint16x8_t;
using half_vec = uint16x4_t;

static inline pair_vec repeat_pair(uint32_t x) { return vreinterpretq_u16_u32(vdupq_n_u32(x)); }
static inline pair_vec load_pairs(const void* data) { return vld1q_u16((const uint16_t*)data); }
static inline pair_vec load_first_pairs(const void* data, int64_t count) {
    return load_pairs(Padded<uint16_t, 2 * LANES>(data, count).data);
}
static inline void store_halves(void* data, half_vec x) { std::memcpy(data, &x, sizeof x); }
static inline pair_vec alternate_low(pair_vec a, pair_vec b) { return vzip1q_u16(a, b); }
static inline pair_vec alternate_high(pair_vec a, pair_vec b) { return vzip2q_u16(a, b); }

static inline half_vec permute_halves(half_vec x, const uint16_t* from) {
    const uint16x4_t bytes = vmla_n_u16(vdup_n_u16(0x0100), load_u16(from), 0x0202);  // both bytes of each number
    return vreinterpret_u16_u8(vtbl1_u8(vreinterpret_u8_u16(x), vreinterpret_u8_u16(bytes)));
}

// sum[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1].
static inline vec dot_bf16(vec sum, pair_vec a, vec b) {
    return (vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)b, vreinterpretq_bf16_u16(a));
}

static inline half_vec round_to_bf16(vec x) { return vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)x)); }

// Pairs of the numbers in the same lanes.
static inline vec pair_bf16(vec low, vec high) {
    const pair_vec a = vcombine_u16(round_to_bf16(low), round_to_bf16(low));
    const pair_vec b = vcombine_u16(round_to_bf16(high), round_to_bf16(high));
    return (vec)alternate_low(a, b);
}

// sum[i] + a[4 i] b[4 i] + ... + a[4 i + 3] b[4 i + 3].
static inline int32x4_t dot_i8(int32x4_t sum, int8x16_t a, int8x16_t b) { return vdotq_s32(sum, a, b); }

}  // namespace QKV_ISA
}  // namespace qkv
