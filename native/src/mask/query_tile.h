// What one thread works on: a tile of query rows, and scratch memory.
#pragma once

#include "mask/key_summary.h"
#include "simd/dtypes.h"

namespace qkv {
namespace QKV_ISA {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;
constexpr float INF = std::numeric_limits<float>::infinity();

static inline int64_t group(const Problem& p) { return p.heads / p.kv_heads; }

static inline int64_t rows_of_head(const Problem& p) { return p.lq * group(p); }

static inline int64_t tiles_of_head(const Problem& p) { return (rows_of_head(p) + BLOCK_M - 1) / BLOCK_M; }

// A head of keys and values.
struct HeadRef {
    int64_t batch, kv_head;
};

static inline char* row_of(const Problem& p, const View& view, int64_t batch, int64_t head, int64_t row) {
    return row_of(p.dtype, view, batch, head, row);
}

// Heads of keys and values are counted through all batches.
static inline HeadRef head_at(const Problem& p, int64_t index) { return {index / p.kv_heads, index % p.kv_heads}; }

// A row of keys, values or their gradients.
static inline char* row_of(const Problem& p, const View& view, const HeadRef& head, int64_t row) {
    return row_of(p, view, head.batch, head.kv_head, row);
}

// The remainder of a division that rounds down.
static inline int64_t residue_of(int64_t position, int64_t size) {
    const int64_t residue = position % size;
    return residue < 0 ? residue + size : residue;
}

// The rows [first, first + count) of one key/value head, and the keys that they may see. Rows are (token, head) pairs,
// tokens first.
struct Tile : HeadRef {
    const KeyVisibility::Keys& keys;
    int64_t index;
    int count, vecs;
    int64_t begin, end;            // of the keys that any row may see, but for the first ones that all see
    int64_t band_begin, band_end;  // the same without global tokens
    int first_global, end_global;  // the rows that are global tokens lie between; both 0 if there are none
    // Lanes beyond the last row repeat it. first_key and last_key are non-decreasing over rows, and without global
    // tokens.
    int32_t token[BLOCK_M], head[BLOCK_M], position[BLOCK_M], first_key[BLOCK_M], last_key[BLOCK_M];
    int32_t residue[BLOCK_M];    // of its position, by the dilation
    int32_t is_global[BLOCK_M];  // -1 for rows that are global tokens, otherwise 0; filled in where there are any
    float slope[BLOCK_M];
    int64_t document[BLOCK_M];

    Tile(const Problem& p, const KeyVisibility& visibility, const HeadRef& of, int64_t index)
        : HeadRef(of), keys(visibility.of(batch)), index(index) {
        const int64_t first = index * BLOCK_M, members = group(p);
        count = (int)std::min<int64_t>(BLOCK_M, rows_of_head(p) - first);
        vecs = (count + LANES - 1) / LANES;
        const int64_t offset = offset_of(p, batch);
        int64_t row = first / members, member = first % members;
        first_global = end_global = 0;
        int64_t prefix = p.prefix_tokens;
        if (p.prefix_lengths) prefix = p.prefix_lengths[batch * p.prefix_lengths_batch];
        for (int r = 0; r < lanes(); ++r) {
            const int64_t here = row + offset;
            token[r] = (int32_t)row;
            head[r] = (int32_t)(kv_head * members + member);
            position[r] = (int32_t)here;
            int64_t from = here - p.left, to = std::max(here + p.right, prefix - 1);
            if (p.chunk) {
                const int64_t chunk = here - residue_of(here - p.chunk_start, p.chunk);
                from = std::max(from, chunk);
                to = std::min(to, chunk + p.chunk - 1);
            }
            first_key[r] = (int32_t)std::min(std::max(from, keys.first), keys.end);
            last_key[r] = (int32_t)std::max<int64_t>(std::min(to, keys.end - 1), -1);
            if (keys.run_first) {
                first_key[r] = std::max(first_key[r], keys.run_first[here]);
                last_key[r] = std::min(last_key[r], keys.run_last[here]);
            }
            if (p.alibi) slope[r] = p.alibi[head[r]];
            if (keys.documents) document[r] = keys.documents[here];
            if (p.dilation > 1) residue[r] = (int32_t)residue_of(here, p.dilation);
            if (keys.is_global) {
                is_global[r] = keys.is_global[here] ? -1 : 0;
                if (is_global[r] && r < count) {
                    if (end_global == 0) first_global = r;
                    end_global = r + 1;
                }
            }
            if (r + 1 < count && ++member == members) {
                member = 0;
                ++row;
            }
        }
        band_begin = first_key[0];
        band_end = last_key[count - 1] + 1;
        end = keys.is_global ? keys.end : band_end;
        if (p.lengths) end = std::min(end, std::max<int64_t>(0, p.lengths[batch * p.lengths_batch]));
        begin = keys.is_global ? 0 : std::min(end, band_begin);
    }

    int lanes() const { return vecs * LANES; }

    // Row r of queries, outputs or their gradients.
    char* row(const Problem& p, const View& view, int r) const { return row_of(p, view, batch, head[r], token[r]); }

    // Of row r among (batch, heads, lq).
    int64_t index_of(const Problem& p, int r) const { return (batch * p.heads + head[r]) * p.lq + token[r]; }
};

// Hands out aligned parts of a buffer; without one, it only counts.
struct ArenaLayout {
    float* base;
    int64_t used = 0;

    float* operator()(int64_t floats) {
        float* const here = base ? base + used : nullptr;
        used += (floats + 15) / 16 * 16;
        return here;
    }
};

// The scratch memory of this thread as a `Scratch`, whose constructor takes what it needs. Kept from call to call.
template <class Scratch, class Call>
static Scratch thread_scratch(const Call& call) {
    static thread_local std::vector<float> memory;
    ArenaLayout count{nullptr};
    Scratch(call, count);
    if ((int64_t)memory.size() < count.used + 16) {
        memory = std::vector<float>();  // or resize would copy it
        memory.resize(count.used + 16);
    }
    ArenaLayout arena{(float*)(((uintptr_t)memory.data() + 63) / 64 * 64)};
    return Scratch(call, arena);
}

}  // namespace QKV_ISA
}  // namespace qkv
