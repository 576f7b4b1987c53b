// The shortest way from tensors of Python to the kernel, for calls that need nothing but q, k, v and an interval.
#include <cstring>

#include "dlpack.h"
#include "face.h"

namespace qkv {
namespace {

// What of the interpreter is called. Functions of its stable interface, so that no header of Python is needed.
struct Interpreter {
    const dlpack::Exchange* tensors;
    void* (*release_lock)();
    void (*take_lock)(void*);
    void (*forget_exception)();
};

bool view_of(const dlpack::Tensor& tensor, View& view) {
    const int64_t* const strides = tensor.strides;
    view = {(char*)tensor.data + tensor.byte_offset, strides[0], strides[1], strides[2]};
    return strides[3] == 1;
}

bool dtype_of(const dlpack::Tensor& tensor, Dtype& dtype) {
    if (tensor.code == dlpack::BFLOAT)
        dtype = Dtype::bf16;
    else if (tensor.code == dlpack::FLOAT && tensor.bits == 32)
        dtype = Dtype::f32;
    else if (tensor.code == dlpack::FLOAT && tensor.bits == 16)
        dtype = Dtype::f16;
    else
        return false;
    return true;
}

bool holds_heads(const dlpack::Tensor& tensor) {
    if (tensor.device != dlpack::CPU || tensor.dimensions != 4) return false;
    for (int i = 0; i < 4; ++i)
        if (tensor.shape[i] < 1) return false;
    return true;
}

// Whether the tensors state a problem; if so, it is filled in.
bool pose(const dlpack::Tensor& q, const dlpack::Tensor& k, const dlpack::Tensor& v, const dlpack::Tensor& out,
          Problem& p) {
    if (!holds_heads(q) || !holds_heads(k) || !holds_heads(v) || !holds_heads(out)) return false;
    Dtype of_k, of_v;
    if (!dtype_of(q, p.dtype) || !dtype_of(k, of_k) || !dtype_of(v, of_v)) return false;
    if (of_k != p.dtype || of_v != p.dtype) return false;
    p.kv_dtype = p.dtype;
    p.batch = q.shape[0], p.heads = q.shape[1], p.lq = q.shape[2], p.width = q.shape[3];
    p.kv_heads = k.shape[1], p.lk = k.shape[2], p.value_width = v.shape[3];
    if (k.shape[0] != p.batch || v.shape[0] != p.batch || v.shape[1] != p.kv_heads || v.shape[2] != p.lk) return false;
    if (k.shape[3] != p.width || p.heads % p.kv_heads != 0) return false;
    return view_of(q, p.q) && view_of(k, p.k) && view_of(v, p.v) && view_of(out, p.out);
}

}  // namespace
}  // namespace qkv

// Attention of tensors, which Python owns and holds the lock of. `out` has the shape and dtype of the result. Returns
// as qkv_forward; or 2, and has done nothing, where the tensors are of another kind or do not fit together.
QKV_EXPORT int qkv_plain(const void* interpreter, void* q, void* k, void* v, void* out, int64_t offset, int64_t left,
                         int64_t right, int64_t sink_tokens, float scale, int threads) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    qkv::dlpack::Tensor tensors[4];
    void* const objects[4] = {q, k, v, out};
    for (int i = 0; i < 4; ++i)
        if (python.tensors->look(objects[i], &tensors[i]) != 0) {
            python.forget_exception();
            return qkv::OTHER;
        }
    qkv::Problem p = {};
    if (!qkv::pose(tensors[0], tensors[1], tensors[2], tensors[3], p)) return qkv::OTHER;
    p.offset = offset, p.left = left, p.right = right, p.sink_tokens = sink_tokens;
    p.scale = scale;
    p.threads = threads;
    void* const state = python.release_lock();
    const int status = qkv_forward(&p);
    python.take_lock(state);
    return status;
}
