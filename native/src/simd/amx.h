// AMX, which extends avx512bf16 by eight tile registers, each of 16 rows of 64 bytes.
//
// In assembler: before version 14, GCC's intrinsics do not say that memory is read and written.
#pragma once

#include "simd/avx512bf16.h"

namespace qkv {
namespace QKV_ISA {

// While it lives, the thread may use the tile registers. Calls clobber them, as they do vector registers.
struct TileRegisters {
    TileRegisters() {
        constexpr int COUNT = 8;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < COUNT; ++i) {
            shape.bytes[i] = 64;
            shape.rows[i] = 16;
        }
        __asm__ volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~TileRegisters() { __asm__ volatile("tilerelease"); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

// Rows lie `stride` bytes apart.
template <int T>
static inline void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
static inline void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

template <int T>
static inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}

// C[m][n] += A[m][2 k] B[k][2 n] + A[m][2 k + 1] B[k][2 n + 1], summed over k: fp32 from pairs of bf16.
template <int C, int A, int B>
static inline void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace QKV_ISA
}  // namespace qkv
