// Keys and values in pages. Where those that are read follow each other in memory, they are read in place. Others are
// copied to contiguous memory: those of a split when it is accumulated, into scratch that stays in the caches; or, if
// several tiles of rows would copy them again, those of all heads at once.
//
// Products, and so the bits, are those of contiguous keys. Scales of int8 are few, so those of a split are always
// copied: vectors of them are read beyond its end.
#pragma once

#include <memory>

#include "mask/key_block.h"
#include "runtime/parallel.h"

namespace qkv {
namespace QKV_ISA {

// Scales in consecutive pages from `begin` on, as those of one batch without pages.
static Scales without_pages(const Problem& p, const Scales& scales, int64_t batch, int64_t begin) {
    if (!scales.data) return scales;
    return {scales.at(*p.pages.entry(batch, begin), 0, p.pages.row(begin) - begin), scales.batch, scales.head};
}

// Whether keys [begin, end) of a batch lie in memory as they would without pages: in consecutive pages.
static bool are_consecutive(const Problem& p, int64_t batch, int64_t begin, int64_t end) {
    const int64_t *page = p.pages.entry(batch, begin), *const last = p.pages.end_entry(batch, begin, end) - 1;
    if (page < last && (p.k.batch != p.pages.size * p.k.row || p.v.batch != p.pages.size * p.v.row)) return false;
    for (; page < last; ++page)
        if (page[1] != page[0] + 1) return false;
    return true;
}

// Keys or values in consecutive pages from `begin` on, as a view of one batch with the strides that it has without
// pages.
static View without_pages(const Problem& p, const View& view, int64_t batch, int64_t begin) {
    View of_batch = view;
    of_batch.data = row_of(p.kv_dtype, view, *p.pages.entry(batch, begin), 0, p.pages.row(begin) - begin);
    return of_batch;
}

// Whether the scales of consecutive pages follow each other.
static bool are_consecutive(const Problem& p, const Scales& scales) {
    return !scales.data || scales.batch == p.pages.size;
}

// Makes the problem one without pages if each batch has consecutive pages, at equal distances between batches. Returns
// whether it has.
static bool drop_pages(Problem& p) {
    if (p.lk == 0) return p.pages = {}, true;
    const int64_t first = *p.pages.entry(0, 0), step = p.batch > 1 ? *p.pages.entry(1, 0) - first : 0;
    for (int64_t batch = 0; batch < p.batch; ++batch)
        if (*p.pages.entry(batch, 0) != first + batch * step || !are_consecutive(p, batch, 0, p.lk)) return false;
    if (!are_consecutive(p, p.k_scale) || !are_consecutive(p, p.v_scale)) return false;
    for (Scales* scales : {&p.k_scale, &p.v_scale}) {
        const int64_t page = scales->batch;
        *scales = without_pages(p, *scales, 0, 0);
        scales->batch = step * page;
    }
    for (View* view : {&p.k, &p.v}) {
        const int64_t page = view->batch;
        *view = without_pages(p, *view, 0, 0);
        view->batch = step * page;
    }
    p.pages = {};
    return true;
}

// Copies keys or values [begin, end) of a head.
static void collect(const Problem& p, const View& view, int64_t width, const HeadRef& of, int64_t begin, int64_t end,
                    char* to) {
    const int64_t item = size_of(p.kv_dtype), bytes = width * item, stride = view.row * item;
    const int64_t* page = p.pages.entry(of.batch, begin);
    int64_t row = p.pages.row(begin);
    for (int64_t key = begin, count; key < end; key += count, row = 0) {
        count = std::min(p.pages.size - row, end - key);
        const char* from = row_of(p.kv_dtype, view, *page++, of.kv_head, row);
        if (stride == bytes) {
            std::memcpy(to, from, count * bytes);
            to += count * bytes;
            continue;
        }
        for (int64_t i = 0; i < count; ++i, from += stride, to += bytes) std::memcpy(to, from, bytes);
    }
}

// Copies the scales of keys [begin, end) of a head.
static void collect(const Problem& p, const Scales& scales, const HeadRef& of, int64_t begin, int64_t end, float* to) {
    for (int64_t key = begin, count; key < end; key += count, to += count) {
        const int64_t row = p.pages.row(key);
        count = std::min(p.pages.size - row, end - key);
        std::copy_n(scales.at(*p.pages.entry(of.batch, key), of.kv_head, row), count, to);
    }
}

// Contiguous rows of keys or values from `first` on at `data`, as a view of all batches and heads or of one.
static View view_at(const Problem& p, const void* data, int64_t width, int64_t first, int64_t batch, int64_t head) {
    return {(char*)data - first * width * size_of(p.kv_dtype), batch, head, width};
}

// Memory for the keys and values of a split, and for their scales.
struct PageScratch {
    float *keys, *values, *k_scale, *v_scale;

    PageScratch(const Problem& p, ArenaLayout& arena) {
        keys = arena(KV_SPLIT * p.width);
        values = arena(KV_SPLIT * p.value_width);
        k_scale = arena(p.k_scale.data ? KV_SPLIT + LANES : 0);
        v_scale = arena(p.v_scale.data ? KV_SPLIT + LANES : 0);
    }
};

// The problem for the split that begins with this key, without pages.
static Problem contiguous(const Problem& p, const Tile& t, int64_t begin, const PageScratch& scratch) {
    // Keys before a window are not read. Products read to the end of the block of the last key that is seen.
    const int64_t from = begin < p.sink_tokens ? begin : std::max(begin, t.begin / BLOCK_N * BLOCK_N);
    const int64_t to = std::min({begin + KV_SPLIT, p.lk, (t.end + BLOCK_N - 1) / BLOCK_N * BLOCK_N});
    Problem copy = p;
    copy.pages = {};
    if (p.k_scale.data) {
        collect(p, p.k_scale, t, from, to, scratch.k_scale);
        collect(p, p.v_scale, t, from, to, scratch.v_scale);
        copy.k_scale = {scratch.k_scale - from, 0, 0};
        copy.v_scale = {scratch.v_scale - from, 0, 0};
    }
    if (are_consecutive(p, t.batch, from, to)) {
        copy.k = without_pages(p, p.k, t.batch, from);
        copy.v = without_pages(p, p.v, t.batch, from);
        copy.k.batch = copy.v.batch = 0;
        return copy;
    }
    collect(p, p.k, p.width, t, from, to, (char*)scratch.keys);
    collect(p, p.v, p.value_width, t, from, to, (char*)scratch.values);
    copy.k = view_at(p, scratch.keys, p.width, from, 0, 0);
    copy.v = view_at(p, scratch.values, p.value_width, from, 0, 0);
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
        to.reset(new char[p.batch * p.kv_heads * p.lk * bytes]);
        parallel_for(p.batch * p.kv_heads * parts, p.threads, [&](int64_t item) {
            const HeadRef of = head_at(p, item / parts);
            const int64_t begin = item % parts * COPY_ROWS;
            collect(p, view, width, of, begin, std::min(p.lk, begin + COPY_ROWS),
                    to.get() + (item / parts * p.lk + begin) * bytes);
        });
        return view_at(p, to.get(), width, 0, p.kv_heads * p.lk * width, p.lk * width);
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
