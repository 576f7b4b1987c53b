// Attention forward, for a tile of query rows at a time.
//
// The rows of a tile are the (token, head) pairs of one key/value head, tokens first: all query heads of a group share
// one pass over keys and values, whatever the group. They lie along the lanes of vectors, so that scores, maxima,
// exponentials and sums of a row never cross lanes: a row has the same bits in any tile, batch or thread.
//
// Keys go by in blocks at multiples of BLOCK. Within a block at an edge of the mask, segments of keys are computed only
// for the vectors of rows that see any of them.
#pragma once

#include "matmul/amx.h"
#include "softmax/online.h"

namespace qkv {
namespace QKV_ISA {

// Memory for the forward pass of a tile.
template <class Kind, class AnyState>
struct ForwardRoom {
    float *panel, *scores, *allowed, *bias, *keys, *values, *sums, *state, *total;

    ForwardRoom(const Problem& p, Placer& place) {
        panel = place((p.width + LANES) * ROWS);
        scores = place(BLOCK * ROWS);
        allowed = place(p.allow.data ? BLOCK * ROWS : 0);
        bias = place(p.bias.data ? BLOCK * ROWS : 0);
        keys = place(Format<Kind>::floats(BLOCK, p.width));
        values = place(Format<Kind>::floats(BLOCK, p.value_width));
        sums = place(AnyState::floats(p));
        state = place(AnyState::floats(p));
        total = place(AnyState::floats(p));
    }
};

// Moves the maxima of a tile up where that is needed, and all sums with them. Returns where exponents begin.
template <class AnyState>
static void raise(const Problem& p, const Tile& t, const vec* peak, const AnyState& state, Origin* origins) {
    for (int n = 0; n < t.vecs; ++n) {
        const vec from = load(state.top + n * LANES);
        const Rise rise(p, from, peak[n], AnyState::EXACT);
        origins[n] = rise.origin;
        if (!any(rise.rows)) continue;
        store(state.top + n * LANES, rise.top);
        if (!any(rise.rows & (from > -INF))) continue;  // nothing was summed up yet
        store(state.sum + n * LANES, load(state.sum + n * LANES) * rise.shrink);
        state.scale(p, t, n, rise.shrink);
    }
}

// A hidden value that is not finite must not meet its weight of 0. Adds the visible ones of a block by hand and returns
// values in which they are 0.
template <class Kind, class AnyState>
static const typename Kind::Element* without_poison(const Problem& p, const Tile& t, const Block& b,
                                                    const typename Kind::Element* values, int64_t& stride,
                                                    const ForwardRoom<Kind, AnyState>& room, const AnyState& state) {
    typename Kind::Element* clean = Format<Kind>::own(values, p.value_width, b.size, room.values, stride);
    for (int i = 0; i < b.count; ++i) {
        const Segment& s = b.parts[i];
        for (int j = s.begin; j < s.end; ++j) {
            const char* row = row_of(p, p.v, t.batch, t.kv_head, b.first + j);
            for (int64_t d = 0; d < p.value_width; ++d) {
                const float x = read(p.dtype, row, d);
                if (std::isfinite(x)) continue;
                for (int r = s.first * LANES; r < std::min(t.count, s.last * LANES); ++r)
                    if (may_see(p, t, r, b.first + j) && (!p.allow.data || room.allowed[j * t.lanes() + r] != 0))
                        state.at(p, t, r, d) += room.scores[j * t.lanes() + r] * x;
                Format<Kind>::clear(clean, stride, j, d);
            }
        }
    }
    // Those that lie beside the last one.
    for (int j = b.size; j % Format<Kind>::ABREAST != 0; ++j)
        for (int64_t d = 0; d < p.value_width; ++d) Format<Kind>::clear(clean, stride, j, d);
    return clean;
}

// Calls work(n, count) for the vectors of a segment, several at a time, with their number as a constant: what belongs
// to them then stays in registers.
template <class Work>
static inline void for_vectors(const Segment& s, Work work) {
    int n = s.first;
    for (; n + 4 <= s.last; n += 4) work(n, std::integral_constant<int, 4>());
    for (; n < s.last; ++n) work(n, std::integral_constant<int, 1>());
}

// Whether scores of a segment are not finite, before anything has been added to them or hidden. A key that is not
// finite makes those of all rows so, and a row those of all keys: one vector of each key and one key of each vector
// tell.
static inline bool are_strange(const Tile& t, const Segment& s, const float* scores) {
    constexpr int ABREAST = 4;  // a single sum would wait for itself
    const int64_t lanes = t.lanes();
    const float* const corner = scores + s.begin * lanes + s.first * LANES;
    const int keys = s.end - s.begin;
    vec zero[ABREAST] = {};  // stay so, unless a number is not finite
    int j = 0;
    for (; j + ABREAST <= keys; j += ABREAST)
        for (int i = 0; i < ABREAST; ++i) zero[i] += 0.0f * load(corner + (j + i) * lanes);
    for (; j < keys; ++j) zero[0] += 0.0f * load(corner + j * lanes);
    for (int n = 1; n < s.last - s.first; ++n) zero[1] += 0.0f * load(corner + n * LANES);
    return any((zero[0] + zero[1]) + (zero[2] + zero[3]) != 0.0f);
}

// A score that is not finite makes its row NaN, be it -inf, which would pass for hidden.
static void spoil(const Tile& t, const Segment& s, float* scores) {
    for (int j = s.begin; j < s.end; ++j) {
        for (int n = s.first; n < s.last; ++n) {
            float* const at = scores + j * t.lanes() + n * LANES;
            store(at, finite_or_nan(load(at)));
        }
    }
}

template <int COUNT>
static inline void find_peaks(const Tile& t, const Segment& s, int n, const float* scores, vec* peak) {
    constexpr int ABREAST = 4 / COUNT;  // keys: a single maximum would wait for itself
    const int64_t lanes = t.lanes();
    vec found[ABREAST][COUNT];
    const auto look = [&](int64_t j, int k) {
        for (int i = 0; i < COUNT; ++i) found[k][i] = max(load(scores + j * lanes + (n + i) * LANES), found[k][i]);
    };
    for (int k = 0; k < ABREAST; ++k)
        for (int i = 0; i < COUNT; ++i) found[k][i] = peak[i];
    int64_t j = s.begin;
    for (; j + ABREAST <= s.end; j += ABREAST)
        for (int k = 0; k < ABREAST; ++k) look(j + k, k);
    for (; j < s.end; ++j) look(j, 0);
    for (int k = 0; k < ABREAST; ++k)
        for (int i = 0; i < COUNT; ++i) peak[i] = max(found[k][i], peak[i]);
}

// Scores become weights, which are added up, and pairs of them if wanted.
template <class Kind, int COUNT, bool PAIRS, bool FUSED>
static inline void weigh(const Problem& p, const Tile& t, const Segment& s, int n, const Origin* origins, float* scores,
                         vec* sum) {
    constexpr int STEP = PAIRS ? 2 : 1;
    const float factor = exponent_factor(p);
    const int64_t lanes = t.lanes();
    Origin from[COUNT];
    vec found[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        from[i] = origins[i];
        found[i] = sum[i];
    }
    const auto next = [&](const float* at, int i) {
        const vec weight = exp2(exponents(FUSED, load(at), factor, from[i]));
        found[i] = found[i] + weight;
        return weight;
    };
    constexpr int NAP = 24;  // keys of four vectors; fewer vectors leave less to be slept through
    for (int64_t j = s.begin, end = s.end; j < end; j += STEP) {
        if (COUNT == 4 && (j - s.begin) % NAP == 0) Kind::stay_awake();
        for (int i = 0; i < COUNT; ++i) {
            float* const at = scores + j * lanes + (n + i) * LANES;
            const vec weight = next(at, i);
            if constexpr (PAIRS)
                store(at - (j - j / 2) * lanes, Kind::of(weight, j + 1 < end ? next(at + lanes, i) : vec{}));
            else
                store(at, weight);
        }
    }
    for (int i = 0; i < COUNT; ++i) sum[i] = found[i];
}

static void drop(const Tile& t, const Block& b, const Segment& s, const Dropout& dropout, float* weights) {
    for (int j = s.begin; j < s.end; ++j) {
        for (int n = s.first; n < s.last; ++n) {
            float* const at = weights + j * t.lanes() + n * LANES;
            store(at, load(at) * dropout.factors(b.first + j, n));
        }
    }
}

// Folds the keys [begin, end) into the state of a tile.
template <class Kind, class Laid, class AnyState>
static void fold(const Problem& p, const Tile& t, const Laid& laid, const Dropout& dropout, int64_t begin, int64_t end,
                 const ForwardRoom<Kind, AnyState>& room, const AnyState& state) {
    typedef Format<Kind> F;
    const bool plain = plain_scores(p);
    float* const scores = room.scores;
    for (int64_t first = begin; first < end; first += BLOCK) {
        const Block b(p, t, first, end, Kind::GRAIN);
        if (b.count == 0) continue;
        int64_t key_stride, value_stride;
        const auto* keys = laid.keys(p, t, first, b.size, room.keys, key_stride);
        if (p.bias.data) gather(t, p.bias, first, b.size, room.bias);
        if (p.allow.data) gather(t, p.allow, first, b.size, room.allowed);

        vec peak[ROWS / LANES], sum[ROWS / LANES];
        Origin origins[ROWS / LANES];
        for (int n = 0; n < t.vecs; ++n) peak[n] = set1(-INF);
        for (int i = 0; i < b.count; ++i) {
            const Segment& s = b.parts[i];
            multiply_rows(Kind(), t, s, p.width, keys, key_stride, room.panel, scores);
            if (are_strange(t, s, scores)) spoil(t, s, scores);
            if (!plain) transform(p, t, b, s, room.bias, scores, nullptr);
            if (b.edge) hide(p, t, b, s, room.allowed, -INF, scores);
            for_vectors(s, [&](int n, auto count) { find_peaks<decltype(count)::value>(t, s, n, scores, peak + n); });
        }

        const bool poisoned = (b.edge || b.size % F::ABREAST != 0) && !laid.are_finite(p, t, first, b.size);  // values
        const bool apart = !F::PACKS || poisoned || p.dropout > 0;  // weights are needed before they are paired
        raise(p, t, peak, state, origins);
        for (int n = 0; n < t.vecs; ++n) sum[n] = load(state.sum + n * LANES);
        for (int i = 0; i < b.count; ++i) {
            const Segment& s = b.parts[i];
            for_vectors(s, [&](int n, auto count) {
                constexpr int COUNT = decltype(count)::value;
                const bool fused =
                    std::all_of(origins + n, origins + n + COUNT, [](const Origin& o) { return o.fused; });
                const auto some = [&](auto pairs, auto at_once) {
                    weigh<Kind, COUNT, pairs, at_once>(p, t, s, n, origins + n, scores, sum + n);
                };
                typedef std::bool_constant<F::PACKS> Pairs;
                if (fused)
                    apart ? some(std::false_type(), std::true_type()) : some(Pairs(), std::true_type());
                else
                    apart ? some(std::false_type(), std::false_type()) : some(Pairs(), std::false_type());
            });
            if (p.dropout > 0) drop(t, b, s, dropout, scores);
        }
        for (int n = 0; n < t.vecs; ++n) store(state.sum + n * LANES, sum[n]);

        const auto* values = laid.values(p, t, first, b.size, room.values, value_stride);
        if (poisoned) values = without_poison(p, t, b, values, value_stride, room, state);
        // The error of a long sum grows with its length, so each block is summed by itself; in one go, or where it has
        // several segments on the side: how they are cut must not show.
        const bool by_blocks = !F::PACKS, aside = by_blocks && b.count > 1;
        float* const sums = aside ? room.sums : state.out;
        const int64_t numbers = AnyState::numbers(p, t);
        if (aside) std::fill(sums, sums + numbers, 0.0f);
        for (int i = 0; i < b.count; ++i) {
            if (apart)
                F::pack_keys(t, b.parts[i], scores, scores);
            else
                F::pad_keys(t, b.parts[i], scores);
            sum_over_keys(Kind(), t, b.parts[i], p.value_width, values, value_stride, scores, sums,
                          by_blocks && !aside);
        }
        if (aside)
            for (int64_t n = 0; n < numbers; n += LANES) store(state.out + n, load(state.out + n) + load(sums + n));
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
