// A decoder layer with few tokens, from its input to its output.
#pragma once

#include "abi/gated_mlp.h"
#include "abi/layer_step.h"

namespace qkv {

// out = y + after_mlp(mlp(before_mlp(y))), where y = x + after_attention(attention(before_attention(x))). Norms and
// sums are rounded to the dtype of x.
struct DecoderLayer {
    LayerStep attention;  // x and out are those of the layer; they share no memory
    GatedMlp mlp;         // its x and out are the kernel's own
    RmsNorm before_attention, after_attention, before_mlp, after_mlp;  // of single rows; without gains, there is none
};

// Returns a Status: DONE or OUT_OF_MEMORY.
int run_decoder_layer(const DecoderLayer& layer);

}  // namespace qkv
