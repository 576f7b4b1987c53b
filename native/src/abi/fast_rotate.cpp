// The fast path from Python tensors to a rotary embedding.
#include <initializer_list>

#include "abi/rotation_tensors.h"

namespace qkv {
namespace {

// The tensors of a call, in the order in which Python gives them.
struct Call {
    dlpack::Tensor x[2], out[2], positions, offsets, axes, frequencies, cos, sin;

    // False if one cannot be read.
    bool look(const Interpreter& python, void* const* objects) {
        for (dlpack::Tensor* tensor :
             {&x[0], &x[1], &out[0], &out[1], &positions, &offsets, &axes, &frequencies, &cos, &sin})
            if (!python.look(*objects++, *tensor)) return false;
        return true;
    }
};

bool set_angles(const Call& call, Rotation& r) {
    if (!is_vector(call.frequencies, dlpack::FLOAT, 32, 3)) return false;
    r.pairs = call.frequencies.shape[call.frequencies.dimensions - 1];
    r.frequencies = (const float*)data_of(call.frequencies);
    if (!columns_of(call.frequencies, r, r.pairs, r.frequencies_batch, r.frequencies_token)) return false;
    if (is_given(call.positions)) {
        const dlpack::Tensor& positions = call.positions;
        if (!is_vector(positions, dlpack::INT, 64, 3)) return false;
        r.positions = (const int64_t*)data_of(positions);
        r.axis_count = positions.dimensions == 3 ? positions.shape[0] : 1;
        if (!stride_of(positions, 1, r.tokens, r.positions_token)) return false;
        if (!stride_of(positions, 2, r.batch, r.positions_batch)) return false;
        stride_of(positions, 3, r.axis_count, r.positions_axis);
    }
    if (is_given(call.axes)) {
        if (!is_vector(call.axes, dlpack::INT, 64, 1) || call.axes.shape[0] != r.pairs) return false;
        if (!r.positions || (r.pairs > 1 && call.axes.strides[0] != 1)) return false;
        r.axes = (const int64_t*)data_of(call.axes);
    } else if (r.axis_count > 1) {
        return false;
    }
    if (is_given(call.offsets)) {
        if (!is_vector(call.offsets, dlpack::INT, 64, 1)) return false;
        r.offsets = (const int64_t*)data_of(call.offsets);
        return stride_of(call.offsets, 1, r.batch, r.offsets_batch);
    }
    return true;
}

// Fills in the rotation. False if the tensors do not fit together.
bool make_rotation(const Call& call, int64_t pairs, int64_t second, Rotation& r) {
    for (int i = 0; i < 2; ++i) {
        const dlpack::Tensor &x = call.x[i], &out = call.out[i];
        if (i == 1 && !is_given(x)) break;
        Dtype dtype, out_dtype;
        if (!holds_heads(x) || !holds_heads(out) || !dtype_of(x, dtype) || !dtype_of(out, out_dtype)) return false;
        if (dtype == Dtype::i8 || out_dtype != dtype) return false;
        for (int n = 0; n < 4; ++n)
            if (x.shape[n] != out.shape[n]) return false;
        if (i == 0) {
            r.dtype = r.out_dtype = dtype;
            r.batch = x.shape[0], r.tokens = x.shape[2], r.width = x.shape[3];
        } else if (dtype != r.dtype || x.shape[0] != r.batch || x.shape[2] != r.tokens || x.shape[3] != r.width) {
            return false;
        }
        r.heads[i] = x.shape[1];
        if (!view_of(x, r.from[i]) || !view_of(out, r.to[i])) return false;
    }
    if (!(is_given(call.cos) ? set_tables(call.cos, call.sin, pairs, second, r) : set_angles(call, r))) return false;
    return r.pairs >= 1 && 2 * r.pairs <= r.width && fits(r);
}

}  // namespace
}  // namespace qkv

// Rotates q and, unless it is None, k (batch, heads, token, width) into tensors of their shapes and dtype. Either
// `frequencies` is given, and perhaps positions (axes, batch, token), offsets (batch) and axes; or cos and sin (batch,
// token, column), with the number of pairs; leading dimensions may be missing or 1 (abi/rotation.h). The caller holds
// the GIL. Returns DONE; or OTHER, and does nothing, if the tensors are of another kind or do not fit together.
QKV_EXPORT int qkv_fast_rotate(const void* interpreter, void* q, void* k, void* q_out, void* k_out, void* positions,
                               void* offsets, void* axes, void* frequencies, void* cos, void* sin, int64_t offset,
                               float position_scale, float attention_factor, int64_t pairs, int64_t second,
                               int interleaved, int inverse, int threads) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    void* const objects[] = {q, k, q_out, k_out, positions, offsets, axes, frequencies, cos, sin};
    qkv::Call call;
    qkv::Rotation r = {};
    r.offset = offset, r.position_scale = position_scale, r.attention_factor = attention_factor;
    r.interleaved = interleaved, r.inverse = inverse, r.threads = threads;
    if (!call.look(python, objects) || !qkv::make_rotation(call, pairs, second, r)) return qkv::OTHER;
    return python.unlocked([&] { return qkv_rotate(&r); });
}
