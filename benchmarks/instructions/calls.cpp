// calls DTYPE KEYS_DTYPE CAUSAL HEADS KV_HEADS QUERIES KEYS WIDTH CALLS: as many forward passes of one thread.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "abi/c_api.h"

namespace {

qkv::Dtype dtype_of(const char* name) {
    if (std::strcmp(name, "bf16") == 0) return qkv::Dtype::bf16;
    if (std::strcmp(name, "f16") == 0) return qkv::Dtype::f16;
    return std::strcmp(name, "i8") == 0 ? qkv::Dtype::i8 : qkv::Dtype::f32;
}

// Tensors of heads (head, row, width) of numbers between 1/2 and 2, of either sign.
struct Heads {
    std::vector<char> memory;
    qkv::View view;

    Heads(qkv::Dtype dtype, int64_t heads, int64_t rows, int64_t width) : memory(heads * rows * width * 4) {
        static uint32_t state = 1;
        for (int64_t i = 0; i < heads * rows * width; ++i) {
            state = state * 1664525 + 1013904223;
            const uint32_t top = state >> 16, sign = top >> 15 << 15;
            const uint32_t f32 = sign << 16 | 0x3f000000 | (top & 0x1ff) << 15;
            if (dtype == qkv::Dtype::f32) std::memcpy(&memory[4 * i], &f32, 4);
            const uint16_t half = (uint16_t)(dtype == qkv::Dtype::bf16 ? f32 >> 16 : sign | 0x3800 | (top & 0x7ff));
            if (qkv::size_of(dtype) == 2) std::memcpy(&memory[2 * i], &half, 2);
            if (dtype == qkv::Dtype::i8) memory[i] = (char)top;
        }
        view = {memory.data(), heads * rows * width, rows * width, width};
    }
};

}  // namespace

int main(int, char** words) {
    const qkv::Dtype dtype = dtype_of(words[1]), keys = dtype_of(words[2]);
    const bool causal = std::atoi(words[3]) == 1;
    const int64_t heads = std::atoll(words[4]), kv_heads = std::atoll(words[5]), lq = std::atoll(words[6]);
    const int64_t lk = std::atoll(words[7]), width = std::atoll(words[8]);
    const Heads q(dtype, heads, lq, width), k(keys, kv_heads, lk, width), v(keys, kv_heads, lk, width);
    const Heads out(dtype, heads, lq, width);
    const std::vector<float> scales(kv_heads * lk, 1.0f / 128);
    qkv::Problem p{};
    p.dtype = dtype, p.kv_dtype = keys;
    p.batch = 1, p.heads = heads, p.kv_heads = kv_heads, p.lq = lq, p.lk = lk;
    p.width = p.value_width = width;
    p.q = q.view, p.k = k.view, p.v = v.view, p.out = out.view;
    p.left = int64_t(1) << 40, p.right = causal ? 0 : int64_t(1) << 40;
    p.offset = lk - lq;
    p.scale = 0.125f;
    p.threads = 1;
    if (keys == qkv::Dtype::i8) p.k_scale = p.v_scale = {(float*)scales.data(), kv_heads * lk, lk};
    for (int call = 0; call < std::atoi(words[9]); ++call)
        if (qkv_forward(&p) != qkv::DONE) return 1;
    return 0;
}
