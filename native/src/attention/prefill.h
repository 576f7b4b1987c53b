// Attention forward, for a tile of query rows at a time.
//
// The rows of a tile are the (token, head) pairs of one key/value head, tokens first: all query heads of a group share
// one pass over keys and values, whatever the group. They lie along the lanes of vectors, so that scores, maxima,
// exponentials and sums of a row never cross lanes: a row has the same bits in any tile, batch or thread.
//
// Keys come in blocks at multiples of BLOCK_N. Within a block at an edge of the mask, segments of keys are computed
// only for the vectors of rows that see any of them.
#pragma once

#include "matmul/amx.h"
#include "softmax/nonfinite.h"
#include "softmax/online.h"

namespace qkv {
namespace QKV_ISA {

// Memory for the forward pass of a tile.
template <class Kind, class AnyState>
struct ForwardScratch {
    float *packed, *scores, *allowed, *bias, *keys, *values, *sums, *state, *total;

    ForwardScratch(const Problem& p, ArenaLayout& arena) {
        packed = arena((p.width + LANES) * BLOCK_M);
        scores = arena(BLOCK_N * BLOCK_M);
        allowed = arena(p.allow.data ? BLOCK_N * BLOCK_M : 0);
        bias = arena(p.bias.data ? BLOCK_N * BLOCK_M : 0);
        keys = arena(OperandPacking<Kind>::floats(BLOCK_N, p.width));
        values = arena(OperandPacking<Kind>::floats(BLOCK_N, p.value_width));
        sums = arena(AnyState::floats(p));
        state = arena(AnyState::floats(p));
        total = arena(AnyState::floats(p));
    }
};

// Moves the maxima of a tile up where needed, rescales its sums, and fills in the origins of exponents.
template <class AnyState>
static void update_row_max(const Problem& p, const Tile& t, const vec* block_max, const AnyState& state,
                           Origin* origins) {
    for (int n = 0; n < t.vecs; ++n) {
        const vec from = load(state.row_max + n * LANES);
        const RowMaxUpdate update(p, from, block_max[n], AnyState::EXACT);
        origins[n] = update.origin;
        if (!any(update.rows)) continue;
        store(state.row_max + n * LANES, update.row_max);
        if (!any(update.rows & (from > -INF))) continue;  // nothing was summed up yet
        store(state.row_sum + n * LANES, load(state.row_sum + n * LANES) * update.rescale);
        state.scale(p, t, n, update.rescale);
    }
}

// Adds the visible values of a block that are not finite, and returns values in which all of these are 0. Rare, so
// never inlined into the loop over blocks.
template <class Kind, class AnyState>
[[gnu::noinline]] static Operand<const typename Kind::Element> add_visible_nonfinite(
    const Problem& p, const Tile& t, const Block& b, const Operand<const typename Kind::Element>& values,
    const ForwardScratch<Kind, AnyState>& scratch, const AnyState& state) {
    const auto clean = OperandPacking<Kind>::writable(values, p.value_width, b.size, scratch.values);
    const auto at = [&](int j, int r) { return j * t.lanes() + r; };
    for (int i = 0; i < b.count; ++i) {
        separate_nonfinite(
            p, t, b, b.parts[i],
            [&](int j, int r) {
                return may_see(p, t, r, b.first + j) && (!p.allow.data || scratch.allowed[at(j, r)] != 0);
            },
            [&](int j, int r, int64_t d, float x) { state.at(p, t, r, d) += scratch.scores[at(j, r)] * x; },
            [&](int j, int64_t d) { OperandPacking<Kind>::clear(clean, j, d); });
    }
    // Keys beyond the block in the same row of `along_keys`.
    for (int j = b.size; j % OperandPacking<Kind>::KEYS_PER_ROW != 0; ++j)
        for (int64_t d = 0; d < p.value_width; ++d) OperandPacking<Kind>::clear(clean, j, d);
    return {clean.data, clean.stride};
}

// Calls work(n, count) for the vectors of a segment, several at a time, with their number as a constant: their maxima
// and sums then stay in registers.
template <class Work>
static inline void for_vectors(const Segment& s, Work work) {
    int n = s.first;
    for (; n + VECS_AT_ONCE <= s.last; n += VECS_AT_ONCE) work(n, std::integral_constant<int, VECS_AT_ONCE>());
    for (; n < s.last; ++n) work(n, std::integral_constant<int, 1>());
}

template <int COUNT>
static inline void find_block_max(const Tile& t, const Segment& s, int n, const float* scores, vec* block_max) {
    constexpr int KEYS = SUMS_AT_ONCE / COUNT;  // a single maximum would wait for itself
    const int64_t lanes = t.lanes();
    vec maxima[KEYS][COUNT];
    const auto update = [&](int64_t j, int k) {
        for (int i = 0; i < COUNT; ++i) maxima[k][i] = max(load(scores + j * lanes + (n + i) * LANES), maxima[k][i]);
    };
    for (int k = 0; k < KEYS; ++k)
        for (int i = 0; i < COUNT; ++i) maxima[k][i] = block_max[i];
    int64_t j = s.begin;
    for (; j + KEYS <= s.end; j += KEYS)
        for (int k = 0; k < KEYS; ++k) update(j + k, k);
    for (; j < s.end; ++j) update(j, 0);
    for (int k = 0; k < KEYS; ++k)
        for (int i = 0; i < COUNT; ++i) block_max[i] = max(maxima[k][i], block_max[i]);
}

// Scores become weights, which are added to `sum`; PAIRS stores them packed, two keys side by side.
template <class Kind, int COUNT, bool PAIRS, bool FUSED>
static inline void exp_and_sum(const Problem& p, const Tile& t, const Segment& s, int n, const Origin* origins,
                               float* scores, vec* sum) {
    constexpr int STEP = PAIRS ? 2 : 1;
    const float factor = exponent_factor(p);
    const int64_t lanes = t.lanes();
    Origin from[COUNT];
    vec sums[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        from[i] = origins[i];
        sums[i] = sum[i];
    }
    const auto add_weight = [&](const float* at, int i) {
        const vec weight = exp2(exponents(FUSED, load(at), factor, from[i]));
        sums[i] = sums[i] + weight;
        return weight;
    };
    for (int64_t j = s.begin, end = s.end; j < end; j += STEP) {
        if (COUNT == VECS_AT_ONCE && (j - s.begin) % AMX_IDLE_KEYS == 0) Kind::keep_amx_warm();
        for (int i = 0; i < COUNT; ++i) {
            float* const at = scores + j * lanes + (n + i) * LANES;
            const vec weight = add_weight(at, i);
            if constexpr (PAIRS)
                store(at - (j - j / 2) * lanes, Kind::of(weight, j + 1 < end ? add_weight(at + lanes, i) : vec{}));
            else
                store(at, weight);
        }
    }
    for (int i = 0; i < COUNT; ++i) sum[i] = sums[i];
}

static void drop(const Tile& t, const Block& b, const Segment& s, const Dropout& dropout, float* weights) {
    for (int j = s.begin; j < s.end; ++j) {
        for (int n = s.first; n < s.last; ++n) {
            float* const at = weights + j * t.lanes() + n * LANES;
            store(at, load(at) * dropout.factors(b.first + j, n));
        }
    }
}

// Adds the keys [begin, end) to the state of a tile.
template <class Kind, class Operands, class AnyState>
static void accumulate_keys(const Problem& p, const Tile& t, const Operands& operands, const Dropout& dropout,
                            int64_t begin, int64_t end, const ForwardScratch<Kind, AnyState>& scratch,
                            const AnyState& state) {
    using F = OperandPacking<Kind>;
    const bool scaled = only_scaled(p);
    float* const scores = scratch.scores;
    for (int64_t first = begin; first < end; first += BLOCK_N) {
        const Block b(p, t, first, end, Kind::GRAIN);
        if (b.count == 0) continue;
        const auto keys = operands.keys(p, t, first, b.size, scratch.keys);
        if (p.bias.data) gather(t, p.bias, first, b.size, scratch.bias);
        if (p.allow.data) gather(t, p.allow, first, b.size, scratch.allowed);

        vec block_max[BLOCK_M / LANES], sum[BLOCK_M / LANES];
        Origin origins[BLOCK_M / LANES];
        for (int n = 0; n < t.vecs; ++n) block_max[n] = set1(-INF);
        for (int i = 0; i < b.count; ++i) {
            const Segment& s = b.parts[i];
            multiply_rows(Kind(), t, s, p.width, keys, scratch.packed, scores);
            if (have_nonfinite(t, s, scores)) spread_nan(t, s, scores);
            if (!scaled) transform(p, t, b, s, scratch.bias, scores, nullptr);
            if (b.edge) hide(p, t, b, s, scratch.allowed, -INF, scores);
            for_vectors(s, [&](int n, auto count) {
                find_block_max<decltype(count)::value>(t, s, n, scores, block_max + n);
            });
        }

        const bool nonfinite =
            (b.edge || b.size % F::KEYS_PER_ROW != 0) && !operands.are_finite(p, t, first, b.size);  // values
        const bool pack_later = !F::PACKS || nonfinite || p.dropout > 0;  // weights are first needed in fp32
        update_row_max(p, t, block_max, state, origins);
        for (int n = 0; n < t.vecs; ++n) sum[n] = load(state.row_sum + n * LANES);
        for (int i = 0; i < b.count; ++i) {
            const Segment& s = b.parts[i];
            for_vectors(s, [&](int n, auto count) {
                constexpr int COUNT = decltype(count)::value;
                const bool fused =
                    std::all_of(origins + n, origins + n + COUNT, [](const Origin& o) { return o.fused; });
                const auto run = [&](auto pairs, auto is_fused) {
                    exp_and_sum<Kind, COUNT, pairs, is_fused>(p, t, s, n, origins + n, scores, sum + n);
                };
                using Pairs = std::bool_constant<F::PACKS>;
                if (fused)
                    pack_later ? run(std::false_type(), std::true_type()) : run(Pairs(), std::true_type());
                else
                    pack_later ? run(std::false_type(), std::false_type()) : run(Pairs(), std::false_type());
            });
            if (p.dropout > 0) drop(t, b, s, dropout, scores);
        }
        for (int n = 0; n < t.vecs; ++n) store(state.row_sum + n * LANES, sum[n]);

        auto values = operands.values(p, t, first, b.size, scratch.values);
        if (nonfinite) values = add_visible_nonfinite(p, t, b, values, scratch, state);
        // The error of a long sum grows with its length, so each block is summed by itself. A block of several segments
        // is summed in scratch first, for the bits must not depend on how it is cut.
        const bool by_blocks = !F::PACKS, in_scratch = by_blocks && b.count > 1;
        float* const sums = in_scratch ? scratch.sums : state.out;
        const int64_t numbers = AnyState::numbers(p, t);
        if (in_scratch) std::fill(sums, sums + numbers, 0.0f);
        for (int i = 0; i < b.count; ++i) {
            if (pack_later)
                F::pack_weights(t, b.parts[i], scores, scores);
            else
                F::pad_weights(t, b.parts[i], scores);
            sum_over_keys(Kind(), t, b.parts[i], p.value_width, values, scores, sums, by_blocks && !in_scratch);
        }
        if (in_scratch)
            for (int64_t n = 0; n < numbers; n += LANES) store(state.out + n, load(state.out + n) + load(sums + n));
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
