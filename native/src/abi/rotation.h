// The struct of a rotary embedding, which Python fills in.
#pragma once

#include "abi/problem.h"

namespace qkv {

// Rotates the first 2 * pairs channels of the heads of two tensors, q and k, which have their tokens in common. Pair n
// is channels 2 n and 2 n + 1 if interleaved, else n and n + pairs; its first channel x and its second y become
//     cos * x - sin * y  and  cos * y + sin * x,
// or, if inverse, what the transposed matrix makes of them: the gradient. In fp32, rounded once.
struct Rotation {
    Dtype dtype;      // of `from`
    Dtype out_dtype;  // of `to`: the same; or any, if dtype is f32
    int64_t batch, tokens, width, pairs;
    int64_t heads[2];     // of q and of k; 0 if there is none
    View from[2], to[2];  // may be the same memory
    int interleaved, inverse;
    int threads;

    // The angle of pair n of token i in batch b is position * position_scale * frequency, rounded twice to fp32, where
    // position is positions[axes[n]][b][i], or else offset + offsets[b] + i; both its cos and its sin are multiplied
    // by attention_factor. Strides count elements and are 0 where one number serves all.
    const int64_t* positions;  // (axes, batch, token), or null
    int64_t positions_axis, positions_batch, positions_token;
    int64_t axis_count;
    const int64_t* axes;  // (pairs), or null for the first axis
    int64_t offset;
    const int64_t* offsets;  // (batch), or null
    int64_t offsets_batch;
    const float* frequencies;  // (batch, token, pairs); null where cos and sin are given
    int64_t frequencies_batch, frequencies_token;
    float position_scale, attention_factor;

    // Or else cos and sin as they are, (batch, token, column). Of the first channel of pair n they are in column n, of
    // the second one in column n + second.
    Dtype table_dtype;
    const void *cos, *sin;
    int64_t cos_batch, cos_token, sin_batch, sin_token;
    int64_t second;
};

// Whether all pairs have an axis of the positions: only tensors need the check, since they may hold anything.
static inline bool fits(const Rotation& r) {
    for (int64_t n = 0; r.axes && n < r.pairs; ++n)
        if (r.axes[n] < 0 || r.axes[n] >= r.axis_count) return false;
    return true;
}

}  // namespace qkv
