// Which instruction set runs, and the calls of it.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "abi/c_api.h"

#if defined(QKV_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace qkv {

#define QKV_DECLARE(isa)                             \
    namespace isa {                                  \
    void forward(const Problem&);                    \
    void backward(const Problem&, const Gradients&); \
    int64_t count_scores(const Problem&);            \
    void quantize(const Quantization&);              \
    }

QKV_DECLARE(generic)
#if defined(QKV_X86)
QKV_DECLARE(avx2)
QKV_DECLARE(avx512)
QKV_DECLARE(avx512bf16)
QKV_DECLARE(amx)
#endif

namespace {

#if defined(QKV_X86)
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

// Whether the processor multiplies matrices of bf16, and the system lets this process keep them: it must be asked once,
// and then grants that to all threads.
bool has_amx() {
    unsigned a, b, c, d;
    constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22;
    if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILE) || !(d & BF16)) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

bool always() { return true; }

struct Isa {
    const char* name;
    bool (*supported)();
    void (*forward)(const Problem&);
    void (*backward)(const Problem&, const Gradients&);
    int64_t (*count_scores)(const Problem&);
    void (*quantize)(const Quantization&);
};

// The best first.
const Isa ALL[] = {
#if defined(QKV_X86)
    {"amx", has_amx, amx::forward, amx::backward, amx::count_scores, amx::quantize},
    {"avx512bf16", has_avx512bf16, avx512bf16::forward, avx512bf16::backward, avx512bf16::count_scores,
     avx512bf16::quantize},
    {"avx512", has_avx512, avx512::forward, avx512::backward, avx512::count_scores, avx512::quantize},
    {"avx2", has_avx2, avx2::forward, avx2::backward, avx2::count_scores, avx2::quantize},
#endif
    {"generic", always, generic::forward, generic::backward, generic::count_scores, generic::quantize},
};

// The best that this machine has, or the one that the environment variable QKV_ISA names.
const Isa* choose() {
    const char* forced = std::getenv("QKV_ISA");
    for (const Isa& isa : ALL)
        if ((!forced || !*forced || std::strcmp(forced, isa.name) == 0) && isa.supported()) return &isa;
    return nullptr;
}

const Isa* chosen() {
    static const Isa* const isa = choose();
    return isa;
}

}  // namespace
}  // namespace qkv

// The name of the instruction set that runs; null where QKV_ISA names none, or one that this machine lacks.
QKV_EXPORT const char* qkv_isa() { return qkv::chosen() ? qkv::chosen()->name : nullptr; }

// The names of all that this machine has, the best first, with a space between.
QKV_EXPORT const char* qkv_supported_isas() {
    static const std::string names = [] {
        std::string found;
        for (const qkv::Isa& isa : qkv::ALL)
            if (isa.supported()) found += (found.empty() ? "" : " ") + std::string(isa.name);
        return found;
    }();
    return names.c_str();
}

// What the caller's idea of the structs is held against.
QKV_EXPORT int qkv_problem_size() { return (int)sizeof(qkv::Problem); }
QKV_EXPORT int qkv_gradients_size() { return (int)sizeof(qkv::Gradients); }
QKV_EXPORT int qkv_quantization_size() { return (int)sizeof(qkv::Quantization); }

namespace qkv {
namespace {

// Callers are not C++: an exception would end their process.
template <class Work>
int status_of(Work work) {
    try {
        work();
        return DONE;
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    } catch (const std::length_error&) {  // of a vector beyond all memory
        return OUT_OF_MEMORY;
    }
}

}  // namespace
}  // namespace qkv

QKV_EXPORT int qkv_forward(const void* problem) {
    qkv::Problem p;
    std::memcpy(&p, problem, sizeof p);
    return qkv::status_of([&] { qkv::chosen()->forward(p); });
}

QKV_EXPORT int qkv_backward(const void* problem, const void* gradients) {
    qkv::Problem p;
    std::memcpy(&p, problem, sizeof p);
    qkv::Gradients g;
    std::memcpy(&g, gradients, sizeof g);
    return qkv::status_of([&] { qkv::chosen()->backward(p, g); });
}

// How many scores a forward pass computes, those hidden by a mask in the midst of others included; -1 where memory does
// not suffice.
QKV_EXPORT int64_t qkv_count_scores(const void* problem) {
    qkv::Problem p;
    std::memcpy(&p, problem, sizeof p);
    int64_t count = -1;
    qkv::status_of([&] { count = qkv::chosen()->count_scores(p); });
    return count;
}

QKV_EXPORT void qkv_quantize(const void* quantization) {
    qkv::Quantization q;
    std::memcpy(&q, quantization, sizeof q);
    qkv::chosen()->quantize(q);
}
