// Rows, vectors and weights among Python tensors.
#pragma once

#include "abi/projection.h"
#include "abi/python_tensor.h"

namespace qkv {

inline bool is_of(const dlpack::Tensor& tensor, Dtype dtype, int dimensions) {
    Dtype found;
    return tensor.device == dlpack::CPU && tensor.dimensions == dimensions && tensor.data && dtype_of(tensor, found) &&
           found == dtype;
}

// Fills in a vector of `count` numbers, or null for None. False if the tensor is another one.
template <class Number>
bool vector_of(const dlpack::Tensor& tensor, Dtype dtype, int64_t count, const Number*& data) {
    data = nullptr;
    if (!is_given(tensor)) return true;
    if (!is_of(tensor, dtype, 1) || tensor.shape[0] != count || (count > 1 && tensor.strides[0] != 1)) return false;
    data = (const Number*)data_of(tensor);
    return true;
}

inline bool projection_of(const dlpack::Tensor& weight, const dlpack::Tensor& bias, Dtype dtype, int64_t rows,
                          int64_t in_features, int64_t out_features, Projection& projection) {
    if (!is_of(weight, dtype, 2) || weight.shape[0] != out_features || weight.shape[1] != in_features) return false;
    if (weight.strides[1] != 1) return false;
    projection = {};
    projection.dtype = projection.out_dtype = dtype;
    projection.rows = rows, projection.in_features = in_features, projection.out_features = out_features;
    projection.weight = data_of(weight), projection.weight_row = weight.strides[0];
    return vector_of(bias, dtype, out_features, projection.bias);
}

// Whether the tensor is on the CPU, not empty, and contiguous along its last dimension.
inline bool holds_rows(const dlpack::Tensor& tensor) {
    if (tensor.device != dlpack::CPU || tensor.dimensions < 1 || !tensor.data) return false;
    for (int i = 0; i < tensor.dimensions; ++i)
        if (tensor.shape[i] < 1) return false;
    const int last = tensor.dimensions - 1;
    return tensor.shape[last] == 1 || tensor.strides[last] == 1;
}

// Merges all dimensions but the last into one of rows: how many, and how far apart. False if that needs a copy.
inline bool rows_of(const dlpack::Tensor& tensor, int64_t& rows, int64_t& stride) {
    rows = 1, stride = 0;
    for (int i = tensor.dimensions - 2; i >= 0; --i) {
        if (tensor.shape[i] == 1) continue;
        if (rows == 1)
            stride = tensor.strides[i];
        else if (tensor.strides[i] != rows * stride)
            return false;
        rows *= tensor.shape[i];
    }
    return true;
}

}  // namespace qkv
