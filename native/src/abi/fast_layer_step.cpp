// A layer's call with few tokens, from Python tensors.
#include <initializer_list>

#include "abi/layer_step.h"
#include "abi/rotation_tensors.h"

namespace qkv {
namespace {

// The tensors of a call, in the order in which Python gives them.
struct Tensors {
    dlpack::Tensor x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias, q_norm, k_norm,
        frequencies, cos, sin, keys, values, k_scale, v_scale, offsets, positions, lengths, alibi, sink_logits, out;

    // False if one cannot be read.
    bool look(const Interpreter& python, void* const* objects) {
        for (dlpack::Tensor* tensor :
             {&x,        &q_weight, &q_bias,  &k_weight,    &k_bias,  &v_weight, &v_bias,      &out_weight,
              &out_bias, &q_norm,   &k_norm,  &frequencies, &cos,     &sin,      &keys,        &values,
              &k_scale,  &v_scale,  &offsets, &positions,   &lengths, &alibi,    &sink_logits, &out})
            if (!python.look(*objects++, *tensor)) return false;
        return true;
    }
};

constexpr int TENSORS = sizeof(Tensors) / sizeof(dlpack::Tensor);

bool is_of(const dlpack::Tensor& tensor, Dtype dtype, int dimensions) {
    Dtype found;
    return tensor.device == dlpack::CPU && tensor.dimensions == dimensions && tensor.data && dtype_of(tensor, found) &&
           found == dtype;
}

// Fills in a vector of `count` numbers, or null for None. False if the tensor is another one.
template <class Number>
bool vector_of(const dlpack::Tensor& tensor, Dtype dtype, int64_t count, const Number*& data) {
    data = nullptr;
    if (!is_given(tensor)) return true;
    if (!is_of(tensor, dtype, 1) || tensor.shape[0] != count || (count > 1 && tensor.strides[0] != 1)) return false;
    data = (const Number*)data_of(tensor);
    return true;
}

// Integers, one for each batch, or null for None.
bool integers_of(const dlpack::Tensor& tensor, int64_t batch, const int64_t*& data) {
    data = nullptr;
    if (!is_given(tensor)) return true;
    if (!is(tensor, dlpack::INT, 64, 1) || tensor.shape[0] != batch || (batch > 1 && tensor.strides[0] != 1))
        return false;
    data = (const int64_t*)data_of(tensor);
    return true;
}

bool projection_of(const dlpack::Tensor& weight, const dlpack::Tensor& bias, Dtype dtype, int64_t rows,
                   int64_t in_features, int64_t out_features, Projection& projection) {
    if (!is_of(weight, dtype, 2) || weight.shape[0] != out_features || weight.shape[1] != in_features) return false;
    if (weight.strides[1] != 1) return false;
    projection = {};
    projection.dtype = projection.out_dtype = dtype;
    projection.rows = rows, projection.in_features = in_features, projection.out_features = out_features;
    projection.weight = data_of(weight), projection.weight_row = weight.strides[0];
    return vector_of(bias, dtype, out_features, projection.bias);
}

// Fills in a tensor (batch, token, column) as the rows of one matrix. False if its strides do not allow that.
bool rows_of(const dlpack::Tensor& tensor, Dtype dtype, void*& data, int64_t& row) {
    if (!is_of(tensor, dtype, 3) || tensor.strides[2] != 1) return false;
    const int64_t batch = tensor.shape[0], tokens = tensor.shape[1];
    row = tokens > 1 ? tensor.strides[1] : tensor.strides[0];
    data = data_of(tensor);
    return batch == 1 || tokens == 1 || tensor.strides[0] == tokens * row;
}

// Gains in one dtype, that of x or fp32.
bool set_norms(const Tensors& t, LayerStep& step) {
    const dlpack::Tensor& given = is_given(t.q_norm) ? t.q_norm : t.k_norm;
    const int64_t width = step.attention.width;
    step.norm_dtype = step.attention.dtype;
    if (is_given(given) && is(given, dlpack::FLOAT, 32, 1)) step.norm_dtype = Dtype::f32;
    return vector_of(t.q_norm, step.norm_dtype, width, step.q_norm) &&
           vector_of(t.k_norm, step.norm_dtype, width, step.k_norm);
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
bool make_step(const Tensors& t, LayerStep& step) {
    Problem& p = step.attention;
    if (t.x.dimensions != 3 || !dtype_of(t.x, p.dtype) || p.dtype == Dtype::i8) return false;
    if (!holds_heads(t.keys) || !holds_heads(t.values) || !dtype_of(t.keys, p.kv_dtype)) return false;
    Dtype of_values;
    const bool scaled = p.kv_dtype == Dtype::i8;
    if (!dtype_of(t.values, of_values) || of_values != p.kv_dtype || (!scaled && p.kv_dtype != p.dtype)) return false;
    p.batch = t.x.shape[0], p.lq = t.x.shape[1];
    p.kv_heads = t.keys.shape[1], p.lk = t.keys.shape[2], p.width = t.keys.shape[3], p.value_width = t.values.shape[3];
    const int64_t rows = p.batch * p.lq, embed = t.x.shape[2];
    if (rows < 1 || embed < 1 || p.lk < p.lq || t.keys.shape[0] != p.batch || t.values.shape[0] != p.batch)
        return false;
    if (t.values.shape[1] != p.kv_heads || t.values.shape[2] != p.lk || t.q_weight.dimensions != 2) return false;
    p.heads = t.q_weight.shape[0] / p.width;
    if (p.heads < 1 || p.heads % p.kv_heads != 0) return false;
    if (!view_of(t.keys, p.k) || !view_of(t.values, p.v)) return false;
    if (scaled != is_given(t.k_scale) || scaled != is_given(t.v_scale)) return false;
    if (scaled && !(scales_of(t.k_scale, p.batch, p.kv_heads, p.k_scale) && t.k_scale.shape[2] == p.lk &&
                    scales_of(t.v_scale, p.batch, p.kv_heads, p.v_scale) && t.v_scale.shape[2] == p.lk))
        return false;
    const struct {
        const dlpack::Tensor &weight, &bias;
        int64_t in, out;
        Projection& projection;
    } projections[] = {{t.q_weight, t.q_bias, embed, p.heads * p.width, step.q_proj},
                       {t.k_weight, t.k_bias, embed, p.kv_heads * p.width, step.k_proj},
                       {t.v_weight, t.v_bias, embed, p.kv_heads * p.value_width, step.v_proj},
                       {t.out_weight, t.out_bias, p.heads * p.value_width, embed, step.out_proj}};
    void* x;
    int64_t x_row;
    if (!rows_of(t.x, p.dtype, x, x_row)) return false;
    for (const auto& [weight, bias, in, out, projection] : projections) {
        if (!projection_of(weight, bias, p.dtype, rows, in, out, projection)) return false;
        projection.x = x, projection.x_row = x_row;
    }
    if (t.out.dimensions != 3 || t.out.shape[0] != p.batch || t.out.shape[1] != p.lq || t.out.shape[2] != embed)
        return false;
    if (!rows_of(t.out, p.dtype, step.out_proj.out, step.out_proj.out_row)) return false;
    if (!set_norms(t, step) || !set_rotation(t, step)) return false;
    Rotation& r = step.rotation;
    p.offsets_batch = p.lengths_batch = r.offsets_batch = 1;
    return integers_of(t.offsets, p.batch, p.offsets) && integers_of(t.positions, p.batch, r.offsets) &&
           integers_of(t.lengths, p.batch, p.lengths) && vector_of(t.alibi, Dtype::f32, p.heads, p.alibi) &&
           vector_of(t.sink_logits, Dtype::f32, p.heads, p.sink_logits);
}

// Whether the tokens of each batch go into slots there are.
bool has_slots(const Problem& p) {
    for (int64_t batch = 0; batch < p.batch; ++batch) {
        const int64_t first = offset_of(p, batch);
        if (first < 0 || first > p.lk - p.lq) return false;
    }
    return true;
}

}  // namespace
}  // namespace qkv

// Callers compare it with the number of tensors that they give.
QKV_EXPORT int qkv_layer_step_size() { return qkv::TENSORS; }

// A step of a layer (abi/layer_step.h) from Python tensors. The caller holds the GIL. `tensors` are TENSORS objects
// in the order of `Tensors`; biases and those after out_bias may be None, apart from keys, values and out. Returns as
// qkv_forward; or OTHER, and does nothing, if the tensors are of another kind or do not fit together.
QKV_EXPORT int qkv_layer_step(const void* interpreter, void* const* tensors, int64_t offset, int64_t position,
                              int64_t left, int64_t right, int64_t sink_tokens, int interleaved, float position_scale,
                              float attention_factor, float norm_eps, float scale, float softcap, int threads) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    qkv::Tensors given;
    qkv::LayerStep step = {};
    if (!given.look(python, tensors) || !qkv::make_step(given, step)) return qkv::OTHER;
    qkv::Problem& p = step.attention;
    p.offset = offset, p.left = left, p.right = right, p.sink_tokens = sink_tokens;
    p.scale = scale, p.softcap = softcap, p.threads = threads;
    step.norm_eps = norm_eps;
    step.rotation.interleaved = interleaved;
    step.rotation.position_scale = position_scale, step.rotation.attention_factor = attention_factor;
    step.rotation.offset = position;
    if (!qkv::fits(p) || !qkv::has_slots(p)) return qkv::OTHER;
    return python.unlocked([&] { return qkv::run_layer_step(step); });
}
