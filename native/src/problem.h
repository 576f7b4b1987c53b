// The plain struct that the Python side fills in. No torch header: one build serves every torch version.
#pragma once

#include <cstdint>

namespace qkv {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// A tensor of heads, (batch, head, row, column). Strides count elements; columns lie next to each other.
struct View {
    void* data;
    int64_t batch, head, row;
};

// One call of attention. Query head h reads key/value head h / (heads / kv_heads).
struct Problem {
    Dtype dtype;
    int64_t batch, heads, kv_heads, lq, lk, width, value_width;
    View q, k, v, out;
    float* lse;  // (batch, heads, lq), or null

    // The query in row i stands at i + offset and sees key j when
    // j <= position + right and (j >= position - left or j < sink_tokens) and keep[b, j] and j < lengths[b].
    int64_t offset, left, right, sink_tokens;
    const uint8_t* keep;  // (batch or 1, lk), or null
    int64_t keep_batch;
    const int64_t* lengths;  // (batch or 1), or null
    int64_t lengths_batch;

    float scale;
    float softcap;             // 0 for none
    const float* alibi;        // (heads), or null
    const float* sink_logits;  // (heads), or null

    int threads;
};

}  // namespace qkv
