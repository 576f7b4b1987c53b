// The part of DLPack 1 that describes a library's tensors without a Python call:
// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace qkv {
namespace dlpack {

enum Device : int32_t { CPU = 1 };
enum Code : uint8_t { INT = 0, FLOAT = 2, BFLOAT = 4, BOOL = 6 };

struct Tensor {
    void* data;
    Device device;
    int32_t device_id;
    int32_t dimensions;
    Code code;
    uint8_t bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct Exchange {
    uint32_t major, minor;
    void* older;
    void *allocate, *take, *give;
    int (*look)(void* object, Tensor* tensor);  // fills the tensor in; not 0 where that raised an exception
    void* stream;
};

}  // namespace dlpack
}  // namespace qkv
