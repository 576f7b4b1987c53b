// A product of few rows with the weight of a linear layer, as Python fills it in.
#pragma once

#include "abi/problem.h"

namespace qkv {

constexpr int64_t MOST_ROWS = 16;  // of a product
constexpr int MOST_PRODUCTS = 8;   // of one call

// out = x @ weight.mT + bias. Strides count numbers from row to row; the numbers of a row lie next to each other. In
// the order of `PROJECTION` in src/qkv/kernels/structs.py.
struct Projection {
    Dtype dtype;      // of x, weight and bias: f32, bf16 or f16
    Dtype out_dtype;  // the same, or f32
    int64_t rows, in_features, out_features;
    const void* x;  // (rows, in_features)
    int64_t x_row;
    const void* weight;  // (out_features, in_features)
    int64_t weight_row;
    const void* bias;  // (out_features), or null
    void* out;         // (rows, out_features)
    int64_t out_row;
};

}  // namespace qkv
