// A layer's step and a decoder layer, through tensors as Python hands them out: the bits of their parts, one after the
// other.
#include <functional>

#include "abi/decoder_layer.h"
#include "call.h"
#include "library.h"
#include "objects.h"

extern "C" {
int qkv_layer_step_size();
int qkv_step_numbers_size();
int qkv_layer_step(const void* interpreter, void* const* tensors, const void* numbers);
int qkv_block_size();
int qkv_block_numbers_size();
int qkv_decoder_layers(const void* interpreter, int count, void* const* tensors, const char* numbers);
int qkv_project(const void* projections, int count, int threads);
int qkv_rotate(const void* rotation);
int qkv_gated_mlp(const void* mlp);
void qkv_rms_norm(const void* norm);
}

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

    static StepNumbers numbers() {
        StepNumbers n = {};
        n.offset = START, n.left = UNBOUNDED, n.dilation = 1;
        n.position_scale = n.attention_factor = 1, n.scale = 0.3f, n.threads = 2;
        return n;
    }

    int step() const {
        return with_tensors([](void* const* tensors) {
            const StepNumbers n = numbers();
            return qkv_layer_step(&python, tensors, &n);
        });
    }

    // What a call returns for the tensors of a step.
    int with_tensors(const std::function<int(void* const*)>& call) const {
        Object objects[] = {Object::of_rows(x, 3),    Object::of_rows(q_weight, 2), Object::of_rows(k_weight, 2),
                            Object::of_rows(bias, 1), Object::of_rows(v_weight, 2), Object::of_rows(out_weight, 2),
                            Object::of_rows(cos, 3),  Object::of_rows(sin, 3),      Object(keys),
                            Object(values),           Object::of_rows(out, 3)};
        std::vector<void*> tensors(qkv_layer_step_size(), &none);
        const int places[] = {0, 1, 3, 4, 5, 9, 14, 15, 16, 17, qkv_layer_step_size() - 1};
        for (int i = 0; i < 11; ++i) tensors[places[i]] = &objects[i];
        return call(tensors.data());
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

// What a decoder layer has around its attention; a norm may be missing.
struct Block {
    static constexpr int64_t FEATURES = 37;
    const Rows gains, gate, up, down, gate_bias;
    const bool before_attention, after_attention, before_mlp, after_mlp, joined;

    Block(Dtype dtype, int norms, bool joined)
        : gains(dtype, 1, 4, EMBED, 11), gate(dtype, 1, joined ? 2 * FEATURES : FEATURES, EMBED, 12, 1),
          up(dtype, 1, FEATURES, EMBED, 13), down(dtype, 1, EMBED, FEATURES, 14), gate_bias(dtype, 1, 1, gate.rows, 15),
          before_attention(norms & 1), after_attention(norms & 2), before_mlp(norms & 4), after_mlp(norms & 8),
          joined(joined) {}

    // Returns the number of layers that were written, 1 or 0.
    int run(const Example& e, Gain gain) const {
        return e.with_tensors([&](void* const* tensors) {
            return with_tensors([&](void* const* block) {
                Layers layers;
                layers.add(tensors, block, gain);
                return layers.run();
            });
        });
    }

    // The arguments of a call.
    struct Layers {
        std::vector<void*> tensors;
        std::string numbers;
        int count = 0;

        void add(void* const* step, void* const* block, Gain gain) {
            tensors.insert(tensors.end(), step, step + qkv_layer_step_size());
            tensors.insert(tensors.end(), block, block + qkv_block_size());
            const StepNumbers n = Example::numbers();
            const struct {
                int32_t activation, norm_gain;
                float norm_eps;
            } of_block = {0, (int32_t)gain, 1e-3f};
            require(sizeof of_block == (size_t)qkv_block_numbers_size(), "another number of numbers");
            numbers.append((const char*)&n, sizeof n).append((const char*)&of_block, sizeof of_block);
            count++;
        }

        int run() const { return qkv_decoder_layers(&python, count, tensors.data(), numbers.data()); }
    };

    template <class Work>
    int with_tensors(Work work) const {
        std::vector<Object> norms;
        for (int64_t i = 0; i < 4; ++i) {
            norms.push_back(Object::of_rows(gains, 1));
            norms.back().byte_offset = i * gains.view.row * format_of(gains.dtype).item;
        }
        Object weights[] = {Object::of_rows(gate, 2), Object::of_rows(gate_bias, 1), Object::of_rows(up, 2),
                            Object::of_rows(down, 2)};
        void* const block[] = {given(before_attention, norms[0]),
                               given(after_attention, norms[1]),
                               given(before_mlp, norms[2]),
                               given(after_mlp, norms[3]),
                               &weights[0],
                               &weights[1],
                               given(!joined, weights[2]),
                               &none,
                               &weights[3],
                               &none};
        return work(block);
    }

    static void* given(bool is_given, Object& object) { return is_given ? &object : (void*)&none; }

    // As `run`, of another example.
    void parts(const Example& e, Gain gain) const {
        const Example inner(e.dtype);
        for (int64_t b = 0; b < BATCH; ++b)
            for (int64_t i = 0; i < TOKENS; ++i) {
                inner.x.copy_row(b, 0, i, e.x.at(b, 0, i));
                if (before_attention) norm(0, inner.x.at(b, 0, i), gain);
            }
        require(inner.step() == 0, "not a step that the kernel takes");
        const Rows normed(e.dtype, BATCH, TOKENS, EMBED, 16), added(e.dtype, BATCH, TOKENS, EMBED, 17);
        for (int64_t b = 0; b < BATCH; ++b) {
            for (int64_t i = 0; i < TOKENS; ++i) {
                char* const y = inner.out.at(b, 0, i);
                if (after_attention) norm(1, y, gain);
                add(e.dtype, e.x.at(b, 0, i), y);
                normed.copy_row(b, 0, i, y);
                if (before_mlp) norm(2, normed.at(b, 0, i), gain);
            }
            GatedMlp mlp = {};
            mlp.gate = product(normed.at(b, 0, 0), normed.view.row, gate, &gate_bias, nullptr, 0);
            mlp.up = product(normed.at(b, 0, 0), normed.view.row, up, nullptr, nullptr, 0);
            mlp.down = product(nullptr, 0, down, nullptr, added.at(b, 0, 0), added.view.row);
            mlp.gate.out_features = FEATURES, mlp.threads = 1;
            const int64_t item = format_of(e.dtype).item;
            if (joined) {
                mlp.up = mlp.gate;
                mlp.up.weight = gate.at(0, 0, FEATURES), mlp.up.bias = gate_bias.at(0, 0, 0) + FEATURES * item;
            }
            require(qkv_gated_mlp(&mlp) == 0, "not an MLP that the kernel takes");
            for (int64_t i = 0; i < TOKENS; ++i) {
                if (after_mlp) norm(3, added.at(b, 0, i), gain);
                add(e.dtype, added.at(b, 0, i), inner.out.at(b, 0, i));
                e.out.copy_row(b, 0, i, inner.out.at(b, 0, i));
                for (int64_t head = 0; head < KV_HEADS; ++head) {
                    e.keys.copy_row(b, head, START + i, inner.keys.at(b, head, START + i));
                    e.values.copy_row(b, head, START + i, inner.values.at(b, head, START + i));
                }
            }
        }
    }

    void norm(int64_t which, char* row, Gain gain) const {
        const RmsNorm norm = {gains.dtype, gain, 1, EMBED, row, EMBED, gains.at(0, 0, which), row, EMBED, 1e-3f, 1};
        qkv_rms_norm(&norm);
    }

    static void add(Dtype dtype, const char* x, char* y) {
        const int64_t item = format_of(dtype).item;
        for (int64_t c = 0; c < EMBED; ++c)
            encode(dtype, (float)decode(dtype, x + c * item) + (float)decode(dtype, y + c * item), y + c * item);
    }

    static Projection product(const void* x, int64_t x_row, const Rows& weight, const Rows* bias, void* out,
                              int64_t out_row) {
        return {weight.dtype,
                weight.dtype,
                TOKENS,
                weight.width,
                weight.rows,
                x,
                x_row,
                weight.at(0, 0, 0),
                weight.view.row,
                bias ? bias->at(0, 0, 0) : nullptr,
                out,
                out_row};
    }
};

TEST(a_decoder_layer_has_the_bits_of_its_parts) {
    require(qkv_step_numbers_size() == sizeof(StepNumbers), "another number of numbers");
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16})
        for (const int norms : {0, 5, 10, 15})
            for (const Gain gain : {Gain::rounded, Gain::one_more}) {
                const Block block(dtype, norms, norms == 15);
                const Example one(dtype), other(dtype);
                require(block.run(one, gain) == 1, "not a layer that the kernel takes");
                block.parts(other, gain);
                require(one.keys.bits() == other.keys.bits(), "other keys");
                require(one.values.bits() == other.values.bits(), "other values");
                require(one.out.bits() == other.out.bits(), "other outputs");
                for (const Tensor* written : {&one.keys, &one.values, &one.out})
                    require(written->is_intact(), "something was written beside the slots");
            }
}

TEST(a_decoder_layer_of_parts_that_do_not_fit_is_refused) {
    const Example e(Dtype::f32);
    const std::string keys = e.keys.bits(), out = e.out.bits();
    const Block other_dtype(Dtype::bf16, 5, false);
    require(other_dtype.run(e, Gain::rounded) == 0, "norms and MLP of another dtype");
    require(e.keys.bits() == keys && e.out.bits() == out, "something was written");
}

// Layers, each reading what the one before has written; the last may be one that does not fit.
int run_at_once(const Block& block, const Example& first, const Example& second, const Block& of_second) {
    return first.with_tensors([&](void* const* one) {
        return second.with_tensors([&](void* const* two) {
            return block.with_tensors([&](void* const* around_one) {
                return of_second.with_tensors([&](void* const* around_two) {
                    Block::Layers layers;
                    layers.add(one, around_one, Gain::rounded);
                    std::vector<void*> reading(two, two + qkv_layer_step_size());
                    reading.front() = one[qkv_layer_step_size() - 1];
                    layers.add(reading.data(), around_two, Gain::rounded);
                    return layers.run();
                });
            });
        });
    });
}

TEST(decoder_layers_at_once_have_the_bits_of_one_after_another) {
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
        const Block block(dtype, 15, false);
        const Example one(dtype), two(dtype), first(dtype), second(dtype);
        require(run_at_once(block, one, two, block) == 2, "not layers that the kernel takes");
        require(block.run(first, Gain::rounded) == 1, "not a layer that the kernel takes");
        for (int64_t b = 0; b < BATCH; ++b)
            for (int64_t i = 0; i < TOKENS; ++i) second.x.copy_row(b, 0, i, first.out.at(b, 0, i));
        require(block.run(second, Gain::rounded) == 1, "not a layer that the kernel takes");
        require(one.out.bits() == first.out.bits() && two.out.bits() == second.out.bits(), "other outputs");
        require(one.keys.bits() == first.keys.bits() && two.keys.bits() == second.keys.bits(), "other keys");
    }
}

TEST(decoder_layers_before_one_that_does_not_fit_are_written) {
    const Block block(Dtype::f32, 5, false), other_dtype(Dtype::bf16, 5, false);
    const Example one(Dtype::f32), two(Dtype::f32), alone(Dtype::f32);
    const std::string keys = two.keys.bits(), out = two.out.bits();
    require(run_at_once(block, one, two, other_dtype) == 1, "norms and MLP of another dtype");
    require(block.run(alone, Gain::rounded) == 1 && one.out.bits() == alone.out.bits(), "other outputs");
    require(two.keys.bits() == keys && two.out.bits() == out, "something was written");
}

}  // namespace
}  // namespace qkv
