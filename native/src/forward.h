// Attention forward, for a tile of query rows at a time.
//
// The rows of a tile are the (token, head) pairs of one key/value head, tokens first: all query heads of a group share
// one pass over keys and values, whatever the group. They lie along the lanes of vectors, so that scores, maxima,
// exponentials and sums of a row never cross lanes: a row has the same bits in any tile, batch or thread.
//
// Keys go by in blocks at multiples of BLOCK. Within a block at an edge of the mask, segments of keys are computed only
// for the vectors of rows that see any of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "few.h"
#include "format.h"

namespace qkv {
namespace QKV_ISA {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;
constexpr float INF = std::numeric_limits<float>::infinity();

// Whether scores need no more than the product, the mask and one factor.
static inline bool plain_scores(const Problem& p) { return p.softcap == 0 && !p.alibi && p.scale > 0; }

// What turns a score into an exponent of 2.
static inline float exponent_factor(const Problem& p) { return plain_scores(p) ? p.scale * LOG2E : LOG2E; }

static inline vec tanh(vec x) {
    const vec e = exp2(x * (2 * LOG2E));
    const vec far = x > 20.0f ? set1(1.0f) : 1.0f - 2.0f / (1.0f + e);
    const vec y = x * x;  // near 0 the formula above cancels
    vec p = set1(62.0f / 2835.0f);
    p = p * y - 17.0f / 315.0f;
    p = p * y + 2.0f / 15.0f;
    p = p * y - 1.0f / 3.0f;
    const vec near = x + x * y * p;
    return ((x < 0.25f) & (x > -0.25f)) ? near : far;
}

static inline ivec positions(const Tile& t, int n) {
    ivec position;
    std::memcpy(&position, t.position + n * LANES, sizeof position);
    return position;
}

static inline bool is_kept(const Problem& p, const Tile& t, int64_t key) {
    return !p.keep || p.keep[t.batch * p.keep_batch + key];
}

static inline bool sees(const Problem& p, const Tile& t, int row, int64_t key) {
    const int64_t position = t.position[row];
    return key <= position + p.right && (key >= position - p.left || key < p.sink_tokens) && is_kept(p, t, key);
}

// Scale, softcap and ALiBi of a segment, for scores that need more than one factor.
static void transform(const Problem& p, const Tile& t, int64_t block, const Segment& s, float* scores) {
    for (int j = s.begin; j < s.end; ++j) {
        for (int n = s.first; n < s.last; ++n) {
            float* at = scores + j * t.lanes() + n * LANES;
            vec x = load(at) * p.scale;
            if (p.softcap != 0) x = p.softcap * tanh(x / p.softcap);
            if (p.alibi) {
                const ivec distance = positions(t, n) - (int32_t)(block + j);
                x = x - load(t.slope + n * LANES) * __builtin_convertvector(distance < 0 ? -distance : distance, vec);
            }
            store(at, x);
        }
    }
}

// -inf where a row does not see a key.
static void hide(const Problem& p, const Tile& t, int64_t block, const Segment& s, float* scores) {
    const int64_t limit = 1 << 30;
    const int32_t right = (int32_t)std::min(p.right, limit), left = (int32_t)std::min(p.left, limit);
    for (int j = s.begin; j < s.end; ++j) {
        const int64_t key = block + j;
        for (int n = s.first; n < s.last; ++n) {
            float* at = scores + j * t.lanes() + n * LANES;
            const ivec distance = positions(t, n) - (int32_t)key;  // keys to the left
            ivec seen = distance >= -right;
            if (key >= p.sink_tokens) seen &= distance <= left;
            if (!is_kept(p, t, key)) seen = ivec{};
            store(at, seen ? load(at) : set1(-INF));
        }
    }
}

// The segments of a block: one where every row sees every key, else several with the rows that see some.
static int segments(const Problem& p, const Tile& t, int64_t block, int end, bool edge, Segment* found) {
    if (!edge) {
        found[0] = {0, end, 0, t.vecs};
        return 1;
    }
    int count = 0;
    for (int begin = 0; begin < end; begin += SEGMENT) {
        Segment s = {begin, std::min(begin + SEGMENT, end), 0, t.vecs};
        int first = 0, last = t.count;
        while (first < last && t.position[first] + p.right < block + s.begin) ++first;
        if (block + s.begin >= p.sink_tokens)
            while (last > first && t.position[last - 1] - p.left > block + s.end - 1) --last;
        s.first = first / LANES;
        s.last = (last + LANES - 1) / LANES;
        if (first < last) found[count++] = s;
    }
    return count;
}

// Moves the maximum of each row up to `peak` where that is needed, and all sums with it. Returns what is to be subtracted
// from exponents. A maximum may lag behind by a factor of 2^8, which spares most of the rescaling.
static void raise(const Problem& p, const Tile& t, const vec* peak, const State& state, vec* shift) {
    const float factor = exponent_factor(p), patience = 8.0f / factor;
    for (int n = 0; n < t.vecs; ++n) {
        const vec top = load(state.top + n * LANES);
        const ivec rises = peak[n] > top + patience;  // also from -inf, where nothing was seen yet
        const vec next = rises ? peak[n] : top;
        shift[n] = next == -INF ? set1(0.0f) : next * factor;
        if (!any(rises)) continue;
        // Exactly 1 for rows that stay: what other rows of a tile do must not show.
        const vec shrink = rises ? (top == -INF ? set1(0.0f) : exp2(top * factor - shift[n])) : set1(1.0f);
        store(state.top + n * LANES, next);
        store(state.sum + n * LANES, load(state.sum + n * LANES) * shrink);
        for (int64_t d = 0; d < p.value_width; ++d) {
            float* out = state.out + d * t.lanes() + n * LANES;
            store(out, load(out) * shrink);
        }
    }
}

// A hidden value that is not finite must not meet its weight of 0. Adds the visible ones of a block by hand and returns
// values in which they are 0.
template <class Kind>
static const typename Kind::Element* without_poison(const Problem& p, const Tile& t, int64_t block, int size,
                                                    const Segment* parts, int count, const typename Kind::Element* values,
                                                    int64_t& stride, Scratch& scratch, const State& state) {
    typename Kind::Element* clean = Format<Kind>::own_values(p, values, size, scratch.values, stride);
    for (int i = 0; i < count; ++i) {
        const Segment& s = parts[i];
        for (int j = s.begin; j < s.end; ++j) {
            const char* row = row_of(p, p.v, t.batch, t.kv_head, block + j);
            for (int64_t d = 0; d < p.value_width; ++d) {
                const float x = read(p.dtype, row, d);
                if (std::isfinite(x)) continue;
                for (int r = s.first * LANES; r < std::min(t.count, s.last * LANES); ++r)
                    if (sees(p, t, r, block + j)) state.out[d * t.lanes() + r] += scratch.scores[j * t.lanes() + r] * x;
                Format<Kind>::clear_value(p, clean, stride, j, d);
            }
        }
    }
    return clean;
}

// Folds the keys [begin, end) into the state of a tile.
template <class Kind>
static void fold(const Problem& p, const Tile& t, int64_t begin, int64_t end, Scratch& scratch, const State& state) {
    const int lanes = t.lanes();
    const bool plain = plain_scores(p);
    const float factor = exponent_factor(p);
    float* const scores = scratch.scores;
    constexpr int BLOCK = Format<Kind>::BLOCK;
    Segment parts[BLOCK / SEGMENT + 1];
    for (int64_t block = begin / BLOCK * BLOCK; block < end; block += BLOCK) {
        if (block + BLOCK <= t.begin && block >= p.sink_tokens) continue;
        const int size = (int)std::min<int64_t>(BLOCK, end - block);
        const bool edge = p.keep || block + size - 1 > t.low + p.right ||
                          (block + size > p.sink_tokens && block < t.high - p.left);
        const int count = segments(p, t, block, size, edge, parts);
        if (count == 0) continue;
        int64_t key_stride, value_stride;
        const auto* keys = Format<Kind>::keys(p, t, block, size, scratch.keys, key_stride);

        vec peak[ROWS / LANES], shift[ROWS / LANES], sum[ROWS / LANES];
        for (int n = 0; n < t.vecs; ++n) peak[n] = set1(-INF);
        for (int i = 0; i < count; ++i) {
            const Segment& s = parts[i];
            Format<Kind>::score(p, t, block, keys, key_stride, s, scratch.queries, scores);
            if (!plain) transform(p, t, block, s, scores);
            if (edge) hide(p, t, block, s, scores);
            for (int j = s.begin; j < s.end; ++j)
                for (int n = s.first; n < s.last; ++n) peak[n] = max(load(scores + j * lanes + n * LANES), peak[n]);
        }

        raise(p, t, peak, state, shift);
        for (int n = 0; n < t.vecs; ++n) sum[n] = load(state.sum + n * LANES);
        for (int i = 0; i < count; ++i) {
            const Segment& s = parts[i];
            for (int j = s.begin; j < s.end; ++j) {
                for (int n = s.first; n < s.last; ++n) {
                    float* at = scores + j * lanes + n * LANES;
                    const vec weight = exp2(load(at) * factor - shift[n]);
                    sum[n] = sum[n] + weight;
                    store(at, weight);
                }
            }
        }
        for (int n = 0; n < t.vecs; ++n) store(state.sum + n * LANES, sum[n]);

        const auto* values = Format<Kind>::values(p, t, block, size, scratch.values, value_stride);
        if (edge && !all_finite(p, t, block, size))
            values = without_poison<Kind>(p, t, block, size, parts, count, values, value_stride, scratch, state);
        for (int i = 0; i < count; ++i) {
            Format<Kind>::pack_weights(t, parts[i], scores);
            Format<Kind>::accumulate(p, t, values, value_stride, parts[i], scores, state.out);
        }
    }
}

// Folds the state of later keys into that of earlier ones.
static void merge(const Problem& p, const Tile& t, const State& total, const State& piece) {
    const float factor = exponent_factor(p);
    for (int n = 0; n < t.vecs; ++n) {
        const vec a = load(total.top + n * LANES), b = load(piece.top + n * LANES);
        const vec top = max(a, b);
        const vec base = top == -INF ? set1(0.0f) : top;
        const vec left = exp2((a - base) * factor), right = exp2((b - base) * factor);
        store(total.top + n * LANES, top);
        store(total.sum + n * LANES, load(total.sum + n * LANES) * left + load(piece.sum + n * LANES) * right);
        for (int64_t d = 0; d < p.value_width; ++d) {
            float* out = total.out + d * t.lanes() + n * LANES;
            store(out, load(out) * left + load(piece.out + d * t.lanes() + n * LANES) * right);
        }
    }
}

// Output and lse of a tile from its state.
static void finish(const Problem& p, const Tile& t, const State& state) {
    const float factor = exponent_factor(p);
    for (int r = 0; r < t.count; ++r) {
        const int64_t row = t.first + r, head = t.kv_head * group(p) + row % group(p), token = row / group(p);
        float top = state.top[r] == -INF ? -INF : state.top[r] * factor, sum = state.sum[r], share = 1.0f;
        if (p.sink_logits) {
            const float sink = p.sink_logits[head] * LOG2E;
            const float peak = top > sink ? top : sink;
            share = std::exp2(top - peak);
            sum = sum * share + std::exp2(sink - peak);
            top = peak;
        }
        const float normalise = sum == 0 ? 0.0f : share / sum;
        char* out = row_of(p, p.out, t.batch, head, token);
        const float* from = state.out + r;
        const int64_t lanes = t.lanes();
        if (p.dtype == Dtype::f32)
            for (int64_t d = 0; d < p.value_width; ++d) ((float*)out)[d] = from[d * lanes] * normalise;
        else
            for (int64_t d = 0; d < p.value_width; ++d) write(p.dtype, out, d, from[d * lanes] * normalise);
        if (p.lse) p.lse[(t.batch * p.heads + head) * p.lq + token] = sum == 0 ? -INF : (top + std::log2(sum)) * LN2;
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
