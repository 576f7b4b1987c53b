// A norm of rows by their root mean square, as Python fills it in.
#pragma once

#include "abi/problem.h"

namespace qkv {

// How a row y = x / sqrt(mean(x^2) + eps), in fp32, becomes the result. In the order of `Gain` in
// src/qkv/kernels/rms_norm.py.
enum class Gain : int32_t {
    rounded,  // y rounded to the dtype, times the gains: Llama
    widened,  // y times the gains in fp32, rounded once: torch, OLMo, gpt-oss
    one_more  // y times 1 + the gains in fp32, rounded once: Gemma
};

// out = norm of each row of x; they may be the same memory. Strides count numbers from row to row; the numbers of a row
// lie next to each other.
struct RmsNorm {
    Dtype dtype;  // of x, gains and out: f32, bf16 or f16
    Gain gain;
    int64_t rows, width;
    const void* x;  // (rows, width)
    int64_t x_row;
    const void* gains;  // (width), or null for ones
    void* out;          // (rows, width)
    int64_t out_row;
    float eps;
    int threads;
};

}  // namespace qkv
