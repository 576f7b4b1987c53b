// A decoder layer's call with few tokens: attention and a gated MLP with their norms and residuals, one after the other
// on the same threads.
#include "abi/decoder_layer.h"

#include "mask/query_tile.h"
#include "rowwise/rms_norm.h"
#include "runtime/parallel.h"
#include "sizes.h"

namespace qkv {
namespace QKV_ISA {

void layer_step(const LayerStep&);
void gated_mlp(const GatedMlp&);

namespace {

// Rows of tokens in the dtype of x: normalised, then what the MLP adds to the residual.
struct LayerScratch {
    float* rows;

    LayerScratch(const DecoderLayer& layer, ArenaLayout& arena) {
        rows = arena(layer.attention.out_proj.rows * layer.attention.out_proj.out_features);
    }
};

// y = x + y
void add(Dtype dtype, const char* x, char* y, int64_t width) {
    const int64_t item = size_of(dtype);
    for_columns(width, [&](int64_t d, int64_t count) {
        const vec sum = load_part(dtype, x + d * item, count) + load_part(dtype, y + d * item, count);
        store_part(dtype, y + d * item, sum, count);
    });
}

}  // namespace

void decoder_layer(const DecoderLayer& given) {
    DecoderLayer layer = given;
    LayerStep& step = layer.attention;
    GatedMlp& mlp = layer.mlp;
    const Projection& last = step.out_proj;
    const Dtype dtype = last.dtype;
    const int64_t width = last.out_features, item = size_of(dtype);
    const char* const x = (const char*)step.q_proj.x;
    char *const out = (char*)last.out, *const rows = (char*)thread_scratch<LayerScratch>(layer).rows;
    const int64_t x_row = step.q_proj.x_row * item, out_row = last.out_row * item, row = width * item;
    const int threads = last.rows * width >= PARALLEL_STEP ? step.attention.threads : 1;
    const auto for_tokens = [&](auto work) { parallel_for(last.rows, threads, work, Sharing::blocks); };

    if (layer.before_attention.gains) {
        for_tokens([&](int64_t t) { rms_norm_row(layer.before_attention, x + t * x_row, rows + t * row); });
        for (Projection* read : {&step.q_proj, &step.k_proj, &step.v_proj, &step.gate_proj})
            read->x = rows, read->x_row = width;
    }
    layer_step(step);
    for_tokens([&](int64_t t) {
        char* const y = out + t * out_row;
        if (layer.after_attention.gains) rms_norm_row(layer.after_attention, y, y);
        add(dtype, x + t * x_row, y, width);
        if (layer.before_mlp.gains) rms_norm_row(layer.before_mlp, y, rows + t * row);
    });

    mlp.gate.x = mlp.up.x = layer.before_mlp.gains ? rows : out;
    mlp.gate.x_row = mlp.up.x_row = layer.before_mlp.gains ? width : last.out_row;
    mlp.down.out = rows, mlp.down.out_row = width;
    gated_mlp(mlp);
    for_tokens([&](int64_t t) {
        if (layer.after_mlp.gains) rms_norm_row(layer.after_mlp, rows + t * row, rows + t * row);
        add(dtype, rows + t * row, out + t * out_row, width);
    });
}

}  // namespace QKV_ISA
}  // namespace qkv
