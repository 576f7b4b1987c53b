// Transposes of rows into lanes, and back.
#pragma once

#include "simd/dtypes.h"

namespace qkv {
namespace QKV_ISA {

static inline int64_t whole_vectors(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

// Calls work(c, count) for the columns, a vector at a time. For whole vectors the count is a constant once inlined.
template <class Work>
static inline void for_columns(int64_t columns, Work work) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) work(c, (int64_t)LANES);
    if (c < columns) work(c, columns - c);
}

// to[c * pitch + r] = column c of row r, for whole vectors of rows. `get(r, c, count)` reads columns of a row as lanes.
template <class Get>
static inline void rows_to_lanes(int64_t rows, int64_t columns, float* to, int64_t pitch, Get get) {
    for (int64_t r = 0; r < rows; r += LANES) {
        for_columns(columns, [&](int64_t c, int64_t count) {
            vec square[LANES];
            for (int i = 0; i < LANES; ++i) square[i] = get(r + i, c, count);
            transpose(square);
            for (int64_t i = 0; i < count; ++i) store(to + (c + i) * pitch + r, square[i]);
        });
    }
}

// Calls put(r, c, count, lanes) with the columns of each row, where from[c * pitch + r] is column c of row r.
template <class Put>
static inline void lanes_to_rows(int64_t rows, int64_t columns, const float* from, int64_t pitch, Put put) {
    for (int64_t r = 0; r < rows; r += LANES) {
        const int64_t height = std::min<int64_t>(LANES, rows - r);
        for_columns(columns, [&](int64_t c, int64_t count) {
            vec square[LANES];
            for (int64_t i = 0; i < LANES; ++i) square[i] = i < count ? load(from + (c + i) * pitch + r) : vec{};
            transpose(square);
            for (int64_t i = 0; i < height; ++i) put(r + i, c, count, square[i]);
        });
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
