// A layer's step, through tensors as Python hands them out: the bits of its parts, one after the other.
#include "abi/projection.h"
#include "abi/rotation.h"
#include "call.h"
#include "library.h"
#include "objects.h"

extern "C" int qkv_layer_step_size();
extern "C" int qkv_layer_step(const void* interpreter, void* const* tensors, int64_t key_count, int64_t offset,
                              int64_t position, int64_t left, int64_t right, int64_t sink_tokens, int64_t prefix_tokens,
                              int64_t dilation, int64_t chunk, int64_t chunk_start, int interleaved,
                              float position_scale, float attention_factor, int norm_gain, float norm_eps, float scale,
                              float softcap, int threads);
extern "C" int qkv_project(const void* projections, int count, int threads);
extern "C" int qkv_rotate(const void* rotation);

namespace qkv {
namespace {

constexpr int64_t BATCH = 2, TOKENS = 3, EMBED = 21, HEADS = 4, KV_HEADS = 2, WIDTH = 10, COLUMNS = 6, START = 4;

// Rows of numbers, as one head of a tensor.
struct Rows : Tensor {
    Rows(Dtype dtype, int64_t batch, int64_t rows, int64_t columns, unsigned seed, int64_t gap = 0)
        : Tensor(dtype, batch, 1, rows, columns, {false, false, false, gap, 0}) {
        std::mt19937 random(seed);
        std::uniform_real_distribution<> numbers(-1, 1);
        fill([&] { return numbers(random); });
    }
};

// x, weights, tables of cos and sin, and a cache of which the first slots are filled.
struct Example {
    const Dtype dtype;
    const Rows x, q_weight, k_weight, v_weight, out_weight, bias, cos, sin;
    const Tensor keys, values, out;

    explicit Example(Dtype dtype)
        : dtype(dtype), x(dtype, BATCH, TOKENS, EMBED, 1), q_weight(dtype, 1, HEADS * WIDTH, EMBED, 2, 3),
          k_weight(dtype, 1, KV_HEADS * WIDTH, EMBED, 3), v_weight(dtype, 1, KV_HEADS * WIDTH, EMBED, 4),
          out_weight(dtype, 1, EMBED, HEADS * WIDTH, 5), bias(dtype, 1, 1, KV_HEADS * WIDTH, 6),
          cos(dtype, BATCH, TOKENS, COLUMNS, 7, 2), sin(dtype, 1, TOKENS, COLUMNS, 8),
          keys(dtype, BATCH, KV_HEADS, START + TOKENS, WIDTH, {}),
          values(keys.dtype, BATCH, KV_HEADS, START + TOKENS, WIDTH, {}), out(dtype, BATCH, 1, TOKENS, EMBED, {}) {
        double number = 0;
        for (const Tensor* cached : {&keys, &values}) cached->fill([&] { return std::sin(number += 1); });
    }

    int step() const {
        Object objects[] = {Object::of_rows(x, 3),    Object::of_rows(q_weight, 2), Object::of_rows(k_weight, 2),
                            Object::of_rows(bias, 1), Object::of_rows(v_weight, 2), Object::of_rows(out_weight, 2),
                            Object::of_rows(cos, 3),  Object::of_rows(sin, 3),      Object(keys),
                            Object(values),           Object::of_rows(out, 3)};
        std::vector<void*> tensors(qkv_layer_step_size(), &none);
        const int places[] = {0, 1, 3, 4, 5, 9, 14, 15, 16, 17, qkv_layer_step_size() - 1};
        for (int i = 0; i < 11; ++i) tensors[places[i]] = &objects[i];
        return qkv_layer_step(&python, tensors.data(), 0, START, 0, UNBOUNDED, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0.3f, 0,
                              2);
    }

    void project(const Rows& weight, const Rows* bias, const Tensor& from, const Tensor& to) const {
        for (int64_t b = 0; b < BATCH; ++b) {
            const Projection p = {dtype,           dtype,
                                  TOKENS,          weight.width,
                                  weight.rows,     from.at(b, 0, 0),
                                  from.view.row,   weight.at(0, 0, 0),
                                  weight.view.row, bias ? bias->at(0, 0, 0) : nullptr,
                                  to.at(b, 0, 0),  to.view.row};
            require(qkv_project(&p, 1, 1) == 0, "not a product that the kernel takes");
        }
    }

    // As a step.
    void parts() const {
        const Rows q(dtype, BATCH, TOKENS, HEADS * WIDTH, 9), k(dtype, BATCH, TOKENS, KV_HEADS * WIDTH, 9);
        const Rows v(dtype, BATCH, TOKENS, KV_HEADS * WIDTH, 9), results(dtype, BATCH, TOKENS, HEADS * WIDTH, 9);
        project(q_weight, nullptr, x, q), project(k_weight, &bias, x, k), project(v_weight, nullptr, x, v);
        Rotation r = {};
        r.dtype = r.out_dtype = r.table_dtype = dtype;
        r.batch = BATCH, r.tokens = TOKENS, r.width = WIDTH, r.pairs = r.second = COLUMNS / 2, r.threads = 1;
        r.heads[0] = HEADS, r.heads[1] = KV_HEADS;
        r.from[0] = r.to[0] = heads_of(q), r.from[1] = r.to[1] = heads_of(k);
        r.cos = cos.view.data, r.cos_batch = cos.view.batch, r.cos_token = cos.view.row;
        r.sin = sin.view.data, r.sin_token = sin.view.row;
        require(qkv_rotate(&r) == 0, "not a rotation that the kernel takes");
        for (int64_t b = 0; b < BATCH; ++b)
            for (int64_t head = 0; head < KV_HEADS; ++head)
                for (int64_t i = 0; i < TOKENS; ++i) {
                    const int64_t column = head * WIDTH * format_of(dtype).item;
                    keys.copy_row(b, head, START + i, k.at(b, 0, i) + column);
                    values.copy_row(b, head, START + i, v.at(b, 0, i) + column);
                }
        Problem p = {};
        p.dtype = p.kv_dtype = dtype;
        p.batch = BATCH, p.heads = HEADS, p.kv_heads = KV_HEADS, p.lq = TOKENS, p.lk = START + TOKENS;
        p.width = p.value_width = WIDTH, p.threads = 1;
        p.q = heads_of(q), p.k = keys.view, p.v = values.view, p.out = heads_of(results);
        p.offset = START, p.left = UNBOUNDED, p.dilation = 1, p.scale = 0.3f;
        require(qkv_forward(&p) == 0, "no memory");
        project(out_weight, nullptr, results, out);
    }

    static View heads_of(const Rows& rows) { return {rows.view.data, rows.view.batch, WIDTH, rows.view.row}; }
};

TEST(it_has_the_bits_of_its_parts) {
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
        const Example one(dtype), other(dtype);
        require(one.step() == 0, "not a step that the kernel takes");
        other.parts();
        require(one.keys.bits() == other.keys.bits(), "other keys");
        require(one.values.bits() == other.values.bits(), "other values");
        require(one.out.bits() == other.out.bits(), "other outputs");
        for (const Tensor* written : {&one.keys, &one.values, &one.out})
            require(written->is_intact(), "something was written beside the slots");
    }
}

}  // namespace
}  // namespace qkv
