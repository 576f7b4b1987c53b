// Runs all tests, or those whose names contain one of the arguments, on the instruction set that the library chooses;
// on the threads of the OpenMP library whose path QKV_OPENMP is, if it is one, and else on those of the standard
// library.
#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "check.h"
#include "library.h"

// Whether a library is loaded, as torch loads its OpenMP before anyone calls the kernel.
static bool is_loaded(const char* path) {
#if defined(_WIN32)
    return LoadLibraryA(path);
#else
    return dlopen(path, RTLD_NOW | RTLD_GLOBAL);
#endif
}

int main(int count, char** arguments) {
    const char* openmp = std::getenv("QKV_OPENMP");
    if (openmp && *openmp && !is_loaded(openmp)) {
        std::printf("%s, which QKV_OPENMP names, does not load\n", openmp);
        return 1;
    }
    constexpr int SKIPPED = 77;  // as automake and ctest have it
    if (!qkv_isa()) {
        std::puts("this machine lacks the instruction set that QKV_ISA names");
        return SKIPPED;
    }
    if (qkv_problem_size() != sizeof(qkv::Problem) || qkv_gradients_size() != sizeof(qkv::Gradients) ||
        qkv_quantization_size() != sizeof(qkv::Quantization) || qkv_sequences_size() != sizeof(qkv::Sequences)) {
        std::puts("the library is of another version than these tests: rebuild it");
        return 1;
    }
    const auto is_selected = [&](const qkv::Test& test) {
        const auto names_it = [&](const char* part) { return test.name.find(part) != std::string::npos; };
        return count == 1 || std::any_of(arguments + 1, arguments + count, names_it);
    };
    int passed = 0, failed = 0;
    for (const qkv::Test& test : qkv::tests()) {
        if (!is_selected(test)) continue;
        try {
            test.run();
            ++passed;
        } catch (const qkv::Skipped& skipped) {
            std::printf("SKIPPED %s: %s\n", test.name.c_str(), skipped.what());
        } catch (const std::exception& failure) {
            std::printf("FAILED %s: %s\n", test.name.c_str(), failure.what());
            ++failed;
        }
        std::fflush(stdout);
    }
    std::printf("%s: %d passed, %d failed\n", qkv_isa(), passed, failed);
    return failed > 0 || passed == 0;
}
