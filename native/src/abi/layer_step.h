// A call of an attention layer with few tokens, from its input to its output.
#pragma once

#include "abi/problem.h"
#include "abi/projection.h"
#include "abi/rms_norm.h"
#include "abi/rotation.h"

namespace qkv {

// out = (attention of the heads of x @ q_proj.mT over the cached keys and those of x) @ out_proj.mT. The tokens of x
// are appended: `attention` has the memory of keys and values, these included, and its offsets are their first slots.
// Without features, k_proj and v_proj append nothing: the keys are those of a context.
struct LayerStep {
    Projection q_proj, k_proj, v_proj;  // of the same x; `out` is the kernel's own
    Projection gate_proj;               // likewise: heads are multiplied by its sigmoid; without features, by nothing
    Projection out_proj;                // its x is the kernel's own
    const void *q_norm, *k_norm;        // (width), gains, or null
    Gain norm_gain;                     // what both gains do
    float norm_eps;
    Rotation rotation;  // without pairs, there is none; what it rotates is the kernel's own
    Problem attention;  // its q and out are the kernel's own
};

// The numbers of a step. As STEP_NUMBERS of src/qkv/kernels/structs.py.
struct StepNumbers {
    int64_t key_count;  // of keys in pages or before spare slots
    int64_t offset, position, left, right, sink_tokens, prefix_tokens, dilation, chunk, chunk_start;
    int32_t interleaved;
    float position_scale, attention_factor;
    int32_t norm_gain;
    float norm_eps, scale, softcap;
    int32_t threads;
};

// Returns a Status: DONE or OUT_OF_MEMORY.
int run_layer_step(const LayerStep& step);

}  // namespace qkv
