// The calls that take Python tensors, each explained where it is defined. abi/python_calls.cpp makes them functions of
// Python, which are called several times faster than through ctypes.
#pragma once

#include "abi/c_api.h"

QKV_EXPORT int qkv_fast_forward(const void* interpreter, void* q, void* k, void* v, void* out, void* k_scale,
                                void* v_scale, void* table, void* offsets, void* keep, void* lengths, int64_t key_count,
                                int64_t offset, int64_t left, int64_t right, int64_t sink_tokens, float scale,
                                int threads);
QKV_EXPORT int qkv_fast_project(const void* interpreter, void* x, void* weight, void* bias, void* out, int threads);
QKV_EXPORT int qkv_fast_gated_mlp(const void* interpreter, void* x, void* gate_weight, void* gate_bias, void* up_weight,
                                  void* up_bias, void* down_weight, void* down_bias, void* out, int activation,
                                  int threads);
QKV_EXPORT int qkv_fast_rms_norm(const void* interpreter, void* x, void* gains, void* out, float eps, int gain,
                                 int threads);
QKV_EXPORT int qkv_append(const void* interpreter, void* k, void* v, void* keys, void* values, void* k_scale,
                          void* v_scale, int64_t start, int threads);
QKV_EXPORT int qkv_append_pages(const void* interpreter, void* k, void* v, void* keys, void* values, void* k_scale,
                                void* v_scale, void* table, void* starts, int64_t start, int threads);
QKV_EXPORT int qkv_fast_rotate(const void* interpreter, void* q, void* k, void* q_out, void* k_out, void* positions,
                               void* offsets, void* axes, void* frequencies, void* cos, void* sin, int64_t offset,
                               float position_scale, float attention_factor, int64_t pairs, int64_t second,
                               int interleaved, int inverse, int threads);
QKV_EXPORT int qkv_layer_step_size();
QKV_EXPORT int qkv_layer_step(const void* interpreter, void* const* tensors, const void* numbers);
QKV_EXPORT int qkv_block_size();
QKV_EXPORT int qkv_decoder_layers(const void* interpreter, int count, void* const* tensors, const char* numbers);
