// Attention backward, for a chunk of keys at a time.
//
// With weights P, scores S and delta = rowsum(dO * O) - dlse:
//
//     dV = P^T dO,   dS = P * (dO V^T - delta),   dK = scale dS^T Q,   dQ = scale dS K
//
// P is recomputed from the lse or, where that is too inexact, from recomputed maxima and sums. All five products
// are those of the forward pass. A thread takes a chunk of keys of one key/value head, whose gradients it keeps, past
// all tiles of rows that see any of them; so multi-query attention fills the cores too. Chunks add to the gradients of
// queries in order, each after the one before: the bits do not depend on the threads.
#pragma once

#include <atomic>
#include <memory>
#include <new>
#include <thread>

#include "attention/prefill.h"
#include "runtime/huge_pages.h"
#include "runtime/parallel.h"

namespace qkv {
namespace QKV_ISA {

template <class Kind>
struct BackwardScratch {
    float *queries, *d_outs;         // packed: rows are lanes
    float *query_rows, *d_out_rows;  // rows as they are
    float *weights, *d_scores;       // of a block: (key, row)
    float *pairs, *slope, *allowed, *bias;
    float *keys, *keys_along, *values;
    float *dq, *dk, *dv;

    BackwardScratch(const Problem& p, ArenaLayout& arena) {
        queries = arena((p.width + LANES) * BLOCK_M);
        d_outs = arena((p.value_width + LANES) * BLOCK_M);
        query_rows = arena(whole_vectors(p.width) * BLOCK_M);
        d_out_rows = arena(whole_vectors(p.value_width) * BLOCK_M);
        weights = arena(BLOCK_N * BLOCK_M);
        d_scores = arena(BLOCK_N * BLOCK_M);
        pairs = arena(BLOCK_N / 2 * BLOCK_M);
        slope = arena(has_slope(p) ? BLOCK_N * BLOCK_M : 0);
        allowed = arena(p.allow.data ? BLOCK_N * BLOCK_M : 0);
        bias = arena(p.bias.data ? BLOCK_N * BLOCK_M : 0);
        keys = arena(OperandPacking<Kind>::floats(BWD_BLOCK_N, p.width));
        keys_along = arena(OperandPacking<Kind>::floats(BWD_BLOCK_N, p.width));
        values = arena(OperandPacking<Kind>::floats(BWD_BLOCK_N, p.value_width));
        dq = arena(whole_vectors(p.width) * BLOCK_M);
        dk = arena(BWD_BLOCK_N * whole_vectors(p.width));
        dv = arena(BWD_BLOCK_N * whole_vectors(p.value_width));
    }
};

// Which chunks add to the gradients of which tiles, and in which order.
class OrderedAccumulation {
   public:
    OrderedAccumulation(const Problem& p, const KeyVisibility& visibility)
        : tiles(tiles_of_head(p)), chunks((p.lk + BWD_BLOCK_N - 1) / BWD_BLOCK_N),
          ranks(p.batch * tiles * chunks, NONE), last(p.batch * tiles, NONE),
          done(new std::atomic<int>[p.batch * p.kv_heads * tiles]()) {
        for (int64_t i = 0; i < p.batch * tiles; ++i) {
            const Tile t(p, visibility, {i / tiles, 0}, i % tiles);
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                if (may_see_any(p, t, chunk * BWD_BLOCK_N, (chunk + 1) * BWD_BLOCK_N))
                    ranks[i * chunks + chunk] = ++last[i];
        }
    }

    // Whether the tile sees the chunk; whether it sees any chunk.
    bool has(int64_t batch, int64_t tile, int64_t chunk) const { return rank(batch, tile, chunk) != NONE; }
    bool has_any(const Tile& t) const { return last[t.batch * tiles + t.index] != NONE; }

    // Whether this chunk is the first to add to the tile's dQ, which it initialises; the last, which it writes out.
    bool is_first(const Tile& t, int64_t chunk) const { return rank(t.batch, t.index, chunk) == 0; }
    bool is_last(const Tile& t, int64_t chunk) const {
        return rank(t.batch, t.index, chunk) == last[t.batch * tiles + t.index];
    }

    // Chunks are started in order, so the one that this waits for is running or has given up.
    void await_turn(const Problem& p, const Tile& t, int64_t chunk) const {
        const std::atomic<int>& now = done[counter_of(p, t)];
        const int mine = rank(t.batch, t.index, chunk);
        for (int tries = 0; now.load(std::memory_order_acquire) != mine; ++tries) {
            if (given_up.load(std::memory_order_relaxed)) throw std::bad_alloc();
            if (tries > SPIN_TRIES) std::this_thread::yield();
        }
    }

    // A chunk ran out of memory: all that wait throw.
    void give_up() { given_up.store(true, std::memory_order_relaxed); }

    void release(const Problem& p, const Tile& t, int64_t chunk) {
        done[counter_of(p, t)].store(rank(t.batch, t.index, chunk) + 1, std::memory_order_release);
    }

    const int64_t tiles, chunks;

   private:
    static constexpr int NONE = -1;

    int rank(int64_t batch, int64_t tile, int64_t chunk) const {
        return ranks[(batch * tiles + tile) * chunks + chunk];
    }
    int64_t counter_of(const Problem& p, const Tile& t) const {
        return (t.batch * p.kv_heads + t.kv_head) * tiles + t.index;
    }

    std::vector<int> ranks, last;
    std::unique_ptr<std::atomic<int>[]> done;
    std::atomic<bool> given_up{false};
};

// Whether a row has no gradient from above. It then adds nothing, even if it sees NaN.
static bool has_zero_gradient(const Problem& p, const Gradients& g, const Tile& t, int r) {
    const char* const d_out = t.row(p, g.d_out, r);
    for (int64_t d = 0; d < p.value_width; ++d)
        if (read(p.dtype, d_out, d) != 0) return false;
    return !g.d_lse || g.d_lse[t.index_of(p, r)] == 0;
}

// delta of the rows of a tile.
static void find_delta(const Problem& p, const Gradients& g, const Tile& t) {
    const int64_t item = size_of(p.dtype);
    for (int r = 0; r < t.count; ++r) {
        const char *out = t.row(p, p.out, r), *d_out = t.row(p, g.d_out, r);
        vec products = {};
        for (int64_t d = 0; d < p.value_width; d += LANES)
            products += load_part(p.dtype, out + d * item, p.value_width - d) *
                        load_part(p.dtype, d_out + d * item, p.value_width - d);
        float sum = 0;
        for (int i = 0; i < LANES; ++i) sum += products[i];
        const int64_t index = t.index_of(p, r);
        g.delta[index] = g.d_lse ? sum - g.d_lse[index] : sum;
        if (g.delta[index] != g.delta[index] && has_zero_gradient(p, g, t, r)) g.delta[index] = 0;
    }
}

// Weights are relative to the maximum itself.
struct ExactState : State {
    using State::State;
    static constexpr bool EXACT = true;
};

// Maxima and sums of rows whose lse is too inexact for their weights: its rounding grows with it, and that of a single
// query stems from products that are summed in another order than here.
class Recount {
   public:
    explicit Recount(const Problem& p) : p(p) {
        const int64_t rows = p.batch * p.heads * p.lq;
        if (std::any_of(p.lse, p.lse + rows, [&](float lse) { return concerns(lse); })) origins.reset(new Row[rows]);
    }

    template <class Kind>
    void count(Kind, const Tile& t) const {
        const auto concerned = [&](int r) { return row(t.index_of(p, r)) != nullptr; };
        bool any = false;
        for (int r = 0; r < t.count; ++r) any |= concerned(r);
        if (!any) return;
        [[maybe_unused]] const typename Kind::Registers registers;
        const auto scratch = QKV_ISA::thread_scratch<ForwardScratch<Kind, ExactState>>(p);
        const ExactState state(scratch.state, t);
        OperandPacking<Kind>::pack_as_lanes(p, t, p.q, p.width, scratch.packed);
        state.clear(p, t);
        accumulate_keys(p, t, PackedPerBlock<Kind>(), Dropout(p, t), 0, t.end, scratch, state);
        for (int r = 0; r < t.count; ++r) {
            if (!concerned(r)) continue;
            const float row_max = state.row_max[r];
            if (row_max == -INF) {  // sees no key
                origins[t.index_of(p, r)] = {0, INF};
                continue;
            }
            const Total total(p, t, r, row_max, state.row_sum[r]);
            const float beyond = total.row_max - (only_scaled(p) ? row_max * p.scale : row_max);  // of a sink logit
            origins[t.index_of(p, r)] = {row_max, std::log2(total.row_sum) + beyond * LOG2E};
        }
    }

    struct Row {
        float base, shift;  // as `Origin` has them; a shift of inf: no weights
    };

    // The origin of a row, or null if its lse suffices.
    const Row* row(int64_t index) const { return origins && concerns(p.lse[index]) ? &origins[index] : nullptr; }

   private:
    bool concerns(float lse) const { return std::isfinite(lse) && (p.lq == 1 || std::fabs(lse) > LARGE_SCORE); }

    const Problem& p;
    std::unique_ptr<Row[]> origins;
};

// A chunk of keys of one head, and their gradients.
template <class Kind>
struct Chunk : HeadRef {
    using ConstOperand = Operand<const typename Kind::Element>;

    const Problem& p;
    const Gradients& g;
    const Recount& recount;
    const BackwardScratch<Kind> scratch;
    const int64_t first;
    const int size;
    ConstOperand keys, keys_along, values;
    bool finite;
    double* d_alibi;  // of the heads of the group, or null

    Chunk(const Problem& p, const Gradients& g, const Recount& recount, const HeadRef& head, int64_t first,
          double* d_alibi)
        : HeadRef(head), p(p), g(g), recount(recount), scratch(QKV_ISA::thread_scratch<BackwardScratch<Kind>>(p)),
          first(first), size((int)std::min<int64_t>(BWD_BLOCK_N, p.lk - first)), d_alibi(d_alibi) {
        using F = OperandPacking<Kind>;
        keys = F::along_width(p, head, p.k, p.width, first, size, scratch.keys);
        values = F::along_width(p, head, p.v, p.value_width, first, size, scratch.values);
        keys_along = F::PACKS ? F::along_keys(p, head, p.k, p.width, first, size, scratch.keys_along) : keys;
        finite = all_finite(p, head, p.k, p.width, first, size);
        if (!finite) zero_nonfinite_keys();
        finite = finite && all_finite(p, head, p.v, p.value_width, first, size);
        std::fill(scratch.dk, scratch.dk + size * whole_vectors(p.width), 0.0f);
        std::fill(scratch.dv, scratch.dv + size * whole_vectors(p.value_width), 0.0f);
    }

    // 0 * inf is NaN: a masked key that is not finite has a gradient of scores of 0. One that is seen has NaN anyway.
    void zero_nonfinite_keys() {
        const auto clean = OperandPacking<Kind>::writable(keys_along, p.width, size, scratch.keys_along);
        for (int j = 0; j < size; ++j)
            for (int64_t d = 0; d < p.width; ++d)
                if (!std::isfinite(read(p.dtype, row_of(p, p.k, *this, first + j), d)))
                    OperandPacking<Kind>::clear(clean, j, d);
        keys_along = {clean.data, clean.stride};
    }

    // Adds a tile to the gradients of keys and values, and leaves its gradient of queries in scratch.dq.
    void add_tile(const Tile& t) {
        OperandPacking<Kind>::pack_as_lanes(p, t, p.q, p.width, scratch.queries);
        OperandPacking<Kind>::pack_as_lanes(p, t, g.d_out, p.value_width, scratch.d_outs);
        OperandPacking<Kind>::pack_as_rows(p, t, p.q, p.width, scratch.query_rows);
        OperandPacking<Kind>::pack_as_rows(p, t, g.d_out, p.value_width, scratch.d_out_rows);
        std::fill(scratch.dq, scratch.dq + p.width * t.lanes(), 0.0f);
        const Rows rows = prepare_rows(t);
        const Dropout dropout(p, t);
        for (int64_t at = first; at < std::min(first + size, t.end); at += BLOCK_N) {
            const Block b(p, t, at, std::min(first + size, t.end), Kind::GRAIN);
            if (b.count == 0) continue;
            if (p.bias.data) gather(t, p.bias, at, b.size, scratch.bias);
            if (p.allow.data) gather(t, p.allow, at, b.size, scratch.allowed);
            for (int i = 0; i < b.count; ++i) {
                score(t, b, b.parts[i], rows, dropout);
                add(t, b, b.parts[i], rows);
            }
        }
    }

    void write() const {
        for (int j = 0; j < size; ++j) {
            write_row(scratch.dk + j * whole_vectors(p.width), p.width, g.dk, first + j, p.scale);
            write_row(scratch.dv + j * whole_vectors(p.value_width), p.value_width, g.dv, first + j, 1.0f);
        }
    }

   private:
    static ConstOperand from_row(const ConstOperand& operand, int64_t row) {
        return {operand.data + row * operand.stride, operand.stride};
    }

    // The rows of a tile.
    struct Rows {
        float base[BLOCK_M], shift[BLOCK_M];  // as `Origin` has them; a shift of inf: no weights
        float delta[BLOCK_M];
        bool fused[BLOCK_M / LANES];
        bool nonfinite[BLOCK_M];  // may hold NaN, and NaN times the weight 0 of a masked key is NaN: added one by one
        bool any_nonfinite;
    };

    Rows prepare_rows(const Tile& t) const {
        Rows rows;
        rows.any_nonfinite = false;
        std::fill(rows.fused, rows.fused + t.vecs, only_scaled(p));
        for (int r = 0; r < t.lanes(); ++r) {
            const int64_t index = t.index_of(p, r);
            const float lse = p.lse[index];
            rows.delta[r] = g.delta[index];
            // A row that sees no key has the lse of its sink, even if it holds NaN.
            const bool is_masked = p.sink_logits && lse == p.sink_logits[t.head[r]];
            rows.nonfinite[r] = is_masked || !std::isfinite(lse) || !std::isfinite(rows.delta[r]);
            rows.any_nonfinite |= rows.nonfinite[r];
            rows.base[r] = 0;
            if (lse == -INF || ((rows.nonfinite[r] || !finite) && has_zero_gradient(p, g, t, r))) {
                rows.shift[r] = INF;
            } else if (const Recount::Row* const row = recount.row(index)) {
                rows.base[r] = row->base;
                rows.shift[r] = row->shift;
                rows.fused[r / LANES] = false;
            } else {
                rows.base[r] = only_scaled(p) ? 0 : lse;
                rows.shift[r] = only_scaled(p) ? lse * LOG2E : 0;
            }
            if (!rows.nonfinite[r] || r >= t.count) continue;
            OperandPacking<Kind>::clear_row(scratch.query_rows, p.width, r);
            OperandPacking<Kind>::clear_row(scratch.d_out_rows, p.value_width, r);
        }
        return rows;
    }

    // Weights of a segment, and gradients of its scores.
    void score(const Tile& t, const Block& b, const Segment& s, const Rows& rows, const Dropout& dropout) const {
        const int64_t into = b.first - first;  // the chunk
        const float factor = exponent_factor(p);
        multiply_rows(Kind(), t, s, p.width, from_row(keys, into), scratch.queries, scratch.weights);
        if (!only_scaled(p))
            transform(p, t, b, s, scratch.bias, scratch.weights, has_slope(p) ? scratch.slope : nullptr);
        if (b.edge) hide(p, t, b, s, scratch.allowed, -INF, scratch.weights);
        multiply_rows(Kind(), t, s, p.value_width, from_row(values, into), scratch.d_outs, scratch.d_scores);
        for (int j = s.begin; j < s.end; ++j) {
            for (int n = s.first; n < s.last; ++n) {
                float* const weights = scratch.weights + j * t.lanes() + n * LANES;
                float* const d_scores = scratch.d_scores + j * t.lanes() + n * LANES;
                const Origin from = {load(rows.base + n * LANES), load(rows.shift + n * LANES), rows.fused[n]};
                const vec weight = exp2(exponents(from.fused, load(weights), factor, from));
                vec d_weight = load(d_scores);
                if (p.dropout > 0) {
                    const vec kept = dropout.factors(b.first + j, n);
                    d_weight = d_weight * kept;
                    store(weights, weight * kept);
                } else {
                    store(weights, weight);
                }
                store(d_scores, weight * (d_weight - load(rows.delta + n * LANES)));
                if (!finite || rows.any_nonfinite) {
                    const ivec masked = from.shift == INF;
                    store(weights, masked ? vec{} : load(weights));
                    store(d_scores, masked ? vec{} : load(d_scores));
                }
            }
        }
        if (b.edge) hide(p, t, b, s, scratch.allowed, 0.0f, scratch.d_scores);
        if (b.edge && rows.any_nonfinite) hide(p, t, b, s, scratch.allowed, 0.0f, scratch.weights);  // an lse of NaN
        if (g.d_bias) write_bias(t, b, s);
        if (g.d_alibi) add_alibi(t, b, s);
        if (has_slope(p)) {
            for (int j = s.begin; j < s.end; ++j) {
                for (int n = s.first; n < s.last; ++n) {
                    float* const d_scores = scratch.d_scores + j * t.lanes() + n * LANES;
                    store(d_scores, load(d_scores) * load(scratch.slope + j * t.lanes() + n * LANES));
                }
            }
        }
    }

    void add(const Tile& t, const Block& b, const Segment& s, const Rows& rows) const {
        const int64_t into = b.first - first;
        const float* along_keys = scratch.d_scores;
        if (OperandPacking<Kind>::PACKS) {
            OperandPacking<Kind>::pack_weights(t, s, scratch.d_scores, scratch.pairs);
            along_keys = scratch.pairs;
        }
        sum_over_keys(Kind(), t, s, p.width, from_row(keys_along, into / OperandPacking<Kind>::KEYS_PER_ROW),
                      along_keys, scratch.dq);
        if (rows.any_nonfinite) add_nonfinite_rows(t, b, s, rows);
        if (OperandPacking<Kind>::PACKS) {
            OperandPacking<Kind>::pack_weights_as_a(t, s, scratch.d_scores);
            OperandPacking<Kind>::pack_weights_as_a(t, s, scratch.weights);
        }
        sum_over_rows(Kind(), t, s, p.width, scratch.d_scores, scratch.query_rows,
                      scratch.dk + into * whole_vectors(p.width));
        sum_over_rows(Kind(), t, s, p.value_width, scratch.weights, scratch.d_out_rows,
                      scratch.dv + into * whole_vectors(p.value_width));
    }

    // Adds the nonfinite rows to the keys that they see, one by one, and sets their weights and gradients of scores to
    // 0.
    void add_nonfinite_rows(const Tile& t, const Block& b, const Segment& s, const Rows& rows) const {
        const auto add = [&](const View& view, int64_t width, int r, float factor, float* to) {
            const char* const row = t.row(p, view, r);
            for (int64_t d = 0; d < width; ++d) to[d] += factor * read(p.dtype, row, d);
        };
        for (int r = s.first * LANES; r < s.last * LANES; ++r) {
            if (!rows.nonfinite[r]) continue;
            const bool adds = r < t.count && rows.shift[r] != INF;
            for (int j = s.begin; j < s.end; ++j) {
                float &weight = scratch.weights[j * t.lanes() + r], &d_score = scratch.d_scores[j * t.lanes() + r];
                const int64_t key = b.first + j, row = key - first;
                if (adds && may_see(p, t, r, key) && (!p.allow.data || scratch.allowed[j * t.lanes() + r] != 0)) {
                    add(p.q, p.width, r, d_score, scratch.dk + row * whole_vectors(p.width));
                    add(g.d_out, p.value_width, r, weight, scratch.dv + row * whole_vectors(p.value_width));
                }
                weight = d_score = 0;
            }
        }
    }

    void write_bias(const Tile& t, const Block& b, const Segment& s) const {
        const int above = s.first * LANES;
        lanes_to_rows(std::min(t.count, s.last * LANES) - above, s.end - s.begin,
                      scratch.d_scores + s.begin * t.lanes() + above, t.lanes(),
                      [&](int64_t r, int64_t c, int64_t count, vec x) {
                          float* const row = g.d_bias + t.index_of(p, above + (int)r) * p.lk;
                          store_part(Dtype::f32, row + b.first + s.begin + c, x, count);
                      });
    }

    void add_alibi(const Tile& t, const Block& b, const Segment& s) const {
        for (int n = s.first; n < s.last; ++n) {
            vec sum = {};
            for (int j = s.begin; j < s.end; ++j)
                sum -= load(scratch.d_scores + j * t.lanes() + n * LANES) *
                       absolute(vector_of(t.position, n) - (int32_t)(b.first + j));
            for (int r = n * LANES; r < std::min(t.count, (n + 1) * LANES); ++r)
                d_alibi[t.head[r] - kv_head * group(p)] += sum[r - n * LANES];
        }
    }

    void write_row(const float* from, int64_t width, const View& view, int64_t key, float factor) const {
        char* const row = row_of(p, view, *this, key);
        for (int64_t d = 0; d < width; d += LANES)
            store_part(p.dtype, row + d * size_of(p.dtype), load(from + d) * factor, width - d);
    }
};

template <class Kind>
static void run_backward(const Problem& p, const Gradients& g) {
    const KeyVisibility visibility(p);
    OrderedAccumulation order(p, visibility);
    const int64_t heads = p.batch * p.kv_heads, tiles = order.tiles, scratch = p.width * BLOCK_M;
    const Recount recount(p);
    // Sums of the gradients of queries that several chunks add to.
    const int64_t all = order.chunks > 1 ? heads * tiles * scratch : 0;
    const std::unique_ptr<float[]> sums(new float[all]);
    prefer_huge_pages(sums.get(), all * (int64_t)sizeof(float));
    const std::vector<float> zeros(scratch);
    float scales[BLOCK_M];
    std::fill(scales, scales + BLOCK_M, p.scale);
    std::vector<double> d_alibi(g.d_alibi ? order.chunks * heads * group(p) : 0);
    parallel_for(heads * tiles, p.threads, [&](int64_t item) {
        const Tile t(p, visibility, head_at(p, item / tiles), item % tiles);
        find_delta(p, g, t);
        if (order.has_any(t)) return recount.count(Kind(), t);
        write_rows(p, t, g.dq, p.width, zeros.data(), scales);
    });
    const auto add_chunk = [&](int64_t item) {
        const int64_t index = item / heads;
        const HeadRef head = head_at(p, item % heads);
        [[maybe_unused]] const typename Kind::Registers registers;
        double* const slopes = g.d_alibi ? &d_alibi[item * group(p)] : nullptr;
        Chunk<Kind> chunk(p, g, recount, head, index * BWD_BLOCK_N, slopes);
        // Late tiles first: under a causal mask all chunks see them.
        for (int64_t tile = tiles - 1; tile >= 0; --tile) {
            if (!order.has(head.batch, tile, index)) continue;
            const Tile t(p, visibility, head, tile);
            chunk.add_tile(t);
            const float* const dq = chunk.scratch.dq;
            if (order.is_first(t, index) && order.is_last(t, index)) {
                write_rows(p, t, g.dq, p.width, dq, scales);
                continue;
            }
            float* const sum = &sums[(item % heads * tiles + tile) * scratch];
            order.await_turn(p, t, index);
            if (order.is_first(t, index))
                std::copy(dq, dq + p.width * t.lanes(), sum);
            else
                for (int64_t i = 0; i < p.width * t.lanes(); i += LANES) store(sum + i, load(sum + i) + load(dq + i));
            if (order.is_last(t, index)) write_rows(p, t, g.dq, p.width, sum, scales);
            order.release(p, t, index);
        }
        chunk.write();
    };
    parallel_for(order.chunks * heads, p.threads, [&](int64_t item) {
        try {
            add_chunk(item);
        } catch (...) {
            order.give_up();
            throw;
        }
    });
    if (!g.d_alibi) return;
    for (int64_t head = 0; head < p.heads; ++head) {
        double sum = 0;
        for (int64_t item = 0; item < order.chunks * heads; ++item)
            if (item % p.kv_heads == head / group(p)) sum += d_alibi[item * group(p) + head % group(p)];
        g.d_alibi[head] = (float)sum;
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
