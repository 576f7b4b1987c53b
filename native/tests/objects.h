// Tensors as objects of Python that the library looks at, without Python.
#pragma once

#include <algorithm>
#include <array>

#include "abi/python_tensor.h"
#include "tensor.h"

namespace qkv {

// Objects are the tensors themselves, or what is not a tensor.
inline int look(void* object, dlpack::Tensor* tensor) {
    *tensor = *(const dlpack::Tensor*)object;
    return tensor->lanes == 0 ? -1 : 0;
}

inline int taken = 0;  // how often the lock was

inline void* release() { return nullptr; }
inline void take(void*) { ++taken; }
inline void forget() {}

inline int none;
inline const dlpack::Exchange exchange = {1, 0, nullptr, nullptr, nullptr, nullptr, look, nullptr};
inline const Interpreter python = {&exchange, &none, release, take, forget};

// A tensor as DLPack describes it.
struct Object : dlpack::Tensor {
    int64_t own_shape[4], own_strides[4];

    explicit Object(const qkv::Tensor& of, int32_t dimensions = 4)
        : Object(of, {of.batch, of.heads, of.rows, of.width}, {of.view.batch, of.view.head, of.view.row, 1},
                 dimensions) {}

    // A tensor of one head as (batch, row, column), (row, column) or (column).
    static Object of_rows(const qkv::Tensor& of, int32_t dimensions) {
        const int64_t shape[] = {of.batch, of.rows, of.width}, strides[] = {of.view.batch, of.view.row, 1};
        const int32_t from = 3 - dimensions;
        Object object(of, {}, {}, dimensions);
        for (int32_t i = from; i < 3; ++i)
            object.own_shape[i - from] = shape[i], object.own_strides[i - from] = strides[i];
        return object;
    }

    Object(const Object& other) : dlpack::Tensor(other) { copy(other.own_shape, other.own_strides); }

   private:
    Object(const qkv::Tensor& of, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& steps,
           int32_t dimensions) {
        data = of.view.data, device = dlpack::CPU, device_id = 0, byte_offset = 0, lanes = 1;
        this->dimensions = dimensions;
        code = of.dtype == Dtype::i8 ? dlpack::INT : (of.dtype == Dtype::bf16 ? dlpack::BFLOAT : dlpack::FLOAT);
        bits = (uint8_t)(8 * format_of(of.dtype).item);
        copy(sizes.data(), steps.data());
    }

    void copy(const int64_t* sizes, const int64_t* steps) {
        std::copy(sizes, sizes + 4, own_shape), std::copy(steps, steps + 4, own_strides);
        shape = own_shape, strides = own_strides;
    }
};

}  // namespace qkv
