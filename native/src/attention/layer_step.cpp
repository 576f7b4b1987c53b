// A layer's call with few tokens: projections, norms, rotation, append, attention and output projection, one after the
// other on the same threads.
#include "abi/layer_step.h"

#include <algorithm>

#include "attention/quantize.h"
#include "mask/query_tile.h"
#include "matmul/few_rows.h"
#include "rowwise/activation.h"
#include "rowwise/rms_norm.h"
#include "rowwise/rotate.h"
#include "runtime/parallel.h"
#include "sizes.h"

namespace qkv {
namespace QKV_ISA {

void forward(const Problem&);

namespace {

// What lies between the parts of a step, in the dtype of x: (token, head, column).
struct StepScratch {
    float *q, *k, *v, *gates, *outputs;

    StepScratch(const Problem& p, ArenaLayout& layout) {
        const int64_t tokens = p.batch * p.lq;
        q = layout(tokens * p.heads * p.width);
        k = layout(tokens * p.kv_heads * p.width);
        v = layout(tokens * p.kv_heads * p.value_width);
        gates = layout(tokens * p.heads * p.value_width);
        outputs = layout(tokens * p.heads * p.value_width);
    }
};

// x = x * sigmoid(gates), rounded after each.
void apply_gates(Dtype dtype, char* x, char* gates, int64_t width) {
    const int64_t item = size_of(dtype);
    for_columns(width, [&](int64_t d, int64_t count) {
        char *const gate = gates + d * item, *const part = x + d * item;
        store_part(dtype, gate, 1.0f / (1.0f + exp(-load_part(dtype, gate, count))), count);
        store_part(dtype, part, load_part(dtype, part, count) * load_part(dtype, gate, count), count);
    });
}

// Writes zeros to the slots after the tokens of a batch that are new to all: before this call, they are uninitialised.
void clear_slots(const Problem& p, const View& view, const Scales& scales, int64_t width, int64_t batch, int64_t head) {
    for (int64_t slot = std::max(offset_of(p, batch) + p.lq, p.lk - p.lq); slot < p.lk; ++slot) {
        std::memset(row_of(p.kv_dtype, view, batch, head, slot), 0, width * size_of(p.kv_dtype));
        if (scales.data) *scales.at(batch, head, slot) = 0;
    }
}

// Writes keys or values of a token to its slot in the cache.
void append(const Problem& p, const View& from, const View& to, const Scales& scales, int64_t width, int64_t batch,
            int64_t i) {
    const int64_t slot = offset_of(p, batch) + i;
    const Place place = place_of(p, batch, slot);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
        const char* const row = row_of(p.dtype, from, batch, head, i);
        char* const there = row_of(p.kv_dtype, to, place.batch, head, place.row);
        if (scales.data)
            *scales.at(place.batch, head, place.row) = quantize_row(p.dtype, row, width, (int8_t*)there);
        else
            std::memcpy(there, row, width * size_of(p.dtype));
        if (i == p.lq - 1 && !p.pages.table) clear_slots(p, to, scales, width, batch, head);
    }
}

// The heads of tokens, from their projections to where attention reads them.
struct Heads {
    const LayerStep& step;
    View k, v;  // projected

    void prepare(int64_t token) const {
        const Problem& p = step.attention;
        const int64_t batch = token / p.lq, i = token % p.lq;
        if (step.q_norm) normalise(p.q, p.heads, step.q_norm, batch, i);
        if (step.k_norm) normalise(k, p.kv_heads, step.k_norm, batch, i);
        if (step.rotation.pairs > 0) rotate_tokens(step.rotation, batch, i, i + 1);
        if (step.k_proj.out_features == 0) return;
        append(p, k, p.k, p.k_scale, p.width, batch, i);
        append(p, v, p.v, p.v_scale, p.value_width, batch, i);
    }

   private:
    void normalise(const View& x, int64_t heads, const void* gains, int64_t batch, int64_t i) const {
        RmsNorm norm = {};
        norm.dtype = step.attention.dtype, norm.gain = step.norm_gain, norm.width = step.attention.width;
        norm.gains = gains, norm.eps = step.norm_eps;
        for (int64_t head = 0; head < heads; ++head) {
            char* const row = row_of(norm.dtype, x, batch, head, i);
            rms_norm_row(norm, row, row);
        }
    }
};

// Heads of tokens that lie next to each other.
View heads_of(const Problem& p, void* data, int64_t heads, int64_t width) {
    return {data, p.lq * heads * width, width, heads * width};
}

}  // namespace

void layer_step(const LayerStep& given) {
    LayerStep step = given;
    Problem& p = step.attention;
    const StepScratch scratch = thread_scratch<StepScratch>(p);
    Projection projections[MOST_PRODUCTS];
    int count = 0;
    const auto add = [&](const Projection& projection, float* out) {
        if (projection.out_features == 0) return;
        projections[count] = projection;
        projections[count].out = out, projections[count++].out_row = projection.out_features;
    };
    add(step.q_proj, scratch.q), add(step.k_proj, scratch.k), add(step.v_proj, scratch.v);
    add(step.gate_proj, scratch.gates);
    project(projections, count, p.threads);

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
    parallel_for(tokens, threads, [&](int64_t token) { heads.prepare(token); }, Sharing::blocks);

    forward(p);
    step.out_proj.x = scratch.outputs;
    step.out_proj.x_row = p.heads * p.value_width;
    if (step.gate_proj.out_features > 0)
        apply_gates(p.dtype, (char*)scratch.outputs, (char*)scratch.gates, tokens * p.heads * p.value_width);
    project(&step.out_proj, 1, p.threads);
}

}  // namespace QKV_ISA
}  // namespace qkv
