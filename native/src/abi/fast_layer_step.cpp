// A layer's call with few tokens, from Python tensors.
#include <cstring>
#include <initializer_list>
#include <utility>

#include "abi/python_rows.h"
#include "abi/python_steps.h"
#include "abi/rotation_tensors.h"

namespace qkv {
namespace {

// The tensors of a call, in the order in which Python gives them.
struct Tensors {
    dlpack::Tensor x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, gate_weight, gate_bias, out_weight,
        out_bias, q_norm, k_norm, frequencies, cos, sin, keys, values, k_scale, v_scale, table, offsets, positions,
        keep, lengths, prefix_lengths, alibi, sink_logits, out;

    // False if one cannot be read.
    bool look(const Interpreter& python, void* const* objects) {
        for (dlpack::Tensor* tensor :
             {&x,         &q_weight,       &q_bias,   &k_weight,    &k_bias, &v_weight,    &v_bias,    &gate_weight,
              &gate_bias, &out_weight,     &out_bias, &q_norm,      &k_norm, &frequencies, &cos,       &sin,
              &keys,      &values,         &k_scale,  &v_scale,     &table,  &offsets,     &positions, &keep,
              &lengths,   &prefix_lengths, &alibi,    &sink_logits, &out})
            if (!python.look(*objects++, *tensor)) return false;
        return true;
    }
};

constexpr int TENSORS = sizeof(Tensors) / sizeof(dlpack::Tensor);

// Integers, one for each batch or one for all, and their stride; or null for None.
bool integers_of(const dlpack::Tensor& tensor, int64_t batch, const int64_t*& data, int64_t& stride) {
    data = nullptr;
    if (!is_given(tensor)) return true;
    if (!is(tensor, dlpack::INT, 64, 1) || (tensor.shape[0] != 1 && tensor.shape[0] != batch)) return false;
    data = (const int64_t*)data_of(tensor);
    stride = tensor.shape[0] == 1 ? 0 : tensor.strides[0];
    return true;
}

// By which tokens are rotated: one integer for each batch, added to the offset, or one for each token.
bool positions_of(const dlpack::Tensor& tensor, const Problem& p, Rotation& r) {
    if (!is_given(tensor) || tensor.dimensions == 1) return integers_of(tensor, p.batch, r.offsets, r.offsets_batch);
    if (!is(tensor, dlpack::INT, 64, 2) || (tensor.shape[0] != 1 && tensor.shape[0] != p.batch)) return false;
    r.positions = (const int64_t*)data_of(tensor);
    r.positions_batch = tensor.shape[0] == 1 ? 0 : tensor.strides[0], r.positions_token = tensor.strides[1];
    r.axis_count = 1;
    return tensor.shape[1] == p.lq;
}

// The keys that padding leaves, or null for None.
bool keep_of(const dlpack::Tensor& tensor, Problem& p) {
    if (!is_given(tensor)) return true;
    if (!is(tensor, dlpack::BOOL, 8, 2) || (tensor.shape[0] != 1 && tensor.shape[0] != p.batch)) return false;
    p.keep = (const uint8_t*)data_of(tensor);
    p.keep_batch = tensor.shape[0] == 1 ? 0 : tensor.strides[0];
    return tensor.shape[1] == p.lk && (p.lk == 1 || tensor.strides[1] == 1);
}

// Where the keys are: one row of memory for each batch, with slots to spare if there is a count; or in pages, of which
// a table names those of each batch.
bool places_of(const dlpack::Tensor& table, const dlpack::Tensor& keys, int64_t key_count, Problem& p) {
    p.lk = keys.shape[2];
    if (!is_given(table)) {
        if (key_count < 0 || key_count > p.lk) return false;
        if (key_count > 0) p.lk = key_count;
        return keys.shape[0] == p.batch;
    }
    if (!is(table, dlpack::INT, 64, 2) || table.shape[0] != p.batch) return false;
    if (table.strides[1] != 1 || key_count < 0 || key_count > p.lk * table.shape[1]) return false;
    p.pages = {(const int64_t*)data_of(table), table.strides[0], p.lk, 0, keys.shape[0]};
    p.lk = key_count;
    return true;
}

// Fills in a tensor (batch, token, column) as the rows of one matrix. False if its strides do not allow that.
bool rows_of(const dlpack::Tensor& tensor, Dtype dtype, void*& data, int64_t& row) {
    if (!is_of(tensor, dtype, 3) || tensor.strides[2] != 1) return false;
    const int64_t batch = tensor.shape[0], tokens = tensor.shape[1];
    row = tokens > 1 ? tensor.strides[1] : tensor.strides[0];
    data = data_of(tensor);
    return batch == 1 || tokens == 1 || tensor.strides[0] == tokens * row;
}

// The angles of a rotation: frequencies; or cos and sin, of which the first half of the columns is for first channels.
bool set_rotation(const Tensors& t, LayerStep& step) {
    Rotation& r = step.rotation;
    const int64_t width = step.attention.width;
    if (is_given(t.cos)) {
        r.batch = step.attention.batch, r.tokens = step.attention.lq;
        const int64_t columns = t.cos.dimensions > 0 ? t.cos.shape[t.cos.dimensions - 1] : 0, pairs = columns / 2;
        return columns >= 2 && columns % 2 == 0 && columns <= width && !is_given(t.frequencies) &&
               set_tables(t.cos, t.sin, pairs, pairs, r);
    }
    r.pairs = is_given(t.frequencies) ? t.frequencies.shape[0] : 0;
    return 2 * r.pairs <= width && vector_of(t.frequencies, Dtype::f32, r.pairs, r.frequencies);
}

// Fills in the step, apart from numbers. False if the tensors do not fit together.
bool make_step(const Tensors& t, int64_t key_count, LayerStep& step) {
    Problem& p = step.attention;
    if (t.x.dimensions != 3 || !dtype_of(t.x, p.dtype) || p.dtype == Dtype::i8) return false;
    if (!holds_heads(t.keys) || !holds_heads(t.values) || !dtype_of(t.keys, p.kv_dtype)) return false;
    Dtype of_values;
    const bool scaled = p.kv_dtype == Dtype::i8;
    if (!dtype_of(t.values, of_values) || of_values != p.kv_dtype || (!scaled && p.kv_dtype != p.dtype)) return false;
    p.batch = t.x.shape[0], p.lq = t.x.shape[1];
    p.kv_heads = t.keys.shape[1], p.width = t.keys.shape[3], p.value_width = t.values.shape[3];
    const int64_t rows = p.batch * p.lq, embed = t.x.shape[2];
    if (rows < 1 || rows > MOST_ROWS || embed < 1 || !places_of(t.table, t.keys, key_count, p)) return false;
    // Of pages all slots, of rows those of keys: their memory may grow apart.
    const auto is_long_enough = [&](const dlpack::Tensor& tensor) {
        return is_given(t.table) ? tensor.shape[2] == t.keys.shape[2] : tensor.shape[2] >= p.lk;
    };
    for (int i : {0, 1})
        if (t.values.shape[i] != t.keys.shape[i]) return false;
    if (!is_long_enough(t.values)) return false;
    if (t.q_weight.dimensions != 2 || !is_given(t.out_weight) || is_given(t.k_weight) != is_given(t.v_weight))
        return false;
    p.heads = t.q_weight.shape[0] / p.width;
    if (p.heads < 1 || p.heads % p.kv_heads != 0) return false;
    if (!view_of(t.keys, p.k) || !view_of(t.values, p.v)) return false;
    if (scaled != is_given(t.k_scale) || scaled != is_given(t.v_scale)) return false;
    for (const auto& [tensor, scales] : {std::pair(&t.k_scale, &p.k_scale), std::pair(&t.v_scale, &p.v_scale)})
        if (scaled && !(scales_of(*tensor, t.keys.shape[0], p.kv_heads, *scales) && is_long_enough(*tensor)))
            return false;
    const struct {
        const dlpack::Tensor &weight, &bias;
        int64_t in, out;
        Projection& projection;
    } projections[] = {{t.q_weight, t.q_bias, embed, p.heads * p.width, step.q_proj},
                       {t.k_weight, t.k_bias, embed, p.kv_heads * p.width, step.k_proj},
                       {t.v_weight, t.v_bias, embed, p.kv_heads * p.value_width, step.v_proj},
                       {t.gate_weight, t.gate_bias, embed, p.heads * p.value_width, step.gate_proj},
                       {t.out_weight, t.out_bias, p.heads * p.value_width, embed, step.out_proj}};
    void* x;
    int64_t x_row;
    if (!rows_of(t.x, p.dtype, x, x_row)) return false;
    for (const auto& [weight, bias, in, out, projection] : projections) {
        if (!is_given(weight)) continue;
        if (!projection_of(weight, bias, p.dtype, rows, in, out, projection)) return false;
        projection.x = x, projection.x_row = x_row;
    }
    if (t.out.dimensions != 3 || t.out.shape[0] != p.batch || t.out.shape[1] != p.lq || t.out.shape[2] != embed)
        return false;
    if (!rows_of(t.out, p.dtype, step.out_proj.out, step.out_proj.out_row)) return false;
    if (!vector_of(t.q_norm, p.dtype, p.width, step.q_norm) || !vector_of(t.k_norm, p.dtype, p.width, step.k_norm))
        return false;
    if (!set_rotation(t, step)) return false;
    Rotation& r = step.rotation;
    return integers_of(t.offsets, p.batch, p.offsets, p.offsets_batch) && positions_of(t.positions, p, r) &&
           keep_of(t.keep, p) && integers_of(t.lengths, p.batch, p.lengths, p.lengths_batch) &&
           integers_of(t.prefix_lengths, p.batch, p.prefix_lengths, p.prefix_lengths_batch) &&
           vector_of(t.alibi, Dtype::f32, p.heads, p.alibi) &&
           vector_of(t.sink_logits, Dtype::f32, p.heads, p.sink_logits);
}

// Whether the tokens of each batch go into slots there are, if they are appended.
bool has_slots(const LayerStep& step) {
    const Problem& p = step.attention;
    if (step.k_proj.out_features == 0) return true;
    for (int64_t batch = 0; batch < p.batch; ++batch) {
        const int64_t first = offset_of(p, batch);
        if (first < 0 || first > p.lk - p.lq) return false;
    }
    return true;
}

}  // namespace

bool read_step(const Interpreter& python, void* const* tensors, const void* numbers, LayerStep& step) {
    StepNumbers n;
    std::memcpy(&n, numbers, sizeof n);
    Tensors given;
    step = {};
    if (!given.look(python, tensors) || !make_step(given, n.key_count, step)) return false;
    Problem& p = step.attention;
    p.offset = n.offset, p.left = n.left, p.right = n.right;
    p.sink_tokens = n.sink_tokens, p.prefix_tokens = n.prefix_tokens;
    p.dilation = n.dilation, p.chunk = n.chunk, p.chunk_start = n.chunk_start;
    p.scale = n.scale, p.softcap = n.softcap, p.threads = n.threads;
    step.norm_gain = (Gain)n.norm_gain, step.norm_eps = n.norm_eps;
    Rotation& r = step.rotation;
    r.interleaved = n.interleaved, r.position_scale = n.position_scale, r.attention_factor = n.attention_factor;
    r.offset = n.position;
    return fits(p) && has_slots(step);
}

}  // namespace qkv

// Callers compare them with the tensors and numbers that they give.
QKV_EXPORT int qkv_layer_step_size() { return qkv::TENSORS; }
QKV_EXPORT int qkv_step_numbers_size() { return sizeof(qkv::StepNumbers); }

// A step of a layer (abi/layer_step.h) from Python tensors. The caller holds the GIL. `tensors` are TENSORS objects
// in the order of `Tensors`; all but x, q_weight, out_weight, keys, values and out may be None, and k_weight with
// v_weight for the keys of a context. `numbers` are StepNumbers. Returns as qkv_forward; or OTHER, and does nothing, if
// the tensors are of another kind or do not fit together.
QKV_EXPORT int qkv_layer_step(const void* interpreter, void* const* tensors, const void* numbers) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    qkv::LayerStep step;
    if (!qkv::read_step(python, tensors, numbers, step)) return qkv::OTHER;
    return python.unlocked([&] { return qkv::run_layer_step(step); });
}
