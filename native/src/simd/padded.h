// Parts of vectors, for instruction sets without masked loads.
#pragma once

#include <cstdint>
#include <cstring>

namespace qkv {
namespace QKV_ISA {

// The first `count` of LANES numbers, and zeros.
template <class Number, int LANES>
struct Padded {
    Number data[LANES] = {};

    [[gnu::always_inline]] Padded(const void* from, int64_t count) { std::memcpy(data, from, count * sizeof(Number)); }
};

}  // namespace QKV_ISA
}  // namespace qkv
