// Attention forward for a few rows of several queries: tokens that a small model has proposed, or the end of a prompt.
//
// They would leave most lanes of query rows empty, so the operands of both products change places: lanes lie along keys
// in the first, for which keys are transposed, and along the width in the second. What is added to a sum, and in which
// order, stays the same, and so do its bits.
#pragma once

#include "few.h"

namespace qkv {
namespace QKV_ISA {

// A kind of product with its operands changed. Tile registers do without.
template <class Kind>
struct Turned {
    static constexpr int MOST = 0;  // rows
};

template <>
struct Turned<Single> : Single {
    static constexpr int MOST = LANES / 2;
    typedef Widened<Dtype::f32> Products;

    // What a row holds from a step on, and zeros behind it.
    static vec take(const float* row, int64_t step, int64_t width) {
        return load_part(Dtype::f32, row + step, width - step);
    }
};

template <>
struct Format<Turned<Single>> : Format<Single> {
    // The rows of a tile as they are, and not as lanes.
    static void panel(const Problem& p, const Tile& t, const View&, int64_t, float* to) {
        float steps[LANES];
        Widened<Dtype::f32>::queries(p, t, to, steps);
    }
};

#if defined(__AVX512BF16__)
template <>
struct Turned<Pair> : Pair {
    typedef uint16_t Element;
    static constexpr int MOST = LANES / 2;
    typedef Dots<Halves> Products;

    static vec take(const uint16_t* row, int64_t step, int64_t width) {
        return (vec)Halves::take((const char*)(row + 2 * step), width - 2 * step);
    }
};

// Keys and values are read in place.
template <>
struct Format<Turned<Pair>> : Format<Pair> {
    typedef uint16_t Element;
    static constexpr int ABREAST = 1;

    static void panel(const Problem& p, const Tile& t, const View&, int64_t, float* to) {
        float steps[LANES];
        Dots<Halves>::queries(p, t, to, steps);
    }

    static const uint16_t* along_width(const Problem& p, int64_t batch, int64_t kv_head, const View& view, int64_t,
                                       int64_t first, int64_t, float*, int64_t& stride) {
        stride = view.row;
        return (const uint16_t*)row_of(p, view, batch, kv_head, first);
    }

    static const uint16_t* along_keys(const Problem& p, int64_t batch, int64_t kv_head, const View& view, int64_t width,
                                      int64_t first, int64_t count, float* scratch, int64_t& stride) {
        return along_width(p, batch, kv_head, view, width, first, count, scratch, stride);
    }

    static uint16_t* own(const uint16_t* from, int64_t width, int64_t count, float* scratch, int64_t& stride) {
        uint16_t* const to = (uint16_t*)scratch;
        for (int64_t j = 0; j < count; ++j) std::memcpy(to + j * width, from + j * stride, width * sizeof *to);
        stride = width;
        return to;
    }

    static void clear(uint16_t* along_keys, int64_t stride, int64_t j, int64_t d) { along_keys[j * stride + d] = 0; }
};
#endif

// Rows of out lie as the products sum them.
template <class Products>
struct TurnedState : FewState {
    using FewState::FewState;

    float& at(const Problem& p, const Tile& t, int r, int64_t d) const {
        return FewState::at(p, t, r, Products::column(d));
    }
};

template <class Products>
static void finish(const Problem& p, const Tile& t, const TurnedState<Products>& state) {
    finish<Products>(p, t, (const FewState&)state);
}

// Scores of a vector of keys, whose rows are transposed in registers, a square at a time. Behind the width, keys and
// queries are 0. With each square, one so many elements ahead is asked for.
template <class Kind, int COUNT>
static inline void multiply_vector(const typename Turned<Kind>::Element* const* keys, int64_t ahead, int64_t width,
                                   const float* panel, vec* scores) {
    const int64_t pitch = pitch_of(width), steps = Format<Kind>::steps(width);
    for (int r = 0; r < COUNT; ++r) scores[r] = vec{};
    for (int64_t step = 0; step < steps; step += LANES) {
        vec square[LANES];
        for (int i = 0; i < LANES; ++i) {
            prefetch((const char*)(keys[i] + ahead) + step * (int64_t)sizeof(float), 1);
            square[i] = Turned<Kind>::take(keys[i], step, width);
        }
        transpose(square);
        for (int i = 0; i < LANES; ++i) {
            for (int r = 0; r < COUNT; ++r) {
                typename Kind::Element query;
                std::memcpy(&query, panel + r * pitch + step + i, sizeof query);
                scores[r] = Kind::madd(scores[r], query, square[i]);
            }
        }
    }
}

template <class Kind>
static inline void multiply_rows(Turned<Kind>, const Tile& t, const Segment& s, int64_t width,
                                 const typename Turned<Kind>::Element* keys, int64_t stride, const float* panel,
                                 float* to) {
    with_count<1, Turned<Kind>::MOST>(t.count, [&](auto rows) {
        constexpr int COUNT = decltype(rows)::value;
        for (int j = s.begin; j < s.end; j += LANES) {
            const typename Turned<Kind>::Element* row[LANES];
            for (int i = 0; i < LANES; ++i) row[i] = keys + std::min(j + i, s.end - 1) * stride;
            vec scores[LANES];
            multiply_vector<Kind, COUNT>(row, 2 * LANES * stride, width, panel, scores);
            for (int r = COUNT; r < LANES; ++r) scores[r] = scores[COUNT - 1];
            transpose(scores);
            for (int i = 0; i < std::min(LANES, s.end - j); ++i) store(to + (j + i) * LANES, scores[i]);
        }
    });
}

template <class Kind>
static inline void sum_over_keys(Turned<Kind>, const Tile& t, const Segment& s, int64_t width,
                                 const typename Turned<Kind>::Element* values, int64_t stride, const float* weights,
                                 float* to) {
    typedef typename Turned<Kind>::Products Products;
    with_count<1, Turned<Kind>::MOST>(t.count, [&](auto rows) {
        // Values are asked for as far ahead as keys are.
        const char* const from = (const char*)(values + s.begin * stride);
        const int64_t step = stride * (int64_t)sizeof *values;
        Products::template add<decltype(rows)::value, LANES>(from, step, s.end - s.begin, width,
                                                             weights + Format<Kind>::steps(s.begin) * LANES, vec{}, to,
                                                             Soon{from + 2 * LANES * step, step});
    });
}

}  // namespace QKV_ISA
}  // namespace qkv
