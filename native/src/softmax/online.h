// The running softmax of a tile: maximum, sum and output of each row, over the keys seen so far.
#pragma once

#include <cmath>

#include "softmax/scores.h"

namespace qkv {
namespace QKV_ISA {

// How the maxima of a vector of rows move up to those of a block. They may lag behind by ROW_MAX_LAG, which spares most
// of the rescaling.
struct RowMaxUpdate {
    ivec rows;    // which move
    vec row_max;  // the new maxima, in units of the scores
    Origin origin;
    vec rescale;  // factor of all sums so far

    RowMaxUpdate(const Problem& p, vec from, vec block_max, bool exact = false) {
        const float factor = exponent_factor(p);
        rows = block_max > from + ROW_MAX_LAG / factor;  // also from -inf, where nothing was seen yet
        row_max = rows ? block_max : from;
        const vec base = row_max == -INF ? set1(0.0f) : row_max;
        origin = Origin::at(p, base, exact);
        // Exactly 1 for rows that stay: the bits of a row depend on no other.
        rescale = rows ? exp2((from - base) * factor) : set1(1.0f);
    }
};

// A state, the template parameter `AnyState`, is the running softmax of a tile in memory that its constructor is given:
//
//     floats(p)                      the size of that memory
//     row_max, row_sum               of each lane; maxima are in units of the scores, and may lag behind
//     EXACT                          whether exponents have no shift, as `Origin` says
//     out, numbers(p, t)             the sums of weighted values, and how many floats they take
//     clear(p, t)                    the state of no key
//     at(p, t, r, d)                 column d of row r of out
//     scale(p, t, n, factor)         multiplies vector n of the rows of out
//     join(p, t, n, factor, other, other_factor)    adds another state's rows of out, each times its factor
//
// and has a `finish`, which writes output and lse. They are
//
//     State                          here: rows are lanes
//     ExactState                     attention/backward.h: the same, for maxima and sums alone
//     DecodeState, ShortQueryState   attention/decode.h, attention/short_query.h: lanes lie along the width

struct State {
    static constexpr bool EXACT = false;

    float *row_max, *row_sum;
    float* out;  // (value_width, lanes)

    State(float* memory, const Tile& t) : row_max(memory), row_sum(memory + t.lanes()), out(memory + 2 * t.lanes()) {}

    static int64_t floats(const Problem& p) { return (whole_vectors(p.value_width) + 2) * BLOCK_M; }

    void clear(const Problem& p, const Tile& t) const {
        std::fill(row_max, row_max + t.lanes(), -INF);
        std::fill(row_sum, row_sum + t.lanes(), 0.0f);
        std::fill(out, out + numbers(p, t), 0.0f);
    }

    static int64_t numbers(const Problem& p, const Tile& t) { return p.value_width * t.lanes(); }

    float& at(const Problem&, const Tile& t, int r, int64_t d) const { return out[d * t.lanes() + r]; }

    void scale(const Problem& p, const Tile& t, int n, vec factor) const {
        for (int64_t d = 0; d < p.value_width; ++d) {
            float* const here = out + d * t.lanes() + n * LANES;
            store(here, load(here) * factor);
        }
    }

    void join(const Problem& p, const Tile& t, int n, vec factor, const State& other, vec other_factor) const {
        for (int64_t d = 0; d < p.value_width; ++d) {
            const int64_t here = d * t.lanes() + n * LANES;
            store(out + here, load(out + here) * factor + load(other.out + here) * other_factor);
        }
    }
};

// Merges the state of later keys into that of earlier ones.
template <class AnyState>
static void merge(const Problem& p, const Tile& t, const AnyState& total, const AnyState& split) {
    const float factor = exponent_factor(p);
    for (int n = 0; n < t.vecs; ++n) {
        const vec a = load(total.row_max + n * LANES), b = load(split.row_max + n * LANES);
        const vec row_max = max(a, b);
        const vec base = row_max == -INF ? set1(0.0f) : row_max;
        const vec left = exp2((a - base) * factor), right = exp2((b - base) * factor);
        store(total.row_max + n * LANES, row_max);
        store(total.row_sum + n * LANES,
              load(total.row_sum + n * LANES) * left + load(split.row_sum + n * LANES) * right);
        total.join(p, t, n, left, split, right);
    }
}

// Writes (width, row), each row times its factor, as rows of a tensor.
static void write_rows(const Problem& p, const Tile& t, const View& view, int64_t width, const float* from,
                       const float* factors) {
    char* rows[BLOCK_M];
    for (int r = 0; r < t.count; ++r) rows[r] = t.row(p, view, r);
    for_dtype(p.dtype, [&](auto dtype) {
        lanes_to_rows(t.count, width, from, t.lanes(), [&](int64_t r, int64_t c, int64_t count, vec x) {
            store_part(dtype, rows[r] + c * size_of(dtype), x * factors[r], count);
        });
    });
}

// Maximum and sum of row r with its sink logit.
struct Total {
    float row_max;  // as a score
    float share;    // factor of the sums of keys
    float row_sum;

    Total(const Problem& p, const Tile& t, int r, float row_max, float row_sum)
        : row_max(only_scaled(p) ? row_max * p.scale : row_max), share(1.0f), row_sum(row_sum) {
        if (!p.sink_logits) return;
        const float sink = p.sink_logits[t.head[r]];
        const float with_sink = this->row_max > sink ? this->row_max : sink;
        const float base = with_sink == -INF ? 0.0f : with_sink;
        share = std::exp2((this->row_max - base) * LOG2E);
        this->row_sum = row_sum * share + std::exp2((sink - base) * LOG2E);
        this->row_max = base;
    }
};

// The factor that normalises the sums of row r. Writes its lse.
static inline float normalise(const Problem& p, const Tile& t, int r, float row_max, float row_sum) {
    const Total total(p, t, r, row_max, row_sum);
    if (p.lse) p.lse[t.index_of(p, r)] = total.row_sum == 0 ? -INF : total.row_max + std::log2(total.row_sum) * LN2;
    return total.row_sum == 0 ? 0.0f : total.share / total.row_sum;
}

// Output and lse of a tile from its state.
static void finish(const Problem& p, const Tile& t, const State& state) {
    float normaliser[BLOCK_M];
    for (int r = 0; r < t.count; ++r) normaliser[r] = normalise(p, t, r, state.row_max[r], state.row_sum[r]);
    write_rows(p, t, p.out, p.value_width, state.out, normaliser);
}

}  // namespace QKV_ISA
}  // namespace qkv
