// The fast path from Python tensors to a product of few rows.
#include <algorithm>

#include "abi/python_rows.h"

namespace qkv {
namespace {

bool make_projection(const dlpack::Tensor& x, const dlpack::Tensor& weight, const dlpack::Tensor& bias,
                     const dlpack::Tensor& out, Projection& p) {
    if (!holds_rows(x) || !holds_rows(weight) || !holds_rows(out) || weight.dimensions != 2) return false;
    Dtype of_weight;
    if (!dtype_of(x, p.dtype) || !dtype_of(weight, of_weight) || !dtype_of(out, p.out_dtype)) return false;
    if (p.dtype == Dtype::i8 || of_weight != p.dtype) return false;
    if (p.out_dtype != p.dtype && p.out_dtype != Dtype::f32) return false;
    p.out_features = weight.shape[0], p.in_features = weight.shape[1];
    p.x = data_of(x), p.weight = data_of(weight), p.out = data_of(out);
    p.weight_row = weight.strides[0];
    if (is_given(bias)) {
        Dtype of_bias;
        if (!holds_rows(bias) || !dtype_of(bias, of_bias) || of_bias != p.dtype || bias.dimensions != 1) return false;
        if (bias.shape[0] != p.out_features) return false;
        p.bias = data_of(bias);
    }
    int64_t rows_of_out;
    if (x.shape[x.dimensions - 1] != p.in_features || out.shape[out.dimensions - 1] != p.out_features) return false;
    return rows_of(x, p.rows, p.x_row) && rows_of(out, rows_of_out, p.out_row) && rows_of_out == p.rows;
}

// The product of MOST_ROWS rows from `row` on, or of those left.
Projection rows_from(const Projection& p, int64_t row) {
    Projection part = p;
    part.rows = std::min(MOST_ROWS, p.rows - row);
    part.x = (const char*)p.x + row * p.x_row * size_of(p.dtype);
    part.out = (char*)p.out + row * p.out_row * size_of(p.out_dtype);
    return part;
}

}  // namespace
}  // namespace qkv

// out = x @ weight.mT + bias, of Python tensors: x and out have any leading dimensions, and bias may be None. Computes
// MOST_ROWS rows at a time. The caller holds the GIL. Returns as qkv_project; or OTHER, and does nothing, if the
// tensors are of another kind or do not fit together.
QKV_EXPORT int qkv_fast_project(const void* interpreter, void* x, void* weight, void* bias, void* out, int threads) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    qkv::dlpack::Tensor tensors[4];
    void* const objects[] = {x, weight, bias, out};
    for (int i = 0; i < 4; ++i)
        if (!python.look(objects[i], tensors[i])) return qkv::OTHER;
    qkv::Projection p = {};
    if (!qkv::make_projection(tensors[0], tensors[1], tensors[2], tensors[3], p)) return qkv::OTHER;
    return python.unlocked([&] {
        int status = qkv::DONE;
        for (int64_t row = 0; row < p.rows && status == qkv::DONE; row += qkv::MOST_ROWS) {
            const qkv::Projection rows = qkv::rows_from(p, row);
            status = qkv_project(&rows, 1, threads);
        }
        return status;
    });
}
