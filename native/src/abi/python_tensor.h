// Python tensors, read through DLPack without a Python call.
#pragma once

#include "abi/c_api.h"
#include "abi/dlpack.h"

namespace qkv {

// Functions of the interpreter that are called, all of its stable ABI, so that no Python header is needed.
struct Interpreter {
    const dlpack::Exchange* tensors;
    void* none;
    void* (*release_lock)();
    void (*take_lock)(void*);
    void (*forget_exception)();

    // Of abi/python_calls.cpp alone.
    int64_t (*as_integer)(void*) = nullptr;
    double (*as_real)(void*) = nullptr;
    const char* (*as_bytes)(void*) = nullptr;
    void* (*integer)(long) = nullptr;  // a new object
    void* (*exception)() = nullptr;    // null unless one is set
    int (*refuse_arguments)() = nullptr;

    // Whether the object is a tensor that DLPack can describe, or None, whose `dimensions` become -1.
    bool look(void* object, dlpack::Tensor& tensor) const {
        tensor.dimensions = -1;
        if (object == none || tensors->look(object, &tensor) == 0) return true;
        forget_exception();
        return false;
    }

    // Does work that needs no lock.
    template <class Work>
    auto unlocked(Work work) const {
        void* const state = release_lock();
        const auto result = work();
        take_lock(state);
        return result;
    }
};

inline bool is_given(const dlpack::Tensor& tensor) { return tensor.dimensions >= 0; }

inline char* data_of(const dlpack::Tensor& tensor) { return (char*)tensor.data + tensor.byte_offset; }

inline bool view_of(const dlpack::Tensor& tensor, View& view) {
    const int64_t* const strides = tensor.strides;
    view = {data_of(tensor), strides[0], strides[1], strides[2]};
    return strides[3] == 1;
}

inline bool dtype_of(const dlpack::Tensor& tensor, Dtype& dtype) {
    if (tensor.code == dlpack::BFLOAT)
        dtype = Dtype::bf16;
    else if (tensor.code == dlpack::FLOAT && tensor.bits == 32)
        dtype = Dtype::f32;
    else if (tensor.code == dlpack::FLOAT && tensor.bits == 16)
        dtype = Dtype::f16;
    else if (tensor.code == dlpack::INT && tensor.bits == 8)
        dtype = Dtype::i8;
    else
        return false;
    return true;
}

// Whether there is a number in it, in four dimensions, and memory for it: storage can be freed.
inline bool holds_heads(const dlpack::Tensor& tensor) {
    if (tensor.device != dlpack::CPU || tensor.dimensions != 4 || !tensor.data) return false;
    for (int i = 0; i < 4; ++i)
        if (tensor.shape[i] < 1) return false;
    return true;
}

inline bool is(const dlpack::Tensor& tensor, dlpack::Code code, int bits, int dimensions) {
    return tensor.device == dlpack::CPU && tensor.code == code && tensor.bits == bits &&
           tensor.dimensions == dimensions;
}

// Fills in the scales of these batches and heads. False if the tensor has another shape or dtype.
inline bool scales_of(const dlpack::Tensor& tensor, int64_t batch, int64_t heads, Scales& scales) {
    if (!is(tensor, dlpack::FLOAT, 32, 3) || tensor.shape[0] != batch || tensor.shape[1] != heads) return false;
    scales = {(float*)data_of(tensor), tensor.strides[0], tensor.strides[1]};
    return tensor.strides[2] == 1;
}

}  // namespace qkv
