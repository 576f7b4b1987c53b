// Activation functions of numbers, in fp32.
#pragma once

#include "abi/gated_mlp.h"
#include "simd/dtypes.h"

namespace qkv {
namespace QKV_ISA {

// e^x within 1 ulp, and inf where that is beyond the largest number; 0 below e^-86; NaN stays NaN.
[[gnu::always_inline]] static inline vec exp(vec x) {
    const vec least = set1(-86.0f), most = set1(89.0f);
    const vec bounded = x < least ? least : (x > most ? most : x);
    // Adding 1.5 * 2^23 rounds to the nearest integer.
    const vec whole = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;
    // ln 2 in two parts; the product with the first one is exact.
    const vec r = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
    // Minimax of the relative error on [-ln 2 / 2, ln 2 / 2], among the polynomials that begin with 1 + r.
    vec p = set1(0.00138131448f);
    p = p * r + 0.00836941879f;
    p = p * r + 0.0416684560f;
    p = p * r + 0.166665152f;
    p = p * r + 0.499999940f;
    p = p * (r * r) + r;
    const ivec half_power = (__builtin_convertvector(whole, ivec) + 126) << 23;
    return x < least ? vec{} : (p + 1.0f) * (vec)half_power * 2.0f;
}

// The complementary error function for z >= 0, within 2^-22.
[[gnu::always_inline]] static inline vec erfc(vec z) {
    const vec t = 1.0f / (1.0f + 0.5f * z);
    // Minimax of erfc(z) on [0, 9.5], as a polynomial of t times exp(-z^2).
    vec p = set1(-0.054620612f);
    p = p * t + 0.36263436f;
    p = p * t - 0.9396228f;
    p = p * t + 1.0712118f;
    p = p * t - 0.4417474f;
    p = p * t + 0.48863685f;
    p = p * t + 0.22409508f;
    p = p * t + 0.2898494f;
    p = p * t - 0.0004366827f;
    return p * exp(-z * z);
}

template <Activation ACTIVATION>
[[gnu::always_inline]] static inline vec activate(vec x) {
    if constexpr (ACTIVATION == Activation::silu) {
        return x / (1.0f + exp(-x));
    } else if constexpr (ACTIVATION == Activation::gelu) {
        const vec tail = erfc((x < 0.0f ? -x : x) * 0.707106781f);
        return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
    } else if constexpr (ACTIVATION == Activation::gelu_tanh) {  // 1 + tanh(y) is 2 / (1 + exp(-2 y))
        const vec y = 0.797884561f * (x + 0.044715f * x * x * x);
        return x / (1.0f + exp(-2.0f * y));
    } else {
        return x < 0.0f ? vec{} : x;
    }
}

// Calls work with the activation as a constant.
template <class Work>
static inline void for_activation(Activation activation, Work work) {
    switch (activation) {
        case Activation::silu: return work(std::integral_constant<Activation, Activation::silu>());
        case Activation::gelu: return work(std::integral_constant<Activation, Activation::gelu>());
        case Activation::gelu_tanh: return work(std::integral_constant<Activation, Activation::gelu_tanh>());
        case Activation::relu: return work(std::integral_constant<Activation, Activation::relu>());
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
