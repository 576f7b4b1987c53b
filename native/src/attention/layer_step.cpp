// A layer's call with few tokens: projections, norms, rotation, append, attention and output projection, one after the
// other on the same threads.
#include "abi/layer_step.h"

#include <algorithm>
#include <cmath>

#include "attention/quantize.h"
#include "matmul/few_rows.h"
#include "rotary/rotate.h"
#include "runtime/parallel.h"
#include "sizes.h"

namespace qkv {
namespace QKV_ISA {

void forward(const Problem&);

namespace {

// What lies between the parts of a step, in the dtype of x: (token, head, column).
struct StepScratch {
    float *q, *k, *v, *outputs;

    StepScratch(const Problem& p, ArenaLayout& layout) {
        const int64_t tokens = p.batch * p.lq;
        q = layout(tokens * p.heads * p.width);
        k = layout(tokens * p.kv_heads * p.width);
        v = layout(tokens * p.kv_heads * p.value_width);
        outputs = layout(tokens * p.heads * p.value_width);
    }
};

// x = x / sqrt(mean(x^2) + eps) * gains
void normalise(Dtype dtype, char* x, int64_t width, Dtype gain_dtype, const void* gains, float eps) {
    const int64_t item = size_of(dtype), gain_item = size_of(gain_dtype);
    vec squares = {};
    for_columns(width, [&](int64_t d, int64_t count) {
        const vec part = load_part(dtype, x + d * item, count);
        squares += part * part;
    });
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += squares[i];
    const float factor = 1.0f / std::sqrt(sum / (float)width + eps);
    for_columns(width, [&](int64_t d, int64_t count) {
        const vec gain = load_part(gain_dtype, (const char*)gains + d * gain_item, count);
        store_part(dtype, x + d * item, load_part(dtype, x + d * item, count) * factor * gain, count);
    });
}

// Writes zeros to the slots after the tokens of a batch that are new to all: before this call, they are uninitialised.
void clear_slots(const Problem& p, const View& view, const Scales& scales, int64_t width, int64_t batch, int64_t head) {
    for (int64_t slot = std::max(offset_of(p, batch) + p.lq, p.lk - p.lq); slot < p.lk; ++slot) {
        std::memset(row_of(p.kv_dtype, view, batch, head, slot), 0, width * size_of(p.kv_dtype));
        if (scales.data) scales.data[batch * scales.batch + head * scales.head + slot] = 0;
    }
}

// Writes keys or values of a token to its slot in the cache.
void append(const Problem& p, const View& from, const View& to, const Scales& scales, int64_t width, int64_t batch,
            int64_t i) {
    const int64_t slot = offset_of(p, batch) + i;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
        const char* const row = row_of(p.dtype, from, batch, head, i);
        char* const there = row_of(p.kv_dtype, to, batch, head, slot);
        if (scales.data)
            scales.data[batch * scales.batch + head * scales.head + slot] =
                quantize_row(p.dtype, row, width, (int8_t*)there);
        else
            std::memcpy(there, row, width * size_of(p.dtype));
        if (i == p.lq - 1) clear_slots(p, to, scales, width, batch, head);
    }
}

// The heads of tokens, from their projections to where attention reads them.
struct Heads {
    const LayerStep& step;
    View k, v;  // projected

    void prepare(int64_t token) const {
        const Problem& p = step.attention;
        const int64_t batch = token / p.lq, i = token % p.lq;
        for (int64_t head = 0; step.q_norm && head < p.heads; ++head)
            normalise(p.dtype, row_of(p.dtype, p.q, batch, head, i), p.width, step.norm_dtype, step.q_norm,
                      step.norm_eps);
        for (int64_t head = 0; step.k_norm && head < p.kv_heads; ++head)
            normalise(p.dtype, row_of(p.dtype, k, batch, head, i), p.width, step.norm_dtype, step.k_norm,
                      step.norm_eps);
        if (step.rotation.pairs > 0) rotate_tokens(step.rotation, batch, i, i + 1);
        append(p, k, p.k, p.k_scale, p.width, batch, i);
        append(p, v, p.v, p.v_scale, p.value_width, batch, i);
    }
};

// Heads of tokens that lie next to each other.
View heads_of(const Problem& p, void* data, int64_t heads, int64_t width) {
    return {data, p.lq * heads * width, width, heads * width};
}

void set_out(Projection& projection, void* out) {
    projection.out = out;
    projection.out_row = projection.out_features;
}

}  // namespace

void layer_step(const LayerStep& given) {
    LayerStep step = given;
    Problem& p = step.attention;
    const StepScratch scratch = thread_scratch<StepScratch>(p);
    set_out(step.q_proj, scratch.q), set_out(step.k_proj, scratch.k), set_out(step.v_proj, scratch.v);
    const Projection projections[] = {step.q_proj, step.k_proj, step.v_proj};
    project(projections, 3, p.threads);

    p.q = heads_of(p, scratch.q, p.heads, p.width);
    p.out = heads_of(p, scratch.outputs, p.heads, p.value_width);
    const Heads heads{step, heads_of(p, scratch.k, p.kv_heads, p.width),
                      heads_of(p, scratch.v, p.kv_heads, p.value_width)};
    Rotation& r = step.rotation;
    r.dtype = r.out_dtype = p.dtype;
    r.batch = p.batch, r.tokens = p.lq, r.width = p.width, r.threads = 1;
    r.heads[0] = p.heads, r.heads[1] = p.kv_heads;
    r.from[0] = r.to[0] = p.q, r.from[1] = r.to[1] = heads.k;
    const int64_t tokens = p.batch * p.lq;
    const int threads = tokens * p.heads * p.width >= PARALLEL_STEP ? p.threads : 1;
    parallel_for(tokens, threads, [&](int64_t token) { heads.prepare(token); }, Sharing::runs);

    forward(p);
    step.out_proj.x = scratch.outputs;
    step.out_proj.x_row = p.heads * p.value_width;
    project(&step.out_proj, 1, p.threads);
}

}  // namespace QKV_ISA
}  // namespace qkv
