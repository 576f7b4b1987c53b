// The kernel for one instruction set. Compiled once for each, with its flags and QKV_ISA naming its namespace.
#include "forward.h"
#include "parallel.h"

namespace qkv {
namespace QKV_ISA {

template <class Kind>
static void fold_piece(const Problem& p, const Tile& t, int64_t piece, Scratch& scratch, const State& state) {
    state.clear(p, t);
    fold<Kind>(p, t, piece * PIECE, std::min<int64_t>(t.end, (piece + 1) * PIECE), scratch, state);
}

template <class Kind>
static void run(const Problem& p) {
    static thread_local Scratch scratch;
    const int64_t tiles = (p.lq * group(p) + ROWS - 1) / ROWS, heads = p.batch * p.kv_heads;
    const int64_t pieces = (p.lk + PIECE - 1) / PIECE, room = State::floats(p);
    const auto tile_of = [&](int64_t item) {
        // Late tiles first: under a causal mask they see the most.
        return Tile(p, item % heads / p.kv_heads, item % heads % p.kv_heads, (tiles - 1 - item / heads) * ROWS);
    };
    const auto is_seen = [&](const Tile& t, int64_t piece) {
        return piece * PIECE < t.end && ((piece + 1) * PIECE > t.begin || piece * PIECE < p.sink_tokens);
    };
    if (heads * tiles >= 4 * p.threads || pieces <= 1) {
        parallel_for(heads * tiles, p.threads, [&](int64_t item) {
            const Tile t = tile_of(item);
            scratch.reserve(p);
            std::vector<float>& memory = scratch.merged;
            if ((int64_t)memory.size() < room) memory.resize(room);
            Format<Kind>::queries(p, t, scratch.queries);
            const State total(memory.data(), t), state(scratch.state, t);
            total.clear(p, t);
            for (int64_t piece = 0; piece < pieces; ++piece) {
                if (!is_seen(t, piece)) continue;
                fold_piece<Kind>(p, t, piece, scratch, state);
                merge(p, t, total, state);
            }
            finish(p, t, total);
        });
        return;
    }
    // Few tiles: their pieces go to different threads, and are merged in the same order.
    std::vector<float> states(heads * tiles * pieces * room);
    parallel_for(heads * tiles * pieces, p.threads, [&](int64_t item) {
        const Tile t = tile_of(item / pieces);
        if (!is_seen(t, item % pieces)) return;
        scratch.reserve(p);
        Format<Kind>::queries(p, t, scratch.queries);
        fold_piece<Kind>(p, t, item % pieces, scratch, State(&states[item * room], t));
    });
    parallel_for(heads * tiles, p.threads, [&](int64_t item) {
        const Tile t = tile_of(item);
        scratch.reserve(p);
        const State total(scratch.state, t);
        total.clear(p, t);
        for (int64_t piece = 0; piece < pieces; ++piece)
            if (is_seen(t, piece)) merge(p, t, total, State(&states[(item * pieces + piece) * room], t));
        finish(p, t, total);
    });
}

void forward(const Problem& p) {
    if (p.lq == 1 && group(p) <= FEW) return run<Few>(p);
#if defined(__AVX512BF16__)
    if (p.dtype == Dtype::bf16) return run<Pair>(p);
#endif
    run<Single>(p);
}

}  // namespace QKV_ISA
}  // namespace qkv
