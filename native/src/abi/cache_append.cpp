// Appends keys and values to the memory of a cache, in pages or not: as they are, or in int8.
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>

#include "abi/python_tensor.h"
#include "runtime/parallel.h"

namespace qkv {
namespace {

// New tokens, and where they go.
struct Addition {
    Quantization what;
    Dtype to;

    // Fills the fields in, for tokens that go to slots from `start` on. False if the tensors do not fit together.
    bool set(const dlpack::Tensor& tokens, const dlpack::Tensor& memory, const dlpack::Tensor& scales, int64_t start) {
        if (!holds_heads(tokens) || !holds_heads(memory)) return false;
        if (!dtype_of(tokens, what.dtype) || !dtype_of(memory, to) || what.dtype == Dtype::i8) return false;
        if (!view_of(tokens, what.from) || !view_of(memory, what.to)) return false;
        for (int i : {0, 1, 3})
            if (tokens.shape[i] != memory.shape[i]) return false;
        what.batch = tokens.shape[0], what.heads = tokens.shape[1], what.rows = tokens.shape[2];
        what.width = tokens.shape[3];
        if (start < 0 || start > memory.shape[2] - what.rows) return false;
        what.to.data = (char*)what.to.data + start * what.to.row * size_of(to);
        if (!is_given(scales)) return to == what.dtype;
        if (to != Dtype::i8 || !scales_of(scales, what.batch, what.heads, what.scale)) return false;
        what.scale.data += start;
        return start <= scales.shape[2] - what.rows;
    }

    void write(int threads) {
        what.threads = threads;
        if (to == Dtype::i8) return qkv_quantize(&what);
        parallel_for(what.batch * what.heads, threads, [&](int64_t item) {
            const int64_t batch = item / what.heads, head = item % what.heads;
            for (int64_t row = 0; row < what.rows; ++row)
                std::memmove(row_of(to, what.to, batch, head, row), row_of(to, what.from, batch, head, row),
                             what.width * size_of(to));
        });
    }
};

// New tokens of one dtype, and the pages where they go, as they are or in int8.
struct PagedAddition {
    Dtype dtype, kv_dtype;
    View from, to;
    Scales scale = {};
    int64_t batch, heads, rows, width;
    Pages pages = {};

    // Fills the fields in. False if the tensors do not fit together, or pages that are written to do not exist.
    bool set(const dlpack::Tensor& tokens, const dlpack::Tensor& memory, const dlpack::Tensor& scales,
             const dlpack::Tensor& table, const int64_t* starts) {
        if (!holds_heads(tokens) || !holds_heads(memory) || !is(table, dlpack::INT, 64, 2)) return false;
        if (!dtype_of(tokens, dtype) || !dtype_of(memory, kv_dtype) || dtype == Dtype::i8) return false;
        if (kv_dtype != (is_given(scales) ? Dtype::i8 : dtype)) return false;
        if (!view_of(tokens, from) || !view_of(memory, to)) return false;
        if (is_given(scales) &&
            (!scales_of(scales, memory.shape[0], memory.shape[1], scale) || scales.shape[2] != memory.shape[2]))
            return false;
        batch = tokens.shape[0], heads = tokens.shape[1], rows = tokens.shape[2], width = tokens.shape[3];
        if (memory.shape[1] != heads || memory.shape[3] != width || table.shape[0] != batch) return false;
        if (table.strides[1] != 1) return false;
        pages = {(const int64_t*)data_of(table), table.strides[0], memory.shape[2], 0, memory.shape[0]};
        for (int64_t b = 0; b < batch; ++b) {
            const int64_t begin = starts[b], end = begin + rows;
            if (begin < 0 || end > pages.size * table.shape[1]) return false;
            for (const int64_t* page = pages.entry(b, begin); page < pages.end_entry(b, begin, end); ++page)
                if (*page < 0 || *page >= pages.count) return false;
        }
        return true;
    }

    void write(const int64_t* starts, int threads) const {
        parallel_for(batch * heads, threads, [&](int64_t item) {
            const int64_t b = item / heads, head = item % heads;
            for (int64_t row = 0, count; row < rows; row += count) {
                const int64_t page = *pages.entry(b, starts[b] + row), place = pages.row(starts[b] + row);
                count = std::min(pages.size - place, rows - row);
                write(b, head, row, page, place, count);
            }
        });
    }

   private:
    // Rows of a head that go to one page, from a place in it on.
    void write(int64_t b, int64_t head, int64_t row, int64_t page, int64_t place, int64_t count) const {
        char *source = row_of(dtype, from, b, head, row), *target = row_of(kv_dtype, to, page, head, place);
        if (scale.data) {
            Quantization q = {};
            q.dtype = dtype, q.batch = q.heads = q.threads = 1, q.rows = count, q.width = width;
            q.from = {source, 0, 0, from.row}, q.to = {target, 0, 0, to.row};
            q.scale = {scale.at(page, head, place), 0, 0};
            return qkv_quantize(&q);
        }
        for (int64_t i = 0; i < count; ++i)
            std::memmove(target + i * to.row * size_of(dtype), source + i * from.row * size_of(dtype),
                         width * size_of(dtype));
    }
};

}  // namespace
}  // namespace qkv

// Writes tokens k and v from row `start` of keys and values on, rounded to int8 if these have scales, float32 (batch,
// heads, capacity) or None. Returns DONE; or OTHER, and writes nothing, if the tensors are of another kind, do not fit
// together, or exceed the capacity.
QKV_EXPORT int qkv_append(const void* interpreter, void* k, void* v, void* keys, void* values, void* k_scale,
                          void* v_scale, int64_t start, int threads) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    void* const objects[2][3] = {{k, keys, k_scale}, {v, values, v_scale}};
    qkv::Addition additions[2];
    for (int i = 0; i < 2; ++i) {
        qkv::dlpack::Tensor tensors[3];
        for (int n = 0; n < 3; ++n)
            if (!python.look(objects[i][n], tensors[n])) return qkv::OTHER;
        if (!additions[i].set(tensors[0], tensors[1], tensors[2], start)) return qkv::OTHER;
    }
    if (additions[0].what.rows != additions[1].what.rows) return qkv::OTHER;
    return python.unlocked([&] {
        for (qkv::Addition& addition : additions) addition.write(threads);
        return qkv::DONE;
    });
}

// Writes tokens k and v to keys `start` and on of each batch; or starts[b] and on, if these, int64 (batch), are given.
// keys and values are (page, head, row, column), and table, int64 (batch, entries), has the pages of each batch in
// order; rounded to int8 if these have scales, float32 (page, head, row) or None. Returns as qkv_append.
QKV_EXPORT int qkv_append_pages(const void* interpreter, void* k, void* v, void* keys, void* values, void* k_scale,
                                void* v_scale, void* table, void* starts, int64_t start, int threads) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    void* const objects[] = {k, v, keys, values, k_scale, v_scale, table, starts};
    qkv::dlpack::Tensor tensors[8];
    for (int n = 0; n < 8; ++n)
        if (!python.look(objects[n], tensors[n])) return qkv::OTHER;
    const qkv::dlpack::Tensor &tokens = tensors[0], &of_batches = tensors[7];
    if (!qkv::holds_heads(tokens)) return qkv::OTHER;
    const int64_t* where = nullptr;
    std::unique_ptr<int64_t[]> same;
    if (!qkv::is_given(of_batches)) {
        const int64_t batch = tokens.shape[0];
        same.reset(new (std::nothrow) int64_t[std::max<int64_t>(1, batch)]);
        if (!same) return qkv::OUT_OF_MEMORY;
        std::fill_n(same.get(), batch, start);
        where = same.get();
    } else if (qkv::is(of_batches, qkv::dlpack::INT, 64, 1) && of_batches.shape[0] == tokens.shape[0] &&
               (of_batches.strides[0] == 1 || of_batches.shape[0] == 1)) {
        where = (const int64_t*)qkv::data_of(of_batches);
    } else {
        return qkv::OTHER;
    }
    qkv::PagedAddition additions[2];
    for (int i = 0; i < 2; ++i)
        if (!additions[i].set(tensors[i], tensors[2 + i], tensors[4 + i], tensors[6], where)) return qkv::OTHER;
    if (additions[0].rows != additions[1].rows) return qkv::OTHER;
    return python.unlocked([&] {
        for (const qkv::PagedAddition& addition : additions) addition.write(where, threads);
        return qkv::DONE;
    });
}
