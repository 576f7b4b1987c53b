// A call of an attention layer with few tokens, from its input to its output.
#pragma once

#include "abi/problem.h"
#include "abi/projection.h"
#include "abi/rotation.h"

namespace qkv {

// out = (attention of the heads of x @ q_proj.mT over the cached keys and those of x) @ out_proj.mT. The tokens of x
// are appended: `attention` has the memory of keys and values, these included, and its offsets are their first slots.
struct LayerStep {
    Projection q_proj, k_proj, v_proj;  // of the same x; `out` is the kernel's own
    Projection out_proj;                // its x is the kernel's own
    const void *q_norm, *k_norm;        // (width), gains, or null
    Dtype norm_dtype;                   // of both gains
    float norm_eps;
    Rotation rotation;  // without pairs, there is none; what it rotates is the kernel's own
    Problem attention;  // its q and out are the kernel's own
};

// Returns a Status: DONE or OUT_OF_MEMORY.
int run_layer_step(const LayerStep& step);

}  // namespace qkv
