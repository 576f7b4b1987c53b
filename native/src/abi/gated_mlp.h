// A gated MLP of few rows, as Python fills it in.
#pragma once

#include "abi/projection.h"

namespace qkv {

// In the order of `ACTIVATIONS` in src/qkv/kernels/gated_mlp.py.
enum class Activation : int32_t { silu, gelu, gelu_tanh, relu };

// out = down(activation(gate(x)) * up(x)); what lies between the parts is rounded to the dtype of x.
struct GatedMlp {
    Projection gate, up;  // of the same x; `out` is the kernel's own
    Projection down;      // its x is the kernel's own
    Activation activation;
    int threads;
};

}  // namespace qkv
