// A call of the kernel from its description: random tensors, their results, and what these should be.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "oracle.h"
#include "tensor.h"

namespace qkv {

constexpr int64_t UNBOUNDED = (int64_t)1 << 40;

// Of queries, keys and values.
constexpr Dtype DTYPES[] = {Dtype::f32, Dtype::bf16, Dtype::f16};

// How a matrix broadcasts.
struct Broadcast {
    bool batch = false, head = false, row = false, column = false;
};

struct Case {
    Dtype dtype = Dtype::f32;
    bool int8 = false;  // keys and values are, and have no gradients
    int64_t batch = 1, kv_heads = 1, group = 1, lq = 1, lk = 1, width = 16, value_width = 16;
    int64_t offset = 0, left = UNBOUNDED, right = UNBOUNDED, sink_tokens = 0;
    std::vector<int64_t> offsets = {};  // of each batch, added to the offset
    int64_t prefix_tokens = 0, dilation = 1, chunk = 0, chunk_start = 0;
    bool keep = false, documents = false;
    int64_t global_every = 0;  // position n * global_every + 5 is a global token; 0 for none
    bool in_runs = false;      // the keys that are kept, and those of each document, follow each other
    bool shared_rows = false;  // one row of keep and documents for all batches
    std::vector<int64_t> lengths = {}, prefix_lengths = {};
    std::optional<Broadcast> allow = {}, bias = {};
    Dtype bias_dtype = Dtype::f32;
    bool alibi = false, sink_logits = false, d_lse = true;
    float scale = 0.3f, softcap = 0, dropout = 0;
    int threads = 1;
    Layout queries = {}, keys = {}, results = {};
    bool values_are_keys = false;  // values are the first columns of the keys
    unsigned seed = 1;

    Case causal(int64_t window = UNBOUNDED) const;

    std::string describe() const;
};

class Call {
   public:
    explicit Call(const Case& c);
    Call(const Call&) = delete;

    void forward() const;
    void backward() const;  // after forward

    // Checks all results against the oracle: for int8, those of forward. `kept` as `expect` has it.
    void check(const std::vector<bool>& kept = {}) const;

    // The bits of all results.
    std::string bits() const;

    const Case c;
    const int64_t heads;
    Tensor q, k, v, out, d_out, dq, dk, dv;
    Tensor k_scale, v_scale;                    // (batch, kv_heads, 1, lk)
    Tensor lse, d_lse, delta, d_bias, d_alibi;  // (batch, heads, lq, 1), or (1, 1, 1, heads)
    Tensor bias, allow;
    std::vector<uint8_t> keep, is_global;
    std::vector<int64_t> documents;
    std::vector<float> alibi, sink_logits;
    Problem problem{};
    Gradients gradients{};
};

// Forward, backward where there is one, and the oracle.
void check(const Case& c);

}  // namespace qkv
