// Keys and values in pages, copied side by side: those of a piece where it is folded, into memory that stays in the
// caches, or, where several tiles of rows would do so again and again, those of all heads at once.
//
// Products are then the same as for keys that lie so, and so are the bits.
#pragma once

#include <memory>

#include "mask/key_block.h"
#include "runtime/parallel.h"

namespace qkv {
namespace QKV_ISA {

// Copies keys or values [begin, end) of a head.
static void collect(const Problem& p, const View& view, int64_t width, int64_t head, int64_t begin, int64_t end,
                    char* to) {
    const int64_t item = size_of(p.kv_dtype), bytes = width * item, stride = view.row * item;
    for (int64_t key = begin, count; key < end; key += count) {
        const int64_t entry = (p.pages.first + key) / p.pages.size, row = (p.pages.first + key) % p.pages.size;
        count = std::min(p.pages.size - row, end - key);
        const char* from = row_of(p.kv_dtype, view, p.pages.table[entry], head, row);
        for (int64_t i = 0; i < count; ++i, from += stride, to += bytes) std::memcpy(to, from, bytes);
    }
}

// Rows of keys or values from `first` on that lie side by side at `data`, as a view of all heads or of one.
static View view_at(const Problem& p, const void* data, int64_t width, int64_t first, int64_t head) {
    return {(char*)data - first * width * size_of(p.kv_dtype), 0, head, width};
}

// Memory for the keys and values of a piece.
struct PageScratch {
    float *keys, *values;

    PageScratch(const Problem& p, ArenaLayout& place) {
        keys = place(KV_SPLIT * p.width);
        values = place(KV_SPLIT * p.value_width);
    }
};

// The problem for the piece that begins with this key, which lies side by side.
static Problem side_by_side(const Problem& p, const Tile& t, int64_t begin, const PageScratch& scratch) {
    // What lies before a window is not read. Behind the last key that is seen, products read to the end of its block.
    const int64_t from = begin < p.sink_tokens ? begin : std::max(begin, t.begin / BLOCK_N * BLOCK_N);
    const int64_t to = std::min({begin + KV_SPLIT, p.lk, (t.end + BLOCK_N - 1) / BLOCK_N * BLOCK_N});
    collect(p, p.k, p.width, t.kv_head, from, to, (char*)scratch.keys);
    collect(p, p.v, p.value_width, t.kv_head, from, to, (char*)scratch.values);
    Problem near = p;
    near.pages = {};
    near.k = view_at(p, scratch.keys, p.width, from, 0);
    near.v = view_at(p, scratch.values, p.value_width, from, 0);
    return near;
}

// The problem for all keys, which lie side by side in memory of its own.
struct SideBySide {
    Problem problem;

    explicit SideBySide(const Problem& p) : problem(p) {
        problem.pages = {};
        problem.k = copied(p, p.k, p.width, keys);
        problem.v = copied(p, p.v, p.value_width, values);
    }

   private:
    std::unique_ptr<char[]> keys, values;

    static View copied(const Problem& p, const View& view, int64_t width, std::unique_ptr<char[]>& to) {
        const int64_t parts = (p.lk + COPY_ROWS - 1) / COPY_ROWS, bytes = width * size_of(p.kv_dtype);
        to.reset(new char[p.kv_heads * p.lk * bytes]);
        parallel_for(p.kv_heads * parts, p.threads, [&](int64_t item) {
            const int64_t head = item / parts, begin = item % parts * COPY_ROWS;
            collect(p, view, width, head, begin, std::min(p.lk, begin + COPY_ROWS),
                    to.get() + (head * p.lk + begin) * bytes);
        });
        return view_at(p, to.get(), width, 0, p.lk * width);
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
