// The kernel for one instruction set. Compiled once for each, with its flags and QKV_ISA naming its namespace.
#include "attention/backward.h"
#include "attention/paged.h"
#include "attention/prefill.h"
#include "attention/quantize.h"
#include "attention/short_query.h"
#include "runtime/huge_pages.h"
#include "runtime/parallel.h"

namespace qkv {
#if defined(QKV_EXTENDS_BASE)
namespace QKV_BASE {
void forward(const Problem&);
void backward(const Problem&, const Gradients&);
int64_t count_scores(const Problem&);
}  // namespace QKV_BASE
#endif

namespace QKV_ISA {

// A strategy, the template parameter of `run`, is how a tile of query rows is computed:
//
// clang-format off
//     Scratch                        per-thread memory, laid out from a Problem and an ArenaLayout
//     State                          the running softmax of a tile (softmax/online.h)
//     PackedHeads                    keys and values of some heads, packed once for all tiles
//     Registers                      per-thread register state, constructed before and destroyed after the products
//     pack_queries(p, t, scratch)    packs the queries of a tile into scratch
//     accumulate_keys(p, t, packed, dropout, begin, end, scratch, state)
//                                    resets `state` and accumulates keys [begin, end) into it
//     finish(p, t, state)            writes output and lse
// clang-format on
//
// They are Prefill, also for short queries, and Decode.

// Several queries.
template <class Kind, class AnyState>
struct Prefill {
    using Scratch = ForwardScratch<Kind, AnyState>;
    using State = AnyState;
    using PackedHeads = PackedPerHead<Kind>;
    using Registers = typename Kind::Registers;

    static void pack_queries(const Problem& p, const Tile& t, const Scratch& scratch) {
        OperandPacking<Kind>::pack_as_lanes(p, t, p.q, p.width, scratch.packed);
    }

    static void accumulate_keys(const Problem& p, const Tile& t, const PackedHeads& packed, const Dropout& dropout,
                                int64_t begin, int64_t end, const Scratch& scratch, const State& state) {
        state.clear(p, t);
        QKV_ISA::accumulate_keys(p, t, packed, dropout, begin, end, scratch, state);
    }

    static void finish(const Problem& p, const Tile& t, const State& state) { QKV_ISA::finish(p, t, state); }
};

// Rows of a single query. Products are chosen at run time, so that what is around them is compiled once for all.
template <class AnyRegisters>
struct Decode {
    using Scratch = DecodeScratch;
    using State = DecodeState;
    using Registers = AnyRegisters;

    // Nothing: every key and value is read once.
    struct PackedHeads {
        PackedHeads(const Problem&, const KeyVisibility&, const HeadRange&) {}
    };

    void (*pack)(const Problem&, const Tile&, float* to, float* q_scale);
    void (*accumulate)(const Problem&, const Tile&, const Dropout&, int64_t begin, int64_t end, const Scratch&,
                       const State&);
    void (*write)(const Problem&, const Tile&, const State&);

    void pack_queries(const Problem& p, const Tile& t, const Scratch& scratch) const {
        pack(p, t, scratch.queries, scratch.q_scale);
    }

    void accumulate_keys(const Problem& p, const Tile& t, const PackedHeads&, const Dropout& dropout, int64_t begin,
                         int64_t end, const Scratch& scratch, const State& state) const {
        accumulate(p, t, dropout, begin, end, scratch, state);
    }

    void finish(const Problem& p, const Tile& t, const State& state) const { write(p, t, state); }
};

// With the number of rows as a constant in the loop over keys, for products that want it.
template <class Products>
static void accumulate_rows(const Problem& p, const Tile& t, const Dropout& dropout, int64_t begin, int64_t end,
                            const DecodeScratch& scratch, const DecodeState& state) {
    const auto accumulate = [&](auto count, auto rows) {
        accumulate_keys_decode<Products, decltype(count)::value, decltype(rows)::value>(p, t, dropout, begin, end,
                                                                                        scratch, state);
    };
    if constexpr (Products::ON_TILES) {
        const std::integral_constant<int, 0> any;
        if (t.count <= 4) return accumulate(any, std::integral_constant<int, 4>());
        if (t.count <= 8) return accumulate(any, std::integral_constant<int, 8>());
        accumulate(any, std::integral_constant<int, 16>());
    } else {
        with_count<1, Products::MOST>(t.count, [&](auto count) {
            accumulate(count, std::integral_constant<int, lanes_of(decltype(count)::value)>());
        });
    }
}

template <class Strategy>
static void run(const Problem& p, const Strategy& strategy = {}) {
    using Scratch = typename Strategy::Scratch;
    using State = typename Strategy::State;
    using PackedHeads = typename Strategy::PackedHeads;
    const int64_t tiles = tiles_of_head(p), heads = p.batch * p.kv_heads;
    const int64_t splits = (p.lk + KV_SPLIT - 1) / KV_SPLIT, floats = State::floats(p);
    const KeyVisibility visibility(p);
    // The tiles of a head follow each other, so that its keys and values stay in the caches. Late ones come first:
    // under a causal mask they see the most.
    const auto tile_of = [&](int64_t head, int64_t i) { return Tile(p, visibility, head_at(p, head), tiles - 1 - i); };
    const auto is_seen = [&](const Tile& t, int64_t split) {
        return may_see_any(p, t, split * KV_SPLIT, (split + 1) * KV_SPLIT);
    };
    const auto accumulate_keys = [&](const PackedHeads& packed, const Tile& t, int64_t split, const Scratch& scratch,
                                     const State& state) {
        [[maybe_unused]] const typename Strategy::Registers registers;
        const int64_t begin = split * KV_SPLIT, end = std::min(t.end, begin + KV_SPLIT);
        const Dropout dropout(p, t);
        if (!p.pages.table) return strategy.accumulate_keys(p, t, packed, dropout, begin, end, scratch, state);
        strategy.accumulate_keys(contiguous(p, t, begin, QKV_ISA::thread_scratch<PageScratch>(p)), t, packed, dropout,
                                 begin, end, scratch, state);
    };
    const auto attend = [&](const PackedHeads& packed, const Tile& t) {
        const Scratch scratch = QKV_ISA::thread_scratch<Scratch>(p);
        strategy.pack_queries(p, t, scratch);
        const State total(scratch.total, t), state(scratch.state, t);
        bool any = false;
        for (int64_t split = 0; split < splits; ++split) {
            if (!is_seen(t, split)) continue;
            accumulate_keys(packed, t, split, scratch, any ? state : total);
            if (any) merge(p, t, total, state);  // the same bits as merging the first split with none
            any = true;
        }
        if (!any) total.clear(p, t);
        strategy.finish(p, t, total);
    };
    // With many heads a thread packs and keeps its own; all threads share the heads left over.
    const int64_t own = heads >= OWN_HEADS * p.threads ? heads - heads % p.threads : 0, left = heads - own;
    parallel_for(own, p.threads, [&](int64_t head) {
        const PackedHeads packed(p, visibility, {head, 1, 1});
        for (int64_t i = 0; i < tiles; ++i) attend(packed, tile_of(head, i));
    });
    if (left == 0) return;
    const PackedHeads packed(p, visibility, {own, left, p.threads});
    const auto tile_left = [&](int64_t item) { return tile_of(own + item / tiles, item % tiles); };
    if (own > 0 || left * tiles >= SPLIT_TILES * p.threads || splits <= 1) {
        parallel_for(
            left * tiles, p.threads, [&](int64_t item) { attend(packed, tile_left(item)); },
            tiles == 1 ? Sharing::blocks : Sharing::single);
        return;
    }
    // Few tiles: different threads take their splits, which are merged in the same order.
    const std::unique_ptr<float[]> states(new float[left * tiles * splits * floats]);
    const auto accumulate_split = [&](int64_t item) {
        const Tile t = tile_left(item / splits);
        if (!is_seen(t, item % splits)) return;
        const Scratch scratch = QKV_ISA::thread_scratch<Scratch>(p);
        strategy.pack_queries(p, t, scratch);
        accumulate_keys(packed, t, item % splits, scratch, State(&states[item * floats], t));
    };
    parallel_for(left * tiles * splits, p.threads, accumulate_split, Sharing::blocks);
    parallel_for(left * tiles, p.threads, [&](int64_t item) {
        const Tile t = tile_left(item);
        const Scratch scratch = QKV_ISA::thread_scratch<Scratch>(p);
        const State total(scratch.total, t);
        total.clear(p, t);
        for (int64_t split = 0; split < splits; ++split)
            if (is_seen(t, split)) merge(p, t, total, State(&states[(item * splits + split) * floats], t));
        strategy.finish(p, t, total);
    });
}

// Keys or values of int8 in the dtype of queries, without pages.
static std::vector<char> dequantized(const Problem& p, const View& view, const Scales& scales, int64_t width) {
    const int64_t item = size_of(p.dtype);
    std::vector<char> to(p.batch * p.kv_heads * p.lk * width * item);
    parallel_for(p.batch * p.kv_heads, p.threads, [&](int64_t head) {
        const int64_t batch = head / p.kv_heads, kv_head = head % p.kv_heads;
        for (int64_t row = 0; row < p.lk; ++row) {
            const Place place = place_of(p, batch, row);
            const char* const from = row_of(p.kv_dtype, view, place.batch, kv_head, place.row);
            const float scale = *scales.at(place.batch, kv_head, place.row);
            char* const wide = to.data() + (head * p.lk + row) * width * item;
            for_columns(width, [&](int64_t d, int64_t count) {
                store_part(p.dtype, wide + d * item, load_part(p.kv_dtype, from + d, count) * scale, count);
            });
        }
    });
    return to;
}

// Calls work with the kind of product for many rows.
template <class Work>
static void for_kind([[maybe_unused]] const Problem& p, Work work) {
#if defined(__AMX_BF16__)
    work(Amx());
#elif defined(QKV_EXTENDS_BASE)
    work(Bf16Dot());
#else
#if defined(QKV_DOT_BF16)
    if (p.dtype == Dtype::bf16) return work(Bf16Dot());
#endif
    work(F32());
#endif
}

// Whether decoding takes a problem.
static bool has_few_rows(const Problem& p) { return p.lq == 1 && group(p) <= decode_rows(p); }

#if defined(QKV_EXTENDS_BASE)
// Whether this instruction set computes a problem otherwise than the one that it extends, which computes all others:
// compiled again here, they would be the same and take most of the time to compile.
static bool is_own(const Problem& p) {
    if (p.kv_dtype == p.dtype || !has_few_rows(p)) return p.dtype == Dtype::bf16;
    return is_in_fixed_point(p);
}
#endif

void forward(const Problem& p) {
#if defined(QKV_EXTENDS_BASE)
    if (!is_own(p)) return QKV_BASE::forward(p);
#endif
    const bool few = has_few_rows(p);
    if (p.kv_dtype != p.dtype && !few) {
        std::vector<char> keys = dequantized(p, p.k, p.k_scale, p.width);
        std::vector<char> values = dequantized(p, p.v, p.v_scale, p.value_width);
        Problem wide = p;
        wide.kv_dtype = p.dtype;
        wide.k_scale = wide.v_scale = {};
        wide.pages = {};
        wide.k = {keys.data(), p.kv_heads * p.lk * p.width, p.lk * p.width, p.width};
        wide.v = {values.data(), p.kv_heads * p.lk * p.value_width, p.lk * p.value_width, p.value_width};
        return forward(wide);
    }
    if (p.pages.table) {
        Problem plain = p;
        if (drop_pages(plain)) return forward(plain);
        if (tiles_of_head(p) > 1) return forward(ContiguousProblem(p).problem);
    }
    prefer_huge_pages(p.out.data, p.batch * p.heads * p.lq * p.value_width * size_of(p.dtype));
    if (few) {
        return for_decode(p, [&](auto products) {
            using Products = decltype(products);
            using Strategy = Decode<typename Products::Registers>;
            run(p, Strategy{Products::pack_queries, accumulate_rows<Products>, QKV_ISA::finish<Products>});
        });
    }
    const bool is_short = for_short_query(p, [&](auto kind) {
        using Kind = decltype(kind);
        run<Prefill<Kind, ShortQueryState<typename Kind::Products>>>(p);
    });
    if (!is_short) for_kind(p, [&](auto kind) { run<Prefill<decltype(kind), State>>(p); });
}

int64_t count_scores(const Problem& p) {
#if defined(QKV_EXTENDS_BASE)
    if (!is_own(p)) return QKV_BASE::count_scores(p);
#endif
    const KeyVisibility visibility(p);
    const int64_t tiles = tiles_of_head(p);
    Grain grain;
    for_kind(p, [&](auto kind) { grain = kind.GRAIN; });
    int64_t count = 0;
    for (int64_t item = 0; item < p.batch * p.kv_heads * tiles; ++item) {
        const Tile t(p, visibility, head_at(p, item / tiles), item % tiles);
        for (int64_t first = 0; first < t.end; first += BLOCK_N) {
            const Block b(p, t, first, t.end, grain);
            for (int i = 0; i < b.count; ++i)
                count += (b.parts[i].end - b.parts[i].begin) * (b.parts[i].last - b.parts[i].first) * LANES;
        }
    }
    return count;
}

void quantize(const Quantization& q) {
    parallel_for(q.batch * q.heads, q.threads, [&](int64_t index) {
        const int64_t batch = index / q.heads, head = index % q.heads;
        float* const scales = q.scale.at(batch, head, 0);
        for (int64_t row = 0; row < q.rows; ++row)
            scales[row] = quantize_row(q.dtype, row_of(q.dtype, q.from, batch, head, row), q.width,
                                       (int8_t*)row_of(Dtype::i8, q.to, batch, head, row));
    });
}

void backward(const Problem& p, const Gradients& g) {
#if defined(QKV_EXTENDS_BASE)
    if (!is_own(p)) return QKV_BASE::backward(p, g);
#endif
    const int64_t item = size_of(p.dtype), keys = p.batch * p.kv_heads * p.lk;
    prefer_huge_pages(g.dq.data, p.batch * p.heads * p.lq * p.width * item);
    prefer_huge_pages(g.dk.data, keys * p.width * item);
    prefer_huge_pages(g.dv.data, keys * p.value_width * item);
    for_kind(p, [&](auto kind) { run_backward<decltype(kind)>(p, g); });
}

}  // namespace QKV_ISA
}  // namespace qkv
