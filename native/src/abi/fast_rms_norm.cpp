// The fast path from tensors of Python to a norm.
#include "abi/python_rows.h"
#include "abi/rms_norm.h"

namespace qkv {
namespace {

// Whether the tensors fit together; if so, the norm is filled in, apart from numbers.
bool make_norm(const dlpack::Tensor& x, const dlpack::Tensor& gains, const dlpack::Tensor& out, RmsNorm& n) {
    Dtype of_out;
    if (!holds_rows(x) || !holds_rows(out) || !dtype_of(x, n.dtype) || !dtype_of(out, of_out)) return false;
    if (n.dtype == Dtype::i8 || of_out != n.dtype) return false;
    int64_t rows;
    n.width = x.shape[x.dimensions - 1];
    n.x = data_of(x), n.out = data_of(out);
    return out.shape[out.dimensions - 1] == n.width && rows_of(x, n.rows, n.x_row) && rows_of(out, rows, n.out_row) &&
           rows == n.rows && vector_of(gains, n.dtype, n.width, n.gains);
}

}  // namespace
}  // namespace qkv

// The norm (abi/rms_norm.h) of rows, the last dimension of x, written to out, of tensors of Python, whose lock the
// caller has; gains may be None. Returns DONE; or OTHER, and does nothing, if the tensors are of another kind or do not
// fit together.
QKV_EXPORT int qkv_fast_rms_norm(const void* interpreter, void* x, void* gains, void* out, float eps, int gain,
                                 int threads) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    qkv::dlpack::Tensor tensors[3];
    void* const objects[] = {x, gains, out};
    for (int i = 0; i < 3; ++i)
        if (!python.look(objects[i], tensors[i])) return qkv::OTHER;
    qkv::RmsNorm n = {};
    if (!qkv::make_norm(tensors[0], tensors[1], tensors[2], n)) return qkv::OTHER;
    n.eps = eps, n.gain = (qkv::Gain)gain, n.threads = threads;
    return python.unlocked([&] {
        qkv_rms_norm(&n);
        return qkv::DONE;
    });
}
