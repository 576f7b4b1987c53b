// A decoder layer's call with few tokens, from Python tensors.
#include <initializer_list>

#include "abi/decoder_layer.h"
#include "abi/python_rows.h"
#include "abi/python_steps.h"

// A decoder layer (abi/decoder_layer.h) from Python tensors. The caller holds the GIL. `tensors` and `numbers` are
// those of a step (abi/fast_layer_step.cpp), with x and out of the layer. `block` has the gains of the norms, in the
// order of DecoderLayer, None for no norm; then weight and bias of gate, up and down, as qkv_fast_gated_mlp takes them.
// Returns as qkv_layer_step.
QKV_EXPORT int qkv_decoder_layer(const void* interpreter, void* const* tensors, const void* numbers, void* const* block,
                                 int activation, int norm_gain, float norm_eps) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    qkv::DecoderLayer layer = {};
    qkv::LayerStep& step = layer.attention;
    if (!qkv::read_step(python, tensors, numbers, step)) return qkv::OTHER;
    const qkv::Projection& out = step.out_proj;
    for (qkv::RmsNorm* norm : {&layer.before_attention, &layer.after_attention, &layer.before_mlp, &layer.after_mlp}) {
        qkv::dlpack::Tensor gains;
        if (!python.look(*block++, gains) || !qkv::vector_of(gains, out.dtype, out.out_features, norm->gains))
            return qkv::OTHER;
        norm->dtype = out.dtype, norm->width = out.out_features;
        norm->gain = (qkv::Gain)norm_gain, norm->eps = norm_eps;
    }
    void* const mlp[] = {tensors[0], block[0], block[1], block[2],
                         block[3],   block[4], block[5], tensors[qkv_layer_step_size() - 1]};
    if (!qkv::read_mlp(python, mlp, layer.mlp)) return qkv::OTHER;
    layer.mlp.activation = (qkv::Activation)activation, layer.mlp.threads = step.attention.threads;
    return python.unlocked([&] { return qkv::run_decoder_layer(layer); });
}
