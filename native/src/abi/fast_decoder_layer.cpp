// Calls of decoder layers with few tokens, one after another, from Python tensors.
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>

#include "abi/decoder_layer.h"
#include "abi/python_rows.h"
#include "abi/python_steps.h"

namespace {

// The numbers of a layer beside those of its step, as Python packs them.
struct BlockNumbers {
    int32_t activation, norm_gain;
    float norm_eps;
};

constexpr int BLOCK_TENSORS = 10;

// Fills in a layer, or returns false if its tensors cannot be read or do not fit together.
bool read_layer(const qkv::Interpreter& python, void* const* tensors, const char* numbers, qkv::DecoderLayer& layer) {
    qkv::LayerStep& step = layer.attention;
    if (!qkv::read_step(python, tensors, numbers, step)) return false;
    BlockNumbers n;
    std::memcpy(&n, numbers + qkv_step_numbers_size(), sizeof n);
    void* const* block = tensors + qkv_layer_step_size();
    const qkv::Projection& out = step.out_proj;
    for (qkv::RmsNorm* norm : {&layer.before_attention, &layer.after_attention, &layer.before_mlp, &layer.after_mlp}) {
        qkv::dlpack::Tensor gains;
        if (!python.look(*block++, gains) || !qkv::vector_of(gains, out.dtype, out.out_features, norm->gains))
            return false;
        norm->dtype = out.dtype, norm->width = out.out_features;
        norm->gain = (qkv::Gain)n.norm_gain, norm->eps = n.norm_eps;
    }
    void* const mlp[] = {tensors[0], block[0], block[1], block[2],
                         block[3],   block[4], block[5], tensors[qkv_layer_step_size() - 1]};
    if (!qkv::read_mlp(python, mlp, layer.mlp)) return false;
    layer.mlp.activation = (qkv::Activation)n.activation, layer.mlp.threads = step.attention.threads;
    return true;
}

}  // namespace

// Callers compare them with what they give for a layer beside its step.
QKV_EXPORT int qkv_block_size() { return BLOCK_TENSORS; }
QKV_EXPORT int qkv_block_numbers_size() { return sizeof(BlockNumbers); }

// Decoder layers (abi/decoder_layer.h), one after another, from Python tensors. The caller holds the GIL. For each
// layer, `tensors` has those of a step (abi/fast_layer_step.cpp), with x and out of the layer; the gains of the norms,
// in the order of DecoderLayer, None for no norm; and weight and bias of gate, up and down, as qkv_fast_gated_mlp takes
// them. `numbers` has StepNumbers, then BlockNumbers.
//
// Returns the number of first layers that are written: fewer than `count` if the tensors of the next one do not fit
// together or are not supported. -1 for lack of memory.
QKV_EXPORT int qkv_decoder_layers(const void* interpreter, int count, void* const* tensors, const char* numbers) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    const std::unique_ptr<qkv::DecoderLayer[]> layers(new (std::nothrow) qkv::DecoderLayer[count]());
    if (!layers) return -1;
    int read = 0;
    while (read < count && read_layer(python, tensors, numbers, layers[read])) {
        tensors += qkv_layer_step_size() + BLOCK_TENSORS;
        numbers += qkv_step_numbers_size() + sizeof(BlockNumbers);
        read++;
    }
    return python.unlocked([&] {
        for (int i = 0; i < read; i++)
            if (qkv::run_decoder_layer(layers[i]) != qkv::DONE) return -1;
        return read;
    });
}
