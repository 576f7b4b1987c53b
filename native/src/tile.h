// What one thread works on: a tile of query rows, and scratch memory.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "convert.h"
#include "problem.h"

namespace qkv {
namespace QKV_ISA {

constexpr int ROWS = 64;     // query rows of a tile
constexpr int SEGMENT = 12;  // keys of a segment at an edge
constexpr int BLOCK = 96;    // keys of a block, of which scores are held
constexpr int PIECE = 480;   // keys that are folded apart from the others, and merged in order

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;
constexpr float INF = std::numeric_limits<float>::infinity();

static inline int64_t group(const Problem& p) { return p.heads / p.kv_heads; }

static inline int64_t rows_of_head(const Problem& p) { return p.lq * group(p); }

static inline int64_t tiles_of_head(const Problem& p) { return (rows_of_head(p) + ROWS - 1) / ROWS; }

static inline char* row_of(const Problem& p, const View& view, int64_t batch, int64_t head, int64_t row) {
    return row_of(p.dtype, view, batch, head, row);
}

// The rows [first, first + count) of one key/value head, and what the interval shows to them. Rows are (token, head)
// pairs, tokens first.
struct Tile {
    int64_t batch, kv_head, index;
    int count, vecs;
    int64_t low, high;   // positions of the first and the last row
    int64_t begin, end;  // keys that the interval shows to any row
    // Lanes behind the last row repeat it.
    int32_t token[ROWS], head[ROWS], position[ROWS];
    float slope[ROWS];
    int64_t document[ROWS];

    Tile(const Problem& p, int64_t batch, int64_t kv_head, int64_t index)
        : batch(batch), kv_head(kv_head), index(index) {
        const int64_t first = index * ROWS, members = group(p);
        count = (int)std::min<int64_t>(ROWS, rows_of_head(p) - first);
        vecs = (count + LANES - 1) / LANES;
        int64_t row = first / members, member = first % members;
        for (int r = 0; r < lanes(); ++r) {
            token[r] = (int32_t)row;
            head[r] = (int32_t)(kv_head * members + member);
            position[r] = (int32_t)(row + p.offset);
            if (p.alibi) slope[r] = p.alibi[head[r]];
            if (p.documents) document[r] = p.documents[batch * p.documents_batch + position[r]];
            if (r + 1 < count && ++member == members) {
                member = 0;
                ++row;
            }
        }
        low = position[0];
        high = position[count - 1];
        end = std::max<int64_t>(0, std::min(p.lk, high + p.right + 1));
        if (p.lengths) end = std::min(end, std::max<int64_t>(0, p.lengths[batch * p.lengths_batch]));
        begin = std::min(end, std::max<int64_t>(0, low - p.left));
    }

    int lanes() const { return vecs * LANES; }

    // Row r of queries, outputs or their gradients.
    char* row(const Problem& p, const View& view, int r) const { return row_of(p, view, batch, head[r], token[r]); }

    // Where row r lies among (batch, heads, lq).
    int64_t place(const Problem& p, int r) const { return (batch * p.heads + head[r]) * p.lq + token[r]; }
};

// Hands out aligned parts of a buffer; without one, it only counts.
struct Placer {
    float* base;
    int64_t used = 0;

    float* operator()(int64_t floats) {
        float* const here = base ? base + used : nullptr;
        used += (floats + 15) / 16 * 16;
        return here;
    }
};

// The scratch memory of this thread as a `Room`, whose constructor takes what it needs. Kept from call to call.
template <class Room>
static Room room(const Problem& p) {
    static thread_local std::vector<float> memory;
    Placer count{nullptr};
    Room(p, count);
    if ((int64_t)memory.size() < count.used + 16) memory.resize(count.used + 16);
    Placer place{(float*)(((uintptr_t)memory.data() + 63) / 64 * 64)};
    return Room(p, place);
}

}  // namespace QKV_ISA
}  // namespace qkv
