// Steps of layers and gated MLPs from Python tensors, for the calls that take them.
#pragma once

#include "abi/c_api.h"
#include "abi/gated_mlp.h"
#include "abi/layer_step.h"
#include "abi/python_tensor.h"

QKV_EXPORT int qkv_layer_step_size();
QKV_EXPORT int qkv_step_numbers_size();

namespace qkv {

// Fills in a step of `qkv_layer_step_size()` tensors and StepNumbers, or returns false if the tensors cannot be read or
// do not fit together (abi/fast_layer_step.cpp).
bool read_step(const Interpreter& python, void* const* tensors, const void* numbers, LayerStep& step);

// Fills in a gated MLP but for its numbers, or returns false: x, weight and bias of gate, up and down, out
// (abi/fast_gated_mlp.cpp).
bool read_mlp(const Interpreter& python, void* const* tensors, GatedMlp& mlp);

}  // namespace qkv
