// The parts of a rotation (abi/rotation.h) from Python tensors.
#pragma once

#include <initializer_list>

#include "abi/python_tensor.h"
#include "abi/rotation.h"

namespace qkv {

// The stride of a dimension counted from the last one, 0 if it is missing or 1. False unless it is missing, 1 or
// `size`.
inline bool stride_of(const dlpack::Tensor& tensor, int from_last, int64_t size, int64_t& stride) {
    const int i = tensor.dimensions - from_last;
    stride = i < 0 || tensor.shape[i] == 1 ? 0 : tensor.strides[i];
    return i < 0 || tensor.shape[i] == 1 || tensor.shape[i] == size;
}

// Whether the tensor has this dtype, 1 to `most_dimensions` dimensions, and memory.
inline bool is_vector(const dlpack::Tensor& tensor, dlpack::Code code, int bits, int most_dimensions) {
    return tensor.dimensions >= 1 && tensor.dimensions <= most_dimensions && tensor.data &&
           is(tensor, code, bits, tensor.dimensions);
}

// Fills in a table whose last dimensions are (batch, token, column), the columns next to each other.
inline bool columns_of(const dlpack::Tensor& tensor, const Rotation& r, int64_t columns, int64_t& batch,
                       int64_t& token) {
    const int last = tensor.dimensions - 1;
    if (tensor.shape[last] < columns || (columns > 1 && tensor.strides[last] != 1)) return false;
    return stride_of(tensor, 2, r.tokens, token) && stride_of(tensor, 3, r.batch, batch);
}

// Fills in the cos and sin of a rotation whose batch and tokens are known. False if they do not fit.
inline bool set_tables(const dlpack::Tensor& cos, const dlpack::Tensor& sin, int64_t pairs, int64_t second,
                       Rotation& r) {
    Dtype of_sin;
    if (!is_given(sin) || !dtype_of(cos, r.table_dtype) || !dtype_of(sin, of_sin)) return false;
    if (of_sin != r.table_dtype || r.table_dtype == Dtype::i8) return false;
    for (const dlpack::Tensor* table : {&cos, &sin})
        if (!is_vector(*table, table->code, table->bits, 3)) return false;
    r.pairs = pairs, r.second = second;
    r.cos = data_of(cos), r.sin = data_of(sin);
    return second >= 0 && columns_of(cos, r, pairs + second, r.cos_batch, r.cos_token) &&
           columns_of(sin, r, pairs + second, r.sin_batch, r.sin_token);
}

}  // namespace qkv
