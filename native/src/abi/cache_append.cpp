// Appends keys and values to the memory of a cache: as they are, or in int8.
#include <cstring>
#include <initializer_list>

#include "abi/python_tensor.h"
#include "runtime/parallel.h"

namespace qkv {
namespace {

// New tokens, and where they go.
struct Addition {
    Quantization what;
    Dtype to;

    // Whether the tensors fit together; if so, it is filled in.
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
