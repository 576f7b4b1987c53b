// Keys and values in pages, copied to contiguous memory: those of a split when it is accumulated, into scratch that
// stays in the caches; or, if several tiles of rows would copy them again, those of all heads at once.
//
// Products, and so the bits, are those of contiguous keys.
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

// Contiguous rows of keys or values from `first` on at `data`, as a view of all heads or of one.
static View view_at(const Problem& p, const void* data, int64_t width, int64_t first, int64_t head) {
    return {(char*)data - first * width * size_of(p.kv_dtype), 0, head, width};
}

// Memory for the keys and values of a split.
struct PageScratch {
    float *keys, *values;

    PageScratch(const Problem& p, ArenaLayout& arena) {
        keys = arena(KV_SPLIT * p.width);
        values = arena(KV_SPLIT * p.value_width);
    }
};

// The problem for the split that begins with this key, with contiguous keys and values.
static Problem contiguous(const Problem& p, const Tile& t, int64_t begin, const PageScratch& scratch) {
    // Keys before a window are not read. Products read to the end of the block of the last key that is seen.
    const int64_t from = begin < p.sink_tokens ? begin : std::max(begin, t.begin / BLOCK_N * BLOCK_N);
    const int64_t to = std::min({begin + KV_SPLIT, p.lk, (t.end + BLOCK_N - 1) / BLOCK_N * BLOCK_N});
    collect(p, p.k, p.width, t.kv_head, from, to, (char*)scratch.keys);
    collect(p, p.v, p.value_width, t.kv_head, from, to, (char*)scratch.values);
    Problem copy = p;
    copy.pages = {};
    copy.k = view_at(p, scratch.keys, p.width, from, 0);
    copy.v = view_at(p, scratch.values, p.value_width, from, 0);
    return copy;
}

// The problem with all keys and values copied to contiguous memory, which it owns.
struct ContiguousProblem {
    Problem problem;

    explicit ContiguousProblem(const Problem& p) : problem(p) {
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
