// The library's interface: C, so that any Python can load it.
#pragma once

#include "abi/problem.h"
#include "abi/rotation.h"

#if defined(_WIN32)
#define QKV_EXPORT extern "C" __declspec(dllexport)
#else
#define QKV_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace qkv {

enum Status { DONE = 0, OUT_OF_MEMORY = 1, OTHER = 2 };

}  // namespace qkv

// The compiler that built the library, and its version.
QKV_EXPORT const char* qkv_compiler();

// Both return a Status: DONE; OUT_OF_MEMORY, and then results are written in part or not at all; or OTHER, and then
// nothing was done, where `offsets` do not fit (abi/problem.h).
QKV_EXPORT int qkv_forward(const void* problem);
QKV_EXPORT int qkv_backward(const void* problem, const void* gradients);
QKV_EXPORT void qkv_quantize(const void* quantization);

// Products of few rows (abi/projection.h). Returns a Status: OTHER, and does nothing, for numbers of rows or products
// that the kernel does not take.
QKV_EXPORT int qkv_project(const void* projections, int count, int threads);
// A gated MLP of few rows (abi/gated_mlp.h). Returns as qkv_project.
QKV_EXPORT int qkv_gated_mlp(const void* mlp);
QKV_EXPORT void qkv_rms_norm(const void* norm);  // abi/rms_norm.h
// Returns DONE; or OTHER, and then nothing was done, where `axes` do not fit (abi/rotation.h).
QKV_EXPORT int qkv_rotate(const void* rotation);
