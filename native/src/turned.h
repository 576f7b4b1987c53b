// Attention forward for a few rows of several queries, in fp32: tokens that a small model has proposed, or the end of a
// prompt.
//
// They would leave most lanes of query rows empty, so the operands of both products change places: lanes lie along keys
// in the first, for which keys are transposed, and along the width in the second. What is added to a sum, and in which
// order, stays the same, and so do its bits.
#pragma once

#include "few.h"

namespace qkv {
namespace QKV_ISA {

constexpr int TURNED = LANES / 2;  // rows at most

struct Turned : Single {};

template <>
struct Format<Turned> : Format<Single> {
    // The rows of a tile as they are, and not as lanes.
    static void panel(const Problem& p, const Tile& t, const View& view, int64_t width, float* to) {
        rows(p, t, view, width, to);
    }
};

// Scores of a vector of keys, whose rows are transposed in registers, a square at a time. Behind the width, keys and
// queries are 0.
template <int COUNT>
static inline void multiply_vector(const float* const* keys, int64_t width, const float* panel, vec* scores) {
    const int64_t pitch = whole_vectors(width);
    for (int r = 0; r < COUNT; ++r) scores[r] = vec{};
    for_columns(width, [&](int64_t d, int64_t count) {
        vec square[LANES];
        for (int i = 0; i < LANES; ++i) square[i] = load_part(Dtype::f32, keys[i] + d, count);
        transpose(square);
        for (int i = 0; i < LANES; ++i)
            for (int r = 0; r < COUNT; ++r) scores[r] = scores[r] + panel[r * pitch + d + i] * square[i];
    });
}

template <>
inline void multiply_rows<Turned>(const Tile& t, const Segment& s, int64_t width, const float* keys, int64_t stride,
                                  const float* panel, float* to) {
    with_count<Widened<Dtype::f32>, TURNED>(Widened<Dtype::f32>(), t.count, [&](auto, auto rows) {
        constexpr int COUNT = decltype(rows)::value;
        for (int j = s.begin; j < s.end; j += LANES) {
            const float* row[LANES];
            for (int i = 0; i < LANES; ++i) row[i] = keys + std::min(j + i, s.end - 1) * stride;
            vec scores[LANES];
            multiply_vector<COUNT>(row, width, panel, scores);
            for (int r = COUNT; r < LANES; ++r) scores[r] = scores[COUNT - 1];
            transpose(scores);
            for (int i = 0; i < std::min(LANES, s.end - j); ++i) store(to + (j + i) * LANES, scores[i]);
        }
    });
}

template <>
inline void sum_over_keys<Turned>(const Tile& t, const Segment& s, int64_t width, const float* values, int64_t stride,
                                  const float* weights, float* to) {
    typedef Widened<Dtype::f32> Products;
    with_count<Products, TURNED>(Products(), t.count, [&](auto, auto count) {
        Products::add<decltype(count)::value, LANES>((const char*)(values + s.begin * stride),
                                                     stride * (int64_t)sizeof(float), s.end - s.begin, width,
                                                     weights + s.begin * LANES, vec{}, to);
    });
}

static void finish(const Problem& p, const Tile& t, const FewState& state) { finish<Widened<Dtype::f32>>(p, t, state); }

}  // namespace QKV_ISA
}  // namespace qkv
