// From products to scores: scale, softcap, bias and ALiBi, in this order; and dropout of the weights.
#pragma once

#include "mask/key_block.h"

namespace qkv {
namespace QKV_ISA {

// Whether scores are products times one factor that can be divided by, with no softcap, bias or ALiBi.
static inline bool only_scaled(const Problem& p) {
    return p.softcap == 0 && !p.bias.data && !p.alibi && p.scale > 1e-30f && p.scale < 1e30f;
}

// What turns a score into an exponent of 2.
static inline float exponent_factor(const Problem& p) { return only_scaled(p) ? p.scale * LOG2E : LOG2E; }

// Origin of the exponents of a vector of rows: they are (x - base) * factor - shift.
struct Origin {
    vec base;    // in units of scores
    vec shift;   // in units of exponents
    bool fused;  // whether all bases are 0, and exponents one multiply-add

    // Exponents are 0 at `row_max`. A shift is rounded in proportion to its size, and a bias can make scores as large
    // as floats get, while x - base is exact for equal ones. So there is a shift only for scaled-only scores below
    // LARGE_SCORE, and never if `exact`.
    static Origin at(const Problem& p, vec row_max, bool exact) {
        if (exact || !only_scaled(p)) return {row_max, vec{}, false};
        const vec shift = row_max * exponent_factor(p);
        const ivec large = (shift > LARGE_SCORE) | (shift < -LARGE_SCORE);
        return {large ? row_max : vec{}, large ? vec{} : shift, !any(large)};
    }
};

// Exponents of 2 from scores. Rows with a base of 0 have the same bits either way, whatever other lanes hold.
static inline vec exponents(bool fused, vec x, float factor, const Origin& from) {
    return fused ? x * factor - from.shift : (x - from.base) * factor - from.shift;
}

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

// A bias within the range of exponents of 2. The lowest float is a common way to hide a key: a row of nothing else has
// equal weights.
static inline vec bounded(vec bias) {
    constexpr float MOST = 2e38f;
    const vec low = ((bias < -MOST) & (bias > -INF)) ? set1(-MOST) : bias;
    return ((low > MOST) & (low < INF)) ? set1(MOST) : low;
}

static inline vec absolute(ivec distance) { return __builtin_convertvector(distance < 0 ? -distance : distance, vec); }

// Whether scores are not linear in their products, so that `transform` has a slope to give.
static inline bool has_slope(const Problem& p) { return p.softcap != 0; }

// Scores from products, where they need more than one factor. `lanes` are the scores of a vector: lanes.bias() gives
// their bias and lanes.minus_alibi(x) subtracts their penalty of ALiBi; both are called only if the problem has one.
// `slope`, if not null, takes the derivative by the scaled product, which is finite even where the score is not: a
// hidden key must leave no trace.
template <class Lanes>
[[gnu::always_inline]] static inline vec transform(const Problem& p, vec product, const Lanes& lanes,
                                                   float* slope = nullptr) {
    vec x = product * p.scale;
    if (p.softcap != 0) {
        const vec y = tanh(x / p.softcap);
        x = p.softcap * y;
        if (slope) store(slope, y == y ? 1.0f - y * y : vec{});
    }
    if (p.bias.data) x = x + bounded(lanes.bias());
    if (p.alibi) x = lanes.minus_alibi(x);
    return x;
}

// A vector of the scores of a block, for `transform`: those at `at`, of key `key` and the rows of vector n.
struct BlockLanes {
    const Tile& t;
    const float* block_bias;
    int64_t at;
    int n;
    int32_t key;

    vec bias() const { return load(block_bias + at); }
    vec minus_alibi(vec x) const { return x - load(t.slope + n * LANES) * absolute(vector_of(t.position, n) - key); }
};

// The same for a segment. `bias` is the block of the bias, if there is one, and `slope` null or a block.
static void transform(const Problem& p, const Tile& t, const Block& b, const Segment& s, const float* bias,
                      float* scores, float* slope) {
    for (int j = s.begin; j < s.end; ++j) {
        for (int n = s.first; n < s.last; ++n) {
            const int64_t at = j * t.lanes() + n * LANES;
            const BlockLanes lanes = {t, bias, at, n, (int32_t)(b.first + j)};
            store(scores + at, transform(p, load(scores + at), lanes, slope ? slope + at : nullptr));
        }
    }
}

// Which weights are dropped depends on the seed, the batch, the head and the positions of the query and the key alone,
// so that the backward pass draws the same ones, whatever the tiles and threads, and so do calls that have some of the
// heads, queries and keys. Two rounds of a 32-bit mixer (Wellons' "lowbias32") with a key of 64 bits for each row: the
// number of splitmix64 that its position counts, from a state of each head. `scores.py` draws the same.
struct Dropout {
    uint32_t low[BLOCK_M], high[BLOCK_M];
    uint32_t least;  // numbers below drop their weight
    float kept;      // factor of the others
    uint32_t first_key;

    Dropout(const Problem& p, const Tile& t) {
        least = (uint32_t)std::min(p.dropout * 4294967296.0, 4294967295.0);
        kept = 1.0f / (1.0f - p.dropout);
        first_key = (uint32_t)p.first_key;
        for (int r = 0; p.dropout > 0 && r < t.lanes(); ++r) {
            const uint64_t head = (uint64_t)t.batch << 32 | (uint32_t)(t.head[r] + p.first_head);
            const uint64_t state = mix(p.seed ^ mix(head + GOLDEN));
            const uint64_t key = mix(state + (uint64_t)(t.position[r] + p.first_key) * GOLDEN);
            low[r] = (uint32_t)key;
            high[r] = (uint32_t)(key >> 32);
        }
    }

    // The factors of the weights of a key, for vector n of the rows.
    vec factors(int64_t key, int n) const {
        uvec a, b;
        std::memcpy(&a, low + n * LANES, sizeof a);
        std::memcpy(&b, high + n * LANES, sizeof b);
        return factors(uvec{} + (uint32_t)key, a, b);
    }

    // For a vector whose lane i stands for key first + i / rows and row row_of(i).
    template <class RowOf>
    vec factors_of(int64_t first, int rows, RowOf row_of) const {
        uvec key, a, b;
        for (int i = 0; i < LANES; ++i) {
            key[i] = (uint32_t)(first + i / rows);
            a[i] = low[row_of(i)];
            b[i] = high[row_of(i)];
        }
        return factors(key, a, b);
    }

   private:
    static constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15u;

    vec factors(uvec key, uvec a, uvec b) const {
        return scatter(scatter(a ^ (key + first_key)) + b) >= least ? set1(kept) : vec{};
    }

    static uint64_t mix(uint64_t x) {  // splitmix64
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    }

    static uvec scatter(uvec x) {
        x = (x ^ (x >> 16)) * 0x7feb352du;
        x = (x ^ (x >> 15)) * 0x846ca68bu;
        return x ^ (x >> 16);
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
