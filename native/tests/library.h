// The library's interface, as a program that links it declares it.
#pragma once

#include "abi/sequences.h"

extern "C" {
const char* qkv_isa();
int qkv_problem_size();
int qkv_gradients_size();
int qkv_quantization_size();
int qkv_sequences_size();
int qkv_forward(const void* problem);
int qkv_backward(const void* problem, const void* gradients);
int64_t qkv_count_scores(const void* problem);
void qkv_quantize(const void* quantization);
int qkv_forward_sequences(const void* problem, const void* sequences);
int qkv_backward_sequences(const void* problem, const void* sequences, const void* gradients);
}
