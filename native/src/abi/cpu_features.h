// What an x86-64 processor can do and the system lets it do, asked of the processor: __builtin_cpu_supports answers
// from the compiler's library, which with some compilers is empty, and then says no to everything.
#pragma once

#include <cpuid.h>

#include <cstdint>
#include <cstring>

namespace qkv {

// What CPUID and XGETBV answer. All 0: a processor of the baseline.
struct CpuAnswers {
    unsigned leaf_1_c = 0;
    unsigned leaf_7_b = 0, leaf_7_c = 0, leaf_7_d = 0;
    unsigned leaf_7_1_a = 0;
    uint64_t saved_registers = 0;  // XCR0: which the system keeps for each thread
};

inline CpuAnswers ask_cpu() {
    CpuAnswers found;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    found.leaf_1_c = c;
    constexpr unsigned OSXSAVE = 1u << 27;  // XGETBV faults without
    if (c & OSXSAVE) {
        unsigned low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        found.saved_registers = (uint64_t)high << 32 | low;
    }
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    found.leaf_7_b = b, found.leaf_7_c = c, found.leaf_7_d = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.leaf_7_1_a = a;
    return found;
}

// Whether instructions of a feature run. Names are the compilers', as in -mavx2.
inline bool has_feature(const CpuAnswers& cpu, const char* name) {
    constexpr uint64_t YMM = 0x6, ZMM = 0xe6, TILES = 0x60000;
    const struct {
        const char* name;
        unsigned answer;
        int bit;
        uint64_t registers;
    } features[] = {
        {"fma", cpu.leaf_1_c, 12, YMM},         {"f16c", cpu.leaf_1_c, 29, YMM},
        {"avx2", cpu.leaf_7_b, 5, YMM},         {"avx512f", cpu.leaf_7_b, 16, ZMM},
        {"avx512dq", cpu.leaf_7_b, 17, ZMM},    {"avx512bw", cpu.leaf_7_b, 30, ZMM},
        {"avx512vl", cpu.leaf_7_b, 31, ZMM},    {"avx512vnni", cpu.leaf_7_c, 11, ZMM},
        {"avx512bf16", cpu.leaf_7_1_a, 5, ZMM}, {"amx-bf16", cpu.leaf_7_d, 22, TILES},
        {"amx-tile", cpu.leaf_7_d, 24, TILES},
    };
    for (const auto& feature : features)
        if (std::strcmp(feature.name, name) == 0)
            return (feature.answer >> feature.bit & 1) &&
                   (cpu.saved_registers & feature.registers) == feature.registers;
    return false;
}

}  // namespace qkv
