// Tensors as Python hands them out, and an interpreter for them.
#pragma once

#include <initializer_list>

#include "abi/python_tensor.h"
#include "tensor.h"

namespace qkv {

// Objects are the tensors themselves, or what is not a tensor.
inline int look(void* object, dlpack::Tensor* tensor) {
    *tensor = *(const dlpack::Tensor*)object;
    return tensor->lanes == 0 ? -1 : 0;
}

inline int taken = 0;  // how often the lock was

inline int none;
inline const dlpack::Exchange exchange = {1, 0, nullptr, nullptr, nullptr, nullptr, look, nullptr};
inline const Interpreter python = {&exchange, &none, [] { return (void*)nullptr; }, [](void*) { ++taken; }, [] {}};

// A tensor as DLPack describes it.
struct Object : dlpack::Tensor {
    int64_t own_shape[4], own_strides[4];

    // Some of the dimensions of a tensor (batch, head, row, column).
    explicit Object(const qkv::Tensor& of, std::initializer_list<int> which = {0, 1, 2, 3})
        : Object(of.view.data,
                 of.dtype == Dtype::i8 ? dlpack::INT : (of.dtype == Dtype::bf16 ? dlpack::BFLOAT : dlpack::FLOAT),
                 format_of(of.dtype).item) {
        const int64_t sizes[] = {of.batch, of.heads, of.rows, of.width};
        const int64_t steps[] = {of.view.batch, of.view.head, of.view.row, 1};
        for (int i : which) own_shape[dimensions] = sizes[i], own_strides[dimensions++] = steps[i];
    }

    // Numbers (rows, columns), or (columns) if there are no rows.
    Object(const void* numbers, dlpack::Code code, int64_t bytes, int64_t rows, int64_t columns)
        : Object((void*)numbers, code, bytes) {
        if (rows > 0) own_shape[dimensions] = rows, own_strides[dimensions++] = columns;
        own_shape[dimensions] = columns, own_strides[dimensions++] = 1;
    }

   private:
    Object(void* numbers, dlpack::Code of_code, int64_t bytes) : own_shape{}, own_strides{} {
        data = numbers, device = dlpack::CPU, device_id = 0, byte_offset = 0, lanes = 1, dimensions = 0;
        code = of_code, bits = (uint8_t)(8 * bytes);
        shape = own_shape, strides = own_strides;
    }
};

}  // namespace qkv
