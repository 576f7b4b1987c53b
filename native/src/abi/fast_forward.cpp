// The fast path from Python tensors to the kernel: q, k, v, pages, offsets, an interval and padding.
#include <initializer_list>

#include "abi/python_tensor.h"

namespace qkv {
namespace {

// The tensors of a call, in the order in which Python gives them.
struct Call {
    dlpack::Tensor q, k, v, out, k_scale, v_scale, table, offsets, keep, lengths;

    // False if one cannot be read.
    bool look(const Interpreter& python, void* const* objects) {
        for (dlpack::Tensor* tensor : {&q, &k, &v, &out, &k_scale, &v_scale, &table, &offsets, &keep, &lengths})
            if (!python.look(*objects++, *tensor)) return false;
        return true;
    }
};

bool scales_of(const dlpack::Tensor& tensor, const Problem& p, Scales& scales) {
    const Pages& pages = p.pages;
    return scales_of(tensor, pages.table ? pages.count : p.batch, p.kv_heads, scales) &&
           tensor.shape[2] == (pages.table ? pages.size : p.lk);
}

// Fills in numbers of the keys (batch or 1, lk), or of the batches (batch or 1).
template <class Number>
bool rows_of(const dlpack::Tensor& tensor, const Problem& p, const Number*& rows, int64_t& batch) {
    if (tensor.shape[0] != 1 && tensor.shape[0] != p.batch) return false;
    rows = (const Number*)data_of(tensor);
    batch = tensor.shape[0] == 1 ? 0 : tensor.strides[0];
    return tensor.dimensions == 1 || (tensor.shape[1] == p.lk && tensor.strides[1] == 1);
}

// Fills in the problem; keys in pages number `key_count`. False if the tensors do not fit together.
bool make_problem(const Call& call, int64_t key_count, Problem& p) {
    const dlpack::Tensor &q = call.q, &k = call.k, &v = call.v, &out = call.out;
    if (!holds_heads(q) || !holds_heads(k) || !holds_heads(v) || !holds_heads(out)) return false;
    Dtype of_v;
    if (!dtype_of(q, p.dtype) || !dtype_of(k, p.kv_dtype) || !dtype_of(v, of_v)) return false;
    const bool scaled = p.kv_dtype == Dtype::i8;
    if (of_v != p.kv_dtype || p.dtype == Dtype::i8 || (!scaled && p.kv_dtype != p.dtype)) return false;
    p.batch = q.shape[0], p.heads = q.shape[1], p.lq = q.shape[2], p.width = q.shape[3];
    p.kv_heads = k.shape[1], p.lk = k.shape[2], p.value_width = v.shape[3];
    if (v.shape[0] != k.shape[0] || v.shape[1] != p.kv_heads || v.shape[2] != p.lk) return false;
    if (is_given(call.table)) {
        if (!is(call.table, dlpack::INT, 64, 2) || call.table.strides[1] != 1) return false;
        if (call.table.shape[0] != p.batch || key_count < 0) return false;
        p.pages = {(const int64_t*)data_of(call.table), call.table.strides[0], k.shape[2], 0, k.shape[0]};
        p.lk = key_count;
        if ((p.lk + p.pages.size - 1) / p.pages.size > call.table.shape[1]) return false;
    } else if (k.shape[0] != p.batch) {
        return false;
    }
    if (k.shape[3] != p.width || p.heads % p.kv_heads != 0) return false;
    if (scaled != is_given(call.k_scale) || scaled != is_given(call.v_scale)) return false;
    if (scaled && !(scales_of(call.k_scale, p, p.k_scale) && scales_of(call.v_scale, p, p.v_scale))) return false;
    if (is_given(call.offsets))
        if (!is(call.offsets, dlpack::INT, 64, 1) || call.offsets.shape[0] != p.batch ||
            !rows_of(call.offsets, p, p.offsets, p.offsets_batch))
            return false;
    if (is_given(call.keep))
        if (!is(call.keep, dlpack::BOOL, 8, 2) || !rows_of(call.keep, p, p.keep, p.keep_batch)) return false;
    if (is_given(call.lengths))
        if (!is(call.lengths, dlpack::INT, 64, 1) || !rows_of(call.lengths, p, p.lengths, p.lengths_batch))
            return false;
    return view_of(q, p.q) && view_of(k, p.k) && view_of(v, p.v) && view_of(out, p.out);
}

}  // namespace
}  // namespace qkv

QKV_EXPORT int qkv_interpreter_size() { return (int)sizeof(qkv::Interpreter); }

// Attention of Python tensors. The caller holds the GIL. `out` has the shape and dtype of the result; the tensors
// after it may be None. Returns as qkv_forward; or OTHER, and does nothing, if the tensors are of another kind or do
// not fit together.
QKV_EXPORT int qkv_fast_forward(const void* interpreter, void* q, void* k, void* v, void* out, void* k_scale,
                                void* v_scale, void* table, void* offsets, void* keep, void* lengths, int64_t key_count,
                                int64_t offset, int64_t left, int64_t right, int64_t sink_tokens, float scale,
                                int threads) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    void* const objects[] = {q, k, v, out, k_scale, v_scale, table, offsets, keep, lengths};
    qkv::Call call;
    qkv::Problem p = {};
    if (!call.look(python, objects) || !qkv::make_problem(call, key_count, p)) return qkv::OTHER;
    p.offset = offset, p.left = left, p.right = right, p.sink_tokens = sink_tokens;
    p.scale = scale;
    p.threads = threads;
    return python.unlocked([&] { return qkv_forward(&p); });
}
