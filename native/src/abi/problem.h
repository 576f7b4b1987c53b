// The structs that Python fills in. No torch header: one build serves every torch version.
#pragma once

#include <cstdint>

namespace qkv {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, u8 = 3, i8 = 4 };

// Bytes of a number.
static constexpr int64_t size_of(Dtype dtype) {
    return dtype == Dtype::f32 ? 4 : (dtype == Dtype::u8 || dtype == Dtype::i8 ? 1 : 2);
}

// A tensor of heads, (batch, head, row, column). Strides count elements; columns lie next to each other.
struct View {
    void* data;
    int64_t batch, head, row;
};

static inline char* row_of(Dtype dtype, const View& view, int64_t batch, int64_t head, int64_t row) {
    return (char*)view.data + (batch * view.batch + head * view.head + row * view.row) * size_of(dtype);
}

// A factor for each key, (batch, head, row), or null. Rows lie next to each other. Of keys in pages, (page, head, row).
struct Scales {
    float* data;
    int64_t batch, head;

    float* at(int64_t b, int64_t h, int64_t row) const { return data + b * batch + h * head + row; }
};

// Where keys lie, if in pages: k and v are (page, head, row, column) then, and key j of batch b is row
// (first + j) % size of the page that entry (first + j) / size of its table names, which begins at table + b * batch.
struct Pages {
    const int64_t* table;  // or null
    int64_t batch;
    int64_t size, first;
    int64_t count;  // of all pages there are

    // The table entry of a key, and where those of keys [begin, end) end.
    const int64_t* entry(int64_t b, int64_t key) const { return table + b * batch + (first + key) / size; }
    const int64_t* end_entry(int64_t b, int64_t begin, int64_t end) const {
        return begin < end ? entry(b, end - 1) + 1 : entry(b, begin);
    }
    int64_t row(int64_t key) const { return (first + key) % size; }
};

// A number for each query and key, (batch, head, query, key), or null. Strides count elements and are 0 where one
// number serves all.
struct Matrix {
    const void* data;
    int64_t batch, head, row, column;
    Dtype dtype;
};

// One call of attention. Query head h reads key/value head h / (heads / kv_heads). Widths are at least 1, other sizes
// 0. From q on, the members are the fields of `Call` in src/qkv/kernels/structs.py, in the same order.
struct Problem {
    Dtype dtype;     // of q and out
    Dtype kv_dtype;  // of k and v: the same, or i8, where a row is to be multiplied by its scale
    int64_t batch, heads, kv_heads, lq, lk, width, value_width;
    int threads;
    View out;
    float* lse;   // (batch, heads, lq), or null
    Pages pages;  // for forward alone

    View q, k, v;
    Scales k_scale, v_scale;

    // The query in row i of batch b has position i + offset + offsets[b] and sees key j when
    // (j <= position + right or j < prefix_tokens or j < prefix_lengths[b])
    // and ((j >= position - left and dilation divides position - j) or j < sink_tokens)
    // and both are in one of the chunks, which begin at chunk_start + n * chunk; there are no sink tokens then;
    // or if is_global[b, position] or is_global[b, j]. In any case only if keep[b, j] and j < lengths[b]
    // and document_ids[b, position] == document_ids[b, j] and allow[b, h, i, j].
    int64_t offset;
    const int64_t* offsets;  // (batch), or null
    int64_t offsets_batch;
    int64_t left, right, sink_tokens, prefix_tokens;
    int64_t dilation;            // less than 2^31; 0 or 1 for none
    int64_t chunk, chunk_start;  // 0 for no chunks
    const uint8_t* keep;         // (batch or 1, lk), or null
    int64_t keep_batch;
    const int64_t* lengths;  // (batch or 1), or null
    int64_t lengths_batch;
    const int64_t* document_ids;  // (batch or 1, lk), or null
    int64_t document_ids_batch;
    const int64_t* prefix_lengths;  // (batch or 1), or null
    int64_t prefix_lengths_batch;
    const uint8_t* is_global;  // (batch or 1, lk), or null
    int64_t is_global_batch;
    Matrix allow;

    float scale;
    float softcap;  // 0 for none
    Matrix bias;
    const float* alibi;        // (heads), or null
    const float* sink_logits;  // (heads), or null
    float dropout;             // probability that a weight is dropped

    uint64_t seed;
    int64_t first_head, first_key;  // what dropout counts heads and keys from, where a call has some of them
};

// Where a key of a batch lies: in which of the first dimension of k and v, and in which row.
struct Place {
    int64_t batch, row;
};

static inline Place place_of(const Problem& p, int64_t batch, int64_t key) {
    if (!p.pages.table) return {batch, key};
    return {*p.pages.entry(batch, key), p.pages.row(key)};
}

constexpr int64_t LARGEST_POSITION = (int64_t)1 << 30;  // the kernel counts in 32 bits

// The position of the first query of a batch.
static inline int64_t offset_of(const Problem& p, int64_t batch) {
    return p.offset + (p.offsets ? p.offsets[batch * p.offsets_batch] : 0);
}

// Whether the offsets of all batches are positions that the kernel can count and, where documents are read at the
// positions of queries, positions of keys; and whether all keys lie in pages there are. Only tensors need the check:
// they may hold anything.
static inline bool fits(const Problem& p) {
    for (int64_t batch = 0; p.pages.table && batch < p.batch; ++batch) {
        const int64_t* const end = p.pages.end_entry(batch, 0, p.lk);
        for (const int64_t* page = p.pages.entry(batch, 0); page < end; ++page)
            if (*page < 0 || *page >= p.pages.count) return false;
    }
    for (int64_t batch = 0; p.offsets && batch < p.batch; ++batch) {
        const int64_t offset = p.offsets[batch * p.offsets_batch];
        if (offset <= -LARGEST_POSITION || offset >= LARGEST_POSITION) return false;
        const int64_t first = offset_of(p, batch);
        if ((p.document_ids || p.is_global) && (first < 0 || first + p.lq > p.lk)) return false;
    }
    return true;
}

// Further arguments of a backward pass. Its problem has the out and lse of the forward pass.
struct Gradients {
    View d_out;
    const float* d_lse;  // (batch, heads, lq), or null
    float* delta;        // (batch, heads, lq): rowsum(d_out * out) - d_lse is left there
    View dq, dk, dv;
    float* d_bias;   // (batch, heads, lq, lk) of zeros, or null
    float* d_alibi;  // (heads), or null
};

// Rows of heads to be rounded to i8: to = from / scale, where scale is a 127th of the largest of its row.
struct Quantization {
    Dtype dtype;  // of from
    int64_t batch, heads, rows, width;
    View from, to;
    Scales scale;  // written
    int threads;
};

}  // namespace qkv
