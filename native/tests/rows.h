// Matrices of any dtype, and products of them.
#pragma once

#include <algorithm>
#include <random>

#include "abi/projection.h"
#include "memory.h"
#include "numbers.h"

namespace qkv {

// Rows that end where memory does.
struct Rows {
    Dtype dtype;
    int64_t rows, columns, stride;
    Memory memory;

    Rows(Dtype dtype, int64_t rows, int64_t columns, int64_t apart = 0)
        : dtype(dtype), rows(rows), columns(columns), stride(columns + apart),
          memory(((rows - 1) * stride + columns) * size_of(dtype)) {
        memory.poison();
        for (int64_t r = 0; r < rows; ++r) memory.allow(at(r, 0), columns * size_of(dtype));
    }

    char* at(int64_t row, int64_t column) const { return memory.as<char>() + (row * stride + column) * size_of(dtype); }

    double operator()(int64_t row, int64_t column) const { return decode(dtype, at(row, column)); }

    void fill(unsigned seed) const {
        std::mt19937 random(seed);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) encode(dtype, (int)(random() % 129 - 64) / 32.0, at(r, c));
    }
};

inline Projection projection(const Rows& x, const Rows& weight, const Rows* bias, const Rows& out) {
    return {x.dtype,      out.dtype, x.rows,          x.columns,     weight.rows,
            x.at(0, 0),   x.stride,  weight.at(0, 0), weight.stride, bias ? bias->at(0, 0) : nullptr,
            out.at(0, 0), out.stride};
}

}  // namespace qkv
