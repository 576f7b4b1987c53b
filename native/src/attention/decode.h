// Attention forward for the rows of a single query, as in decoding: one to eight heads that share their keys and
// values, or sixteen where tiles multiply them.
//
// With lanes as query rows, these would leave half or more of a vector empty. Here lanes lie along the width in both
// products, or tiles multiply, and along (key, row) in between. Every key and value is read once, in the order of
// memory, for all rows: the speed is that of memory.
#pragma once

#include "attention/decode_amx.h"
#include "attention/decode_sdot.h"
#include "attention/prefill.h"

namespace qkv {
namespace QKV_ISA {

// The state of decoding: rows of out lie as `Products` sums them.
struct DecodeState {
    static constexpr bool EXACT = false;

    float *row_max, *row_sum, *out;

    DecodeState(float* memory, const Tile&) : row_max(memory), row_sum(memory + LANES), out(memory + 2 * LANES) {}

    static int64_t floats(const Problem& p) { return 2 * LANES + rows_of_head(p) * pitch_of(p.value_width); }

    void clear(const Problem& p, const Tile& t) const {
        std::fill(row_max, row_max + LANES, -INF);
        std::fill(row_sum, row_sum + LANES, 0.0f);
        std::fill(out, out + numbers(p, t), 0.0f);
    }

    static int64_t numbers(const Problem& p, const Tile& t) { return t.count * pitch_of(p.value_width); }

    float& at(const Problem& p, const Tile&, int r, int64_t d) const { return out[r * pitch_of(p.value_width) + d]; }

    void scale(const Problem& p, const Tile& t, int, vec factor) const {
        const int64_t pitch = pitch_of(p.value_width);
        for (int r = 0; r < t.count; ++r)
            for (int64_t here = r * pitch; here < (r + 1) * pitch; here += LANES)
                store(out + here, load(out + here) * factor[r]);
    }

    void join(const Problem& p, const Tile& t, int, vec factor, const DecodeState& other, vec other_factor) const {
        const int64_t pitch = pitch_of(p.value_width);
        for (int r = 0; r < t.count; ++r)
            for (int64_t here = r * pitch; here < (r + 1) * pitch; here += LANES)
                store(out + here, load(out + here) * factor[r] + load(other.out + here) * other_factor[r]);
    }
};

// Memory of a thread for decoding.
struct DecodeScratch {
    float *queries, *q_scale, *scores, *values, *state, *total;

    DecodeScratch(const Problem& p, ArenaLayout& arena) {
        queries = arena(decode_rows(p) * pitch_of(p.width));
        q_scale = arena(decode_rows(p));
        scores = arena(decode_rows(p) * BLOCK_N);
        values = arena(BLOCK_N * p.value_width);
        state = arena(DecodeState::floats(p));
        total = arena(DecodeState::floats(p));
    }
};

// The number of a bias or a mask for row r and a key.
static inline float element(const Matrix& m, const Tile& t, int r, int64_t key) {
    return read(m.dtype, m.data, t.batch * m.batch + t.head[r] * m.head + key * m.column);
}

// How lanes stand for (key, row) pairs in decoding: lane i is key first + i / ROWS, row i % ROWS. COUNT is the number
// of rows, or 0 for that of the tile, and ROWS the next power of two; lanes without a row repeat the last one.
template <int COUNT, int ROWS>
struct DecodeLanes {
    const Problem& p;
    const Tile& t;

    int row(int lane) const { return std::min(lane % ROWS, (COUNT ? COUNT : t.count) - 1); }

    template <class Value>
    static vec each(Value value) {
        vec x;
        for (int i = 0; i < LANES; ++i) x[i] = value(i);
        return x;
    }

    vec gather(const Matrix& m, int64_t first) const {
        return each([&](int i) { return element(m, t, row(i), std::min(first + i / ROWS, p.lk - 1)); });
    }

    // Never inlined: decoding seldom drops weights.
    [[gnu::noinline]] vec dropout_of(const Dropout& dropout, int64_t first) const {
        return dropout.factors_of(first, ROWS, [&](int lane) { return row(lane); });
    }

    struct Repeated {
        static constexpr int at(int i) { return i / ROWS; }
    };

    // The scale of each key.
    vec scales_of(const Scales& scales, int64_t first) const {
        const vec by_key = load_part(Dtype::f32, scales.at(t.batch, t.kv_head, first), p.lk - first);
        return shuffle(by_key, by_key, Repeated());
    }

    // A vector of scores from key `first` on, for `transform`.
    struct ScoreLanes {
        const DecodeLanes& of;
        int64_t first;

        vec bias() const { return of.gather(of.p.bias, first); }
        vec minus_alibi(vec x) const {
            const int64_t position = of.t.position[0];
            return x -
                   each([&](int i) { return of.t.slope[of.row(i)] * (float)std::abs(position - (first + i / ROWS)); });
        }
    };

    // Never inlined: for scores that are only scaled, the loop around it stays small.
    [[gnu::noinline]] vec transform(int64_t first, vec x) const {
        return QKV_ISA::transform(p, x, ScoreLanes{*this, first});
    }

    bool may_see(int64_t key) const { return QKV_ISA::may_see(p, t, 0, key); }

    // -inf for keys that are hidden, or do not exist. Never inlined, as `transform`: only blocks at an edge need it.
    [[gnu::noinline]] vec hide(int64_t first, int64_t end, vec x) const {
        x = each([&](int i) { return first + i / ROWS < end && may_see(first + i / ROWS) ? 0.0f : -INF; }) == 0.0f
                ? x
                : set1(-INF);
        return p.allow.data ? (gather(p.allow, first) != 0.0f ? x : set1(-INF)) : x;
    }
};

// `add_visible_nonfinite` for the rows of one query: leaves the values of a block in scratch.values.
template <class Products>
[[gnu::noinline]] static void add_visible_nonfinite_decode(const Problem& p, const Tile& t, const Block& b,
                                                           const DecodeScratch& scratch, const DecodeState& state) {
    const int lanes = lanes_of(t.count);
    const int64_t pitch = pitch_of(p.value_width), bytes = p.value_width * size_of(p.dtype);
    const auto clean = [&](int j) { return (char*)scratch.values + j * bytes; };
    for (int j = 0; j < b.size; ++j) std::memcpy(clean(j), row_of(p, p.v, t, b.first + j), bytes);
    separate_nonfinite(
        p, t, b, {0, b.size, 0, t.vecs},
        [&](int j, int r) {
            return may_see(p, t, 0, b.first + j) && (!p.allow.data || element(p.allow, t, r, b.first + j) != 0);
        },
        [&](int j, int r, int64_t d, float x) {
            state.out[r * pitch + Products::column(d)] += scratch.scores[j * lanes + r] * x;
        },
        [&](int j, int64_t d) { write(p.dtype, clean(j), d, 0.0f); });
}

// Makes `state` that of the keys [begin, end). COUNT is the number of rows, or 0 for products that take it from the
// tile, and ROWS the next power of two.
template <class Products, int COUNT, int ROWS>
static void accumulate_keys_decode(const Problem& p, const Tile& t, const Dropout& dropout, int64_t begin, int64_t end,
                                   const DecodeScratch& scratch, const DecodeState& state) {
    using Lanes = DecodeLanes<COUNT, ROWS>;
    constexpr int KEYS = LANES / ROWS;  // keys of a vector
    // Keys read side by side: more would slow memory down.
    constexpr int AT_ONCE = COUNT == 1 ? 1 : std::min(KEYS, DECODE_KEYS);
    const Lanes lanes{p, t};
    const bool is_scaled = only_scaled(p);
    const float factor = exponent_factor(p);
    const int64_t item = size_of(p.kv_dtype), key_stride = p.k.row * item;
    const bool scaled = Products::SCALED && p.k_scale.data;
    const vec q_scale = Lanes::each([&](int i) { return scratch.q_scale[lanes.row(i)]; });
    vec row_max = set1(-INF), sum = {};
    [[maybe_unused]] vec sums[LANES] = {};  // lanes without a row stay 0
    state.clear(p, t);
    for (int64_t first = begin; first < end; first += BLOCK_N) {
        const Block b(p, t, first, end, F32::GRAIN);
        if (b.count == 0) continue;
        // Keys before a window are not read.
        const int from = first < p.sink_tokens ? 0 : (int)std::max<int64_t>(0, t.begin - first) / LANES * LANES;
        float* const scores = scratch.scores + from * ROWS;
        const char* const keys = row_of(p.kv_dtype, p.k, t.batch, t.kv_head, first);
        const char* values = row_of(p.kv_dtype, p.v, t.batch, t.kv_head, first);
        int64_t value_stride = p.v.row * item;
        vec block_max = set1(-INF);
        typename Products::template Prefetcher<ROWS> prefetcher(p, t, first);
        const int vecs = (b.size - from + KEYS - 1) / KEYS;
        if constexpr (Products::ON_TILES)
            Products::score(keys + from * key_stride, key_stride, b.size - from, p.width, scratch.queries,
                            scratch.scores + from * LANES, prefetcher);
        prefetcher.maxima(vecs);
        for (int j = from; j < b.size; j += KEYS) {
            vec x;
            if constexpr (Products::ON_TILES) {
                x = Products::template load_scores<ROWS>(scratch.scores, j);
            } else {
                for (int i = 0; i < KEYS; i += AT_ONCE) {
                    if (j + i >= b.size) break;
                    const char* const key = keys + (j + i) * key_stride;
                    const PrefetchStream next_values = {values + (j + i) * value_stride, value_stride};
                    if (j + i + AT_ONCE <= b.size)
                        Products::template score<COUNT, ROWS, AT_ONCE>(key, key_stride, p.width, scratch.queries,
                                                                       sums + i * ROWS, next_values);
                    else
                        Products::template score<COUNT, ROWS, 1>(key, key_stride, p.width, scratch.queries,
                                                                 sums + i * ROWS, next_values);
                }
                x = sum_each(sums);
            }
            prefetcher.step();
            if (scaled) x = x * (lanes.scales_of(p.k_scale, first + j) * q_scale);
            x = finite_or_nan(x);
            if (!is_scaled) x = lanes.transform(first + j, x);
            if (b.edge || j + KEYS > b.size) x = lanes.hide(first + j, first + b.size, x);
            block_max = max(x, block_max);
            store(scratch.scores + j * ROWS, x);
        }
        const RowMaxUpdate update(p, row_max, largest<ROWS>(block_max));
        if (any(update.rows)) {
            row_max = update.row_max;
            sum = sum * update.rescale;
            state.scale(p, t, 0, update.rescale);
        }
        prefetcher.weights(vecs);
        for (int j = from; j < b.size; j += KEYS) {
            prefetcher.step();
            const vec score = load(scratch.scores + j * ROWS);
            vec weight = exp2(exponents(update.origin.fused, score, factor, update.origin));
            sum = sum + weight;
            if (p.dropout > 0) weight = weight * lanes.dropout_of(dropout, first + j);
            if (scaled) {
                // The scale of a hidden key may be NaN. A score of -inf is a hidden key unless a bias made it.
                const ivec hidden = p.bias.data ? lanes.hide(first + j, first + b.size, vec{}) != 0.0f : score == -INF;
                weight = hidden ? weight : weight * lanes.scales_of(p.v_scale, first + j);
            }
            store(scratch.scores + j * ROWS, weight);
        }
        if (b.edge && !scaled && !all_finite(p, t, p.v, p.value_width, first + from, b.size - from)) {
            add_visible_nonfinite_decode<Products>(p, t, b, scratch, state);
            values = (const char*)scratch.values;
            value_stride = p.value_width * item;
        }
        if constexpr (Products::ON_TILES) {
            Products::template add<ROWS>(values + from * value_stride, value_stride, b.size - from, p.value_width,
                                         scores, state.out, t.count, prefetcher);
        } else {
            const vec weight_scale = Products::template pack<ROWS>(scores, b.size - from);
            Products::template add<COUNT, ROWS, true>(values + from * value_stride, value_stride, b.size - from,
                                                      p.value_width, scores, weight_scale, state.out,
                                                      PrefetchStream{keys + BLOCK_N * key_stride, key_stride});
        }
    }
    const int rows = COUNT ? COUNT : std::min(t.count, ROWS);
    for (int r = 0; r < rows; ++r) {
        state.row_max[r] = row_max[r];
        for (int i = r; i < LANES; i += ROWS) state.row_sum[r] += sum[i];
    }
}

template <class Products>
static void finish(const Problem& p, const Tile& t, const DecodeState& state) {
    for (int r = 0; r < t.count; ++r) {
        const float factor = normalise(p, t, r, state.row_max[r], state.row_sum[r]);
        char* const row = t.row(p, p.out, r);
        for_columns(p.value_width, [&](int64_t d, int64_t count) {
            const vec x = Products::columns(state.out + r * pitch_of(p.value_width), d) * factor;
            store_part(p.dtype, row + d * size_of(p.dtype), x, count);
        });
    }
}

// Calls work(count) with a constant.
template <int LEAST, int MOST, class Work>
static inline void with_count(int count, Work work) {
    if (count == MOST)
        work(std::integral_constant<int, MOST>());
    else if constexpr (MOST > LEAST)
        with_count<LEAST, MOST - 1>(count, work);
}

// Whether keys and values of int8 are multiplied in fixed point: by queries of 16 bits, whose sums fit 32. AMX leaves
// that to the instruction set that it extends.
static inline bool is_in_fixed_point([[maybe_unused]] const Problem& p) {
#if defined(__AMX_BF16__)
    return false;
#elif defined(__AVX512F__)
    return p.kv_dtype == Dtype::i8 && p.dtype != Dtype::f32 && p.width <= Codes::MOST_PRODUCTS;
#elif defined(QKV_DOT_I8)
    return p.kv_dtype == Dtype::i8 && p.dtype != Dtype::f32 && p.width <= SplitCodes::MOST_PRODUCTS;
#else
    return false;
#endif
}

// Calls work with the products for the dtype of the keys and the number of rows.
template <class Work>
static inline void for_decode(const Problem& p, Work work) {
    switch (p.kv_dtype) {
#if !defined(QKV_EXTENDS_BASE)
        case Dtype::f32: return work(Widened<Dtype::f32>());
        case Dtype::f16: return work(Widened<Dtype::f16>());
#endif
#if defined(__AMX_BF16__)
        case Dtype::bf16:
            if (group(p) >= OnTiles::LEAST) return work(OnTiles());
            return work(FewHalves());
#elif defined(QKV_DOT_BF16)
        case Dtype::bf16: return work(Dots<Halves>());
#else
        case Dtype::bf16: return work(Widened<Dtype::bf16>());
#endif
        default: break;
    }
#if defined(__AVX512F__) && !defined(__AMX_BF16__)
    if (is_in_fixed_point(p)) return work(Dots<Codes>());
#elif defined(QKV_DOT_I8)
    if (is_in_fixed_point(p)) return work(SplitCodes());
#endif
#if !defined(QKV_EXTENDS_BASE)
    work(Widened<Dtype::i8>());
#endif
}

}  // namespace QKV_ISA
}  // namespace qkv
