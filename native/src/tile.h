// What one thread works on: a tile of query rows, its running state, and scratch memory.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "convert.h"
#include "problem.h"
#include "vec.h"

namespace qkv {
namespace QKV_ISA {

constexpr int ROWS = 64;     // query rows of a tile
constexpr int SEGMENT = 12;  // keys of a segment at an edge
constexpr int BLOCK = 96;    // keys of a block, of which scores are held
constexpr int PIECE = 480;   // keys that are folded apart from the others, and merged in order

static inline int64_t group(const Problem& p) { return p.heads / p.kv_heads; }

static inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

static inline char* row_of(const Problem& p, const View& view, int64_t batch, int64_t head, int64_t row) {
    return (char*)view.data + (batch * view.batch + head * view.head + row * view.row) * size_of(p.dtype);
}

// The rows [first, first + count) of one key/value head, and what they see.
struct Tile {
    int64_t batch, kv_head, first;
    int count, vecs;
    int64_t low, high;   // positions of the first and the last row
    int64_t begin, end;  // keys that the interval shows to any row
    int32_t position[ROWS];
    float slope[ROWS];

    Tile(const Problem& p, int64_t batch, int64_t kv_head, int64_t first)
        : batch(batch), kv_head(kv_head), first(first) {
        count = (int)std::min<int64_t>(ROWS, p.lq * group(p) - first);
        vecs = (count + LANES - 1) / LANES;
        for (int r = 0; r < lanes(); ++r) {
            const int64_t row = first + std::min(r, count - 1);
            position[r] = (int32_t)(row / group(p) + p.offset);
            slope[r] = p.alibi ? p.alibi[kv_head * group(p) + row % group(p)] : 0.0f;
        }
        low = position[0];
        high = position[count - 1];
        end = std::max<int64_t>(0, std::min(p.lk, high + p.right + 1));
        if (p.lengths) end = std::min(end, std::max<int64_t>(0, p.lengths[batch * p.lengths_batch]));
        begin = std::min(end, std::max<int64_t>(0, low - p.left));
    }

    int lanes() const { return vecs * LANES; }

    const char* query(const Problem& p, int r) const {
        const int64_t row = first + r;
        return row_of(p, p.q, batch, kv_head * group(p) + row % group(p), row / group(p));
    }
};

// Keys [begin, end) of a block for the vectors [first, last) of rows that see any of them.
struct Segment {
    int begin, end, first, last;
};

// Running maximum, sum and output of each row; the maximum in units of the scores, and lagging behind.
struct State {
    float* top;
    float* sum;
    float* out;  // (value_width, lanes)

    State(float* memory, const Tile& t) : top(memory), sum(memory + t.lanes()), out(memory + 2 * t.lanes()) {}

    static int64_t floats(const Problem& p) { return (p.value_width + 2) * ROWS; }

    void clear(const Problem& p, const Tile& t) const {
        std::fill(top, top + t.lanes(), -std::numeric_limits<float>::infinity());
        std::fill(sum, sum + t.lanes(), 0.0f);
        std::fill(out, out + p.value_width * t.lanes(), 0.0f);
    }
};

// Memory of one thread, kept from call to call.
struct Scratch {
    std::vector<float> memory, merged;
    float *queries, *scores, *keys, *values, *state;

    void reserve(const Problem& p) {
        const auto aligned = [](int64_t floats) { return (floats + 15) / 16 * 16; };
        const int64_t q = aligned((p.width + LANES) * ROWS), s = std::max(BLOCK * ROWS, PIECE * LANES);
        const int64_t k = aligned(BLOCK * (p.width + 1)), v = aligned(PIECE * (p.value_width + 1)), o = State::floats(p);
        const size_t needed = q + s + k + v + o + 16;
        if (memory.size() < needed) memory.resize(needed);
        queries = (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
        scores = queries + q;
        keys = scores + s;
        values = keys + k;
        state = values + v;
    }
};


static bool all_finite(const Problem& p, const Tile& t, int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        const char* row = row_of(p, p.v, t.batch, t.kv_head, first + j);
        uint32_t worst = 0;
        if (p.dtype == Dtype::f32) {
            const uint32_t* x = (const uint32_t*)row;
            for (int64_t d = 0; d < p.value_width; ++d) worst |= (x[d] & 0x7f800000u) == 0x7f800000u;
        } else {
            const uint16_t* x = (const uint16_t*)row;
            const uint16_t exponent = p.dtype == Dtype::bf16 ? 0x7f80 : 0x7c00;
            for (int64_t d = 0; d < p.value_width; ++d) worst |= (x[d] & exponent) == exponent;
        }
        if (worst) return false;
    }
    return true;
}

}  // namespace QKV_ISA
}  // namespace qkv
