// Attention backward, for a chunk of keys at a time.
//
// With weights P, scores S and delta = rowsum(dO * O) - dlse:
//
//     dV = P^T dO,   dS = P * (dO V^T - delta),   dK = scale dS^T Q,   dQ = scale dS K
//
// P is computed anew from the lse, or where that does not tell it from maxima and sums that are counted anew. All five
// products run on the micro-kernel of the forward pass. A thread takes a chunk of keys of one key/value head, whose
// gradients it keeps, past all tiles of rows that see any of them; so multi-query attention fills the cores too. What
// it adds to the gradients of queries goes into a sum that chunks add to in order, each after the one before: the bits
// do not depend on the threads.
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

constexpr int CHUNK = 3 * BLOCK;  // keys whose gradients one thread holds

template <class Kind>
struct BackwardRoom {
    float *queries, *d_outs;         // panels: rows are lanes
    float *query_rows, *d_out_rows;  // rows as they are
    float *weights, *d_scores;       // of a block: (key, row)
    float *pairs, *slope, *allowed, *bias;
    float *keys, *keys_along, *values;
    float *dq, *dk, *dv;

    BackwardRoom(const Problem& p, Placer& place) {
        queries = place((p.width + LANES) * ROWS);
        d_outs = place((p.value_width + LANES) * ROWS);
        query_rows = place(whole_vectors(p.width) * ROWS);
        d_out_rows = place(whole_vectors(p.value_width) * ROWS);
        weights = place(BLOCK * ROWS);
        d_scores = place(BLOCK * ROWS);
        pairs = place(BLOCK / 2 * ROWS);
        slope = place(p.softcap != 0 ? BLOCK * ROWS : 0);
        allowed = place(p.allow.data ? BLOCK * ROWS : 0);
        bias = place(p.bias.data ? BLOCK * ROWS : 0);
        keys = place(Format<Kind>::floats(CHUNK, p.width));
        keys_along = place(Format<Kind>::floats(CHUNK, p.width));
        values = place(Format<Kind>::floats(CHUNK, p.value_width));
        dq = place(whole_vectors(p.width) * ROWS);
        dk = place(CHUNK * whole_vectors(p.width));
        dv = place(CHUNK * whole_vectors(p.value_width));
    }
};

// Which chunks add to the gradients of which tiles, and when it is whose turn.
class Turns {
   public:
    Turns(const Problem& p, const Outline& outline)
        : tiles(tiles_of_head(p)), chunks((p.lk + CHUNK - 1) / CHUNK), ranks(p.batch * tiles * chunks, NONE),
          last(p.batch * tiles, NONE), done(new std::atomic<int>[p.batch * p.kv_heads * tiles]()) {
        for (int64_t i = 0; i < p.batch * tiles; ++i) {
            const Tile t(p, outline, i / tiles, 0, i % tiles);
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                if (shows_any(p, t, chunk * CHUNK, (chunk + 1) * CHUNK)) ranks[i * chunks + chunk] = ++last[i];
        }
    }

    // Whether the tile sees the chunk, or any.
    bool has(int64_t batch, int64_t tile, int64_t chunk) const { return rank(batch, tile, chunk) != NONE; }
    bool has_any(const Tile& t) const { return last[t.batch * tiles + t.index] != NONE; }

    bool is_first(const Tile& t, int64_t chunk) const { return rank(t.batch, t.index, chunk) == 0; }
    bool is_last(const Tile& t, int64_t chunk) const {
        return rank(t.batch, t.index, chunk) == last[t.batch * tiles + t.index];
    }

    // Chunks are begun in order, so that whoever is waited for is at work, or gives up.
    void wait(const Problem& p, const Tile& t, int64_t chunk) const {
        const std::atomic<int>& now = done[place(p, t)];
        const int mine = rank(t.batch, t.index, chunk);
        for (int tries = 0; now.load(std::memory_order_acquire) != mine; ++tries) {
            if (given_up.load(std::memory_order_relaxed)) throw std::bad_alloc();
            if (tries > 1000) std::this_thread::yield();
        }
    }

    // A chunk does without memory: nobody waits for it any longer.
    void give_up() { given_up.store(true, std::memory_order_relaxed); }

    void pass(const Problem& p, const Tile& t, int64_t chunk) {
        done[place(p, t)].store(rank(t.batch, t.index, chunk) + 1, std::memory_order_release);
    }

    const int64_t tiles, chunks;

   private:
    static constexpr int NONE = -1;

    int rank(int64_t batch, int64_t tile, int64_t chunk) const {
        return ranks[(batch * tiles + tile) * chunks + chunk];
    }
    int64_t place(const Problem& p, const Tile& t) const {
        return (t.batch * p.kv_heads + t.kv_head) * tiles + t.index;
    }

    std::vector<int> ranks, last;
    std::unique_ptr<std::atomic<int>[]> done;
    std::atomic<bool> given_up{false};
};

// Whether a row has no gradient from above. What it sees then does not matter, even where that is NaN.
static bool is_idle(const Problem& p, const Gradients& g, const Tile& t, int r) {
    const char* const d_out = t.row(p, g.d_out, r);
    for (int64_t d = 0; d < p.value_width; ++d)
        if (read(p.dtype, d_out, d) != 0) return false;
    return !g.d_lse || g.d_lse[t.place(p, r)] == 0;
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
        const int64_t place = t.place(p, r);
        g.delta[place] = g.d_lse ? sum - g.d_lse[place] : sum;
        if (g.delta[place] != g.delta[place] && is_idle(p, g, t, r)) g.delta[place] = 0;
    }
}

// Sums of weights relative to the maximum itself.
struct ExactState : State {
    using State::State;
    static constexpr bool EXACT = true;
};

// Where the exponents of rows begin whose lse does not tell their weights: it is as inexact as it is large, and that of
// a single query stems from products that are summed in another order than here.
class Recount {
   public:
    explicit Recount(const Problem& p) : p(p) {
        const int64_t rows = p.batch * p.heads * p.lq;
        if (std::any_of(p.lse, p.lse + rows, [&](float lse) { return concerns(lse); })) found.reset(new Row[rows]);
    }

    template <class Kind>
    void count(Kind, const Tile& t) const {
        const auto concerned = [&](int r) { return row(t.place(p, r)) != nullptr; };
        bool any = false;
        for (int r = 0; r < t.count; ++r) any |= concerned(r);
        if (!any) return;
        [[maybe_unused]] const typename Kind::Registers registers;
        const auto room = QKV_ISA::room<ForwardRoom<Kind, ExactState>>(p);
        const ExactState state(room.state, t);
        Format<Kind>::panel(p, t, p.q, p.width, room.panel);
        state.clear(p, t);
        fold(p, t, LaidByBlock<Kind>(), Dropout(p, t), 0, t.end, room, state);
        for (int r = 0; r < t.count; ++r) {
            if (!concerned(r)) continue;
            const float top = state.top[r];
            if (top == -INF) {  // sees no key
                found[t.place(p, r)] = {0, INF};
                continue;
            }
            const Total total(p, t, r, top, state.sum[r]);
            const float beyond = total.top - (plain_scores(p) ? top * p.scale : top);  // of a sink logit
            found[t.place(p, r)] = {top, std::log2(total.sum) + beyond * LOG2E};
        }
    }

    struct Row {
        float base, shift;  // as `Origin` has them; a shift of inf: no weights
    };

    // What was found of a row, if it was counted.
    const Row* row(int64_t place) const { return found && concerns(p.lse[place]) ? &found[place] : nullptr; }

   private:
    bool concerns(float lse) const { return std::isfinite(lse) && (p.lq == 1 || std::fabs(lse) > LARGE); }

    const Problem& p;
    std::unique_ptr<Row[]> found;
};

// A chunk of keys of one head, and the gradients that gather there.
template <class Kind>
struct Chunk {
    typedef typename Kind::Element Element;

    const Problem& p;
    const Gradients& g;
    const Recount& recount;
    const BackwardRoom<Kind> room;
    const int64_t batch, kv_head, first;
    const int size;
    const Element *keys, *keys_along, *values;
    int64_t key_stride, key_along_stride, value_stride;
    bool finite;
    double* d_alibi;  // of the heads of the group, or null

    Chunk(const Problem& p, const Gradients& g, const Recount& recount, int64_t batch, int64_t kv_head, int64_t first,
          double* d_alibi)
        : p(p), g(g), recount(recount), room(QKV_ISA::room<BackwardRoom<Kind>>(p)), batch(batch), kv_head(kv_head),
          first(first), size((int)std::min<int64_t>(CHUNK, p.lk - first)), d_alibi(d_alibi) {
        typedef Format<Kind> F;
        keys = F::along_width(p, batch, kv_head, p.k, p.width, first, size, room.keys, key_stride);
        values = F::along_width(p, batch, kv_head, p.v, p.value_width, first, size, room.values, value_stride);
        keys_along = keys;
        key_along_stride = key_stride;
        if (F::PACKS)
            keys_along = F::along_keys(p, batch, kv_head, p.k, p.width, first, size, room.keys_along, key_along_stride);
        finite = all_finite(p, batch, kv_head, p.k, p.width, first, size);
        if (!finite) shield();
        finite = finite && all_finite(p, batch, kv_head, p.v, p.value_width, first, size);
        std::fill(room.dk, room.dk + size * whole_vectors(p.width), 0.0f);
        std::fill(room.dv, room.dv + size * whole_vectors(p.value_width), 0.0f);
    }

    // A hidden key that is not finite must not meet its gradient of 0. Where it is seen, that gradient is NaN anyway.
    void shield() {
        Element* clean = Format<Kind>::own(keys_along, p.width, size, room.keys_along, key_along_stride);
        for (int j = 0; j < size; ++j)
            for (int64_t d = 0; d < p.width; ++d)
                if (!std::isfinite(read(p.dtype, row_of(p, p.k, batch, kv_head, first + j), d)))
                    Format<Kind>::clear(clean, key_along_stride, j, d);
        keys_along = clean;
    }

    // Adds what a tile gives to the gradients of keys and values, and leaves its gradient of queries in room.dq.
    void pass(const Tile& t) {
        Format<Kind>::panel(p, t, p.q, p.width, room.queries);
        Format<Kind>::panel(p, t, g.d_out, p.value_width, room.d_outs);
        Format<Kind>::rows(p, t, p.q, p.width, room.query_rows);
        Format<Kind>::rows(p, t, g.d_out, p.value_width, room.d_out_rows);
        std::fill(room.dq, room.dq + p.width * t.lanes(), 0.0f);
        const Rows rows = look(t);
        const Dropout dropout(p, t);
        for (int64_t at = first; at < std::min(first + size, t.end); at += BLOCK) {
            const Block b(p, t, at, std::min(first + size, t.end), Kind::GRAIN);
            if (b.count == 0) continue;
            if (p.bias.data) gather(t, p.bias, at, b.size, room.bias);
            if (p.allow.data) gather(t, p.allow, at, b.size, room.allowed);
            for (int i = 0; i < b.count; ++i) {
                score(t, b, b.parts[i], rows, dropout);
                add(t, b, b.parts[i], rows);
            }
        }
    }

    void write() const {
        for (int j = 0; j < size; ++j) {
            write_row(room.dk + j * whole_vectors(p.width), p.width, g.dk, first + j, p.scale);
            write_row(room.dv + j * whole_vectors(p.value_width), p.value_width, g.dv, first + j, 1.0f);
        }
    }

   private:
    // What is to be known of the rows of a tile.
    struct Rows {
        float base[ROWS], shift[ROWS], delta[ROWS];  // the first two as `Origin` has them; a shift of inf: no weights
        bool fused[ROWS / LANES];
        bool apart[ROWS];  // rows that may hold NaN, which must not meet the weights of 0 of keys that they do not see
        bool any_apart;
    };

    Rows look(const Tile& t) const {
        Rows rows;
        rows.any_apart = false;
        std::fill(rows.fused, rows.fused + t.vecs, plain_scores(p));
        for (int r = 0; r < t.lanes(); ++r) {
            const int64_t place = t.place(p, r);
            const float lse = p.lse[place];
            rows.delta[r] = g.delta[place];
            // A row that sees no key has the lse of its sink, whatever it holds.
            const bool is_blind = p.sink_logits && lse == p.sink_logits[t.head[r]];
            rows.apart[r] = is_blind || !std::isfinite(lse) || !std::isfinite(rows.delta[r]);
            rows.any_apart |= rows.apart[r];
            rows.base[r] = 0;
            if (lse == -INF || ((rows.apart[r] || !finite) && is_idle(p, g, t, r))) {
                rows.shift[r] = INF;
            } else if (const Recount::Row* const row = recount.row(place)) {
                rows.base[r] = row->base;
                rows.shift[r] = row->shift;
                rows.fused[r / LANES] = false;
            } else {
                rows.base[r] = plain_scores(p) ? 0 : lse;
                rows.shift[r] = plain_scores(p) ? lse * LOG2E : 0;
            }
            if (!rows.apart[r] || r >= t.count) continue;
            Format<Kind>::clear_row(room.query_rows, p.width, r);
            Format<Kind>::clear_row(room.d_out_rows, p.value_width, r);
        }
        return rows;
    }

    // Weights of a segment, and gradients of its scores.
    void score(const Tile& t, const Block& b, const Segment& s, const Rows& rows, const Dropout& dropout) const {
        const int64_t into = b.first - first;  // the chunk
        const float factor = exponent_factor(p);
        multiply_rows(Kind(), t, s, p.width, keys + into * key_stride, key_stride, room.queries, room.weights);
        if (!plain_scores(p)) transform(p, t, b, s, room.bias, room.weights, p.softcap != 0 ? room.slope : nullptr);
        if (b.edge) hide(p, t, b, s, room.allowed, -INF, room.weights);
        multiply_rows(Kind(), t, s, p.value_width, values + into * value_stride, value_stride, room.d_outs,
                      room.d_scores);
        for (int j = s.begin; j < s.end; ++j) {
            for (int n = s.first; n < s.last; ++n) {
                float* const weights = room.weights + j * t.lanes() + n * LANES;
                float* const d_scores = room.d_scores + j * t.lanes() + n * LANES;
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
                if (!finite || rows.any_apart) {
                    const ivec blind = from.shift == INF;
                    store(weights, blind ? vec{} : load(weights));
                    store(d_scores, blind ? vec{} : load(d_scores));
                }
            }
        }
        if (b.edge) hide(p, t, b, s, room.allowed, 0.0f, room.d_scores);
        if (b.edge && rows.any_apart) hide(p, t, b, s, room.allowed, 0.0f, room.weights);  // an lse of NaN
        if (g.d_bias) write_bias(t, b, s);
        if (g.d_alibi) add_alibi(t, b, s);
        if (p.softcap != 0) {
            for (int j = s.begin; j < s.end; ++j) {
                for (int n = s.first; n < s.last; ++n) {
                    float* const d_scores = room.d_scores + j * t.lanes() + n * LANES;
                    store(d_scores, load(d_scores) * load(room.slope + j * t.lanes() + n * LANES));
                }
            }
        }
    }

    void add(const Tile& t, const Block& b, const Segment& s, const Rows& rows) const {
        const int64_t into = b.first - first;
        const float* along_keys = room.d_scores;
        if (Format<Kind>::PACKS) {
            Format<Kind>::pack_keys(t, s, room.d_scores, room.pairs);
            along_keys = room.pairs;
        }
        sum_over_keys(Kind(), t, s, p.width, keys_along + into / Format<Kind>::ABREAST * key_along_stride,
                      key_along_stride, along_keys, room.dq);
        if (rows.any_apart) add_apart(t, b, s, rows);
        if (Format<Kind>::PACKS) {
            Format<Kind>::pack_rows(t, s, room.d_scores);
            Format<Kind>::pack_rows(t, s, room.weights);
        }
        sum_over_rows(Kind(), t, s, p.width, room.d_scores, room.query_rows, room.dk + into * whole_vectors(p.width));
        sum_over_rows(Kind(), t, s, p.value_width, room.weights, room.d_out_rows,
                      room.dv + into * whole_vectors(p.value_width));
    }

    // Adds what rows that are apart give to the keys that they see, one by one, and takes it from weights and
    // gradients.
    void add_apart(const Tile& t, const Block& b, const Segment& s, const Rows& rows) const {
        const auto add = [&](const View& view, int64_t width, int r, float factor, float* to) {
            const char* const row = t.row(p, view, r);
            for (int64_t d = 0; d < width; ++d) to[d] += factor * read(p.dtype, row, d);
        };
        for (int r = s.first * LANES; r < s.last * LANES; ++r) {
            if (!rows.apart[r]) continue;
            const bool adds = r < t.count && rows.shift[r] != INF;
            for (int j = s.begin; j < s.end; ++j) {
                float &weight = room.weights[j * t.lanes() + r], &d_score = room.d_scores[j * t.lanes() + r];
                const int64_t key = b.first + j, place = key - first;
                if (adds && may_see(p, t, r, key) && (!p.allow.data || room.allowed[j * t.lanes() + r] != 0)) {
                    add(p.q, p.width, r, d_score, room.dk + place * whole_vectors(p.width));
                    add(g.d_out, p.value_width, r, weight, room.dv + place * whole_vectors(p.value_width));
                }
                weight = d_score = 0;
            }
        }
    }

    void write_bias(const Tile& t, const Block& b, const Segment& s) const {
        const int above = s.first * LANES;
        lanes_to_rows(std::min(t.count, s.last * LANES) - above, s.end - s.begin,
                      room.d_scores + s.begin * t.lanes() + above, t.lanes(),
                      [&](int64_t r, int64_t c, int64_t count, vec x) {
                          float* const row = g.d_bias + t.place(p, above + (int)r) * p.lk;
                          store_part(Dtype::f32, row + b.first + s.begin + c, x, count);
                      });
    }

    void add_alibi(const Tile& t, const Block& b, const Segment& s) const {
        for (int n = s.first; n < s.last; ++n) {
            vec sum = {};
            for (int j = s.begin; j < s.end; ++j)
                sum -= load(room.d_scores + j * t.lanes() + n * LANES) *
                       absolute(vector_of(t.position, n) - (int32_t)(b.first + j));
            for (int r = n * LANES; r < std::min(t.count, (n + 1) * LANES); ++r)
                d_alibi[t.head[r] - kv_head * group(p)] += sum[r - n * LANES];
        }
    }

    void write_row(const float* from, int64_t width, const View& view, int64_t key, float factor) const {
        char* const row = row_of(p, view, batch, kv_head, key);
        for (int64_t d = 0; d < width; d += LANES)
            store_part(p.dtype, row + d * size_of(p.dtype), load(from + d) * factor, width - d);
    }
};

template <class Kind>
static void run_backward(const Problem& p, const Gradients& g) {
    const Outline outline(p);
    Turns turns(p, outline);
    const int64_t heads = p.batch * p.kv_heads, tiles = turns.tiles, room = p.width * ROWS;
    const Recount recount(p);
    // Of the gradients of queries that several chunks add to.
    const int64_t all = turns.chunks > 1 ? heads * tiles * room : 0;
    const std::unique_ptr<float[]> sums(new float[all]);
    prefer_huge_pages(sums.get(), all * (int64_t)sizeof(float));
    const std::vector<float> zeros(room);
    float scales[ROWS];
    std::fill(scales, scales + ROWS, p.scale);
    std::vector<double> d_alibi(g.d_alibi ? turns.chunks * heads * group(p) : 0);
    parallel_for(heads * tiles, p.threads, [&](int64_t item) {
        const Tile t(p, outline, item / tiles / p.kv_heads, item / tiles % p.kv_heads, item % tiles);
        find_delta(p, g, t);
        if (turns.has_any(t)) return recount.count(Kind(), t);
        write_rows(p, t, g.dq, p.width, zeros.data(), scales);
    });
    const auto add_chunk = [&](int64_t item) {
        const int64_t index = item / heads, batch = item % heads / p.kv_heads, kv_head = item % heads % p.kv_heads;
        [[maybe_unused]] const typename Kind::Registers registers;
        double* const slopes = g.d_alibi ? &d_alibi[item * group(p)] : nullptr;
        Chunk<Kind> chunk(p, g, recount, batch, kv_head, index * CHUNK, slopes);
        // Late tiles first: under a causal mask all chunks see them, and follow each other from there.
        for (int64_t tile = tiles - 1; tile >= 0; --tile) {
            if (!turns.has(batch, tile, index)) continue;
            const Tile t(p, outline, batch, kv_head, tile);
            chunk.pass(t);
            const float* const dq = chunk.room.dq;
            if (turns.is_first(t, index) && turns.is_last(t, index)) {
                write_rows(p, t, g.dq, p.width, dq, scales);
                continue;
            }
            float* const sum = &sums[(item % heads * tiles + tile) * room];
            turns.wait(p, t, index);
            if (turns.is_first(t, index))
                std::copy(dq, dq + p.width * t.lanes(), sum);
            else
                for (int64_t i = 0; i < p.width * t.lanes(); i += LANES) store(sum + i, load(sum + i) + load(dq + i));
            if (turns.is_last(t, index)) write_rows(p, t, g.dq, p.width, sum, scales);
            turns.pass(p, t, index);
        }
        chunk.write();
    };
    parallel_for(turns.chunks * heads, p.threads, [&](int64_t item) {
        try {
            add_chunk(item);
        } catch (const std::bad_alloc&) {
            turns.give_up();
            throw;
        }
    });
    if (!g.d_alibi) return;
    for (int64_t head = 0; head < p.heads; ++head) {
        double sum = 0;
        for (int64_t item = 0; item < turns.chunks * heads; ++item)
            if (item % p.kv_heads == head / group(p)) sum += d_alibi[item * group(p) + head % group(p)];
        g.d_alibi[head] = (float)sum;
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
