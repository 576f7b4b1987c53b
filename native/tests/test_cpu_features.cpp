// What the processor says of itself, against the compiler's library, and what processors and systems could say.
#if defined(__x86_64__)
#include "abi/cpu_features.h"
#include "check.h"

namespace qkv {

static const char* const NAMES[] = {"fma",      "f16c",       "avx2",       "avx512f",  "avx512dq", "avx512bw",
                                    "avx512vl", "avx512vnni", "avx512bf16", "amx-tile", "amx-bf16"};

TEST(features_are_those_that_the_library_of_the_compiler_finds) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("sse2")) throw Skipped("the compiler's library knows no processor");
    const CpuAnswers cpu = ask_cpu();
#define FEATURE(name) \
    require(has_feature(cpu, name) == !!__builtin_cpu_supports(name), std::string("the library differs in ") + name);
    FEATURE("fma")
    FEATURE("f16c")
    FEATURE("avx2")
    FEATURE("avx512f")
    FEATURE("avx512dq")
    FEATURE("avx512bw")
    FEATURE("avx512vl")
    FEATURE("avx512vnni")
    FEATURE("avx512bf16")
#undef FEATURE
}

// A processor that has everything, under a system that keeps the registers of `saved`.
static CpuAnswers everything(uint64_t saved) { return {~0u, ~0u, ~0u, ~0u, ~0u, saved}; }

TEST(features_need_the_system_to_keep_their_registers) {
    const struct {
        uint64_t saved;
        size_t features;  // the first so many of NAMES
    } systems[] = {{0, 0}, {0x3, 0}, {0x7, 3}, {0x67, 3}, {0xe7, 9}, {0x200e7, 9}, {0x600e7, 11}};
    for (const auto& system : systems)
        for (size_t i = 0; i < std::size(NAMES); ++i)
            require(has_feature(everything(system.saved), NAMES[i]) == (i < system.features),
                    std::string(NAMES[i]) + " where the system keeps " + std::to_string(system.saved));
}

TEST(each_feature_has_a_bit_of_its_own) {
    unsigned CpuAnswers::* const answers[] = {&CpuAnswers::leaf_1_c, &CpuAnswers::leaf_7_b, &CpuAnswers::leaf_7_c,
                                              &CpuAnswers::leaf_7_d, &CpuAnswers::leaf_7_1_a};
    size_t found = 0;
    for (const auto answer : answers)
        for (int bit = 0; bit < 32; ++bit) {
            CpuAnswers cpu;
            cpu.saved_registers = ~0ull;
            cpu.*answer = 1u << bit;
            size_t of_bit = 0;
            for (const char* name : NAMES) of_bit += has_feature(cpu, name);
            require(of_bit <= 1, "a bit stands for two features");
            found += of_bit;
        }
    require(found == std::size(NAMES), "a feature has no bit");
    require(!has_feature(everything(~0ull), "avx10"), "a name that is not known");
}

}  // namespace qkv
#endif
