// Chooses the instruction set and calls its kernel.
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>

#include "abi/c_api.h"
#include "abi/decoder_layer.h"
#include "abi/gated_mlp.h"
#include "abi/layer_step.h"
#include "abi/rms_norm.h"
#include "runtime/parallel.h"

#if defined(QKV_X86)
#include "abi/cpu_features.h"
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qkv {

// The lines of abi/isas.def are read three times, with another meaning of ISA each time.
#if defined(QKV_X86)
#define ISA_X86 ISA
#else
#define ISA_X86(...)
#endif
#if defined(__aarch64__)
#define ISA_ARM ISA
#define ISA_NOT_ARM(...)
#else
#define ISA_ARM(...)
#define ISA_NOT_ARM ISA
#endif

#define ISA(name, ...)                               \
    namespace name {                                 \
    void forward(const Problem&);                    \
    void backward(const Problem&, const Gradients&); \
    int64_t count_scores(const Problem&);            \
    void quantize(const Quantization&);              \
    void project(const Projection*, int, int);       \
    void rotate(const Rotation&);                    \
    void layer_step(const LayerStep&);               \
    void gated_mlp(const GatedMlp&);                 \
    void decoder_layer(const DecoderLayer&);         \
    void rms_norm(const RmsNorm&);                   \
    }
#include "abi/isas.def"
#undef ISA

namespace {

#if defined(QKV_X86)
bool cpu_has(const char* feature) {
    static const CpuAnswers cpu = ask_cpu();
    return has_feature(cpu, feature);
}

// Whether the system lets this process use tiles: it must be asked once, and then grants that to all threads.
bool grants_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

#if defined(__aarch64__)
// Whether the processor multiplies pairs of bf16 and fours of int8.
bool has_dot_products() {
#if defined(__linux__)
    constexpr unsigned long INT8 = 1ul << 20, BF16 = 1ul << 14;  // HWCAP_ASIMDDP, HWCAP2_BF16
    return (getauxval(AT_HWCAP) & INT8) && (getauxval(AT_HWCAP2) & BF16);
#elif defined(__APPLE__)
    const auto has = [](const char* feature) {
        int found = 0;
        size_t size = sizeof found;
        return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found == 1;
    };
    return has("hw.optional.arm.FEAT_DotProd") && has("hw.optional.arm.FEAT_BF16");
#else
    return false;
#endif
}
#endif

bool has_none() { return true; }

// bool has_avx2() and so on: whether this machine has an instruction set.
#define CPU(feature) cpu_has(feature)
#define ISA(name, base, flags, present) \
    bool has_##name() { return has_##base() && (present); }
#include "abi/isas.def"
#undef ISA
#undef CPU

struct Isa {
    const char* name;
    bool (*supported)();
    void (*forward)(const Problem&);
    void (*backward)(const Problem&, const Gradients&);
    int64_t (*count_scores)(const Problem&);
    void (*quantize)(const Quantization&);
    void (*project)(const Projection*, int, int);
    void (*rotate)(const Rotation&);
    void (*layer_step)(const LayerStep&);
    void (*gated_mlp)(const GatedMlp&);
    void (*decoder_layer)(const DecoderLayer&);
    void (*rms_norm)(const RmsNorm&);
};

// The least first.
#define ISA(name, ...)                                                                                    \
    {#name,         has_##name,   name::forward,    name::backward,  name::count_scores,  name::quantize, \
     name::project, name::rotate, name::layer_step, name::gated_mlp, name::decoder_layer, name::rms_norm},
const Isa IN_ORDER[] = {
#include "abi/isas.def"
};
#undef ISA

// The best that this machine has, or the one that the environment variable QKV_ISA names.
const Isa* choose() {
    const char* forced = std::getenv("QKV_ISA");
    for (auto isa = std::rbegin(IN_ORDER); isa != std::rend(IN_ORDER); ++isa)
        if ((!forced || !*forced || std::strcmp(forced, isa->name) == 0) && isa->supported()) return &*isa;
    return nullptr;
}

const Isa* chosen() {
    static const Isa* const isa = choose();
    return isa;
}

}  // namespace
}  // namespace qkv

// The name of the instruction set that runs; null if QKV_ISA names an unknown one, or one that this machine lacks.
QKV_EXPORT const char* qkv_isa() { return qkv::chosen() ? qkv::chosen()->name : nullptr; }

// The names of all that this machine has, the best first, with a space between.
QKV_EXPORT const char* qkv_supported_isas() {
    static const std::string names = [] {
        std::string joined;
        for (auto isa = std::rbegin(qkv::IN_ORDER); isa != std::rend(qkv::IN_ORDER); ++isa)
            if (isa->supported()) joined += (joined.empty() ? "" : " ") + std::string(isa->name);
        return joined;
    }();
    return names.c_str();
}

// Takes the path of torch's library, whose threads calls then use. Returns 0 if it has none that we know how to use.
QKV_EXPORT int qkv_use_threads_of(const char* library) { return qkv::use_threads_of(library); }

// Callers compare these with their own structs.
QKV_EXPORT int qkv_problem_size() { return (int)sizeof(qkv::Problem); }
QKV_EXPORT int qkv_gradients_size() { return (int)sizeof(qkv::Gradients); }
QKV_EXPORT int qkv_quantization_size() { return (int)sizeof(qkv::Quantization); }
QKV_EXPORT int qkv_projection_size() { return (int)sizeof(qkv::Projection); }
QKV_EXPORT int qkv_rotation_size() { return (int)sizeof(qkv::Rotation); }

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
    if (!qkv::fits(p)) return qkv::OTHER;
    return qkv::status_of([&] { qkv::chosen()->forward(p); });
}

QKV_EXPORT int qkv_backward(const void* problem, const void* gradients) {
    qkv::Problem p;
    std::memcpy(&p, problem, sizeof p);
    if (!qkv::fits(p)) return qkv::OTHER;
    qkv::Gradients g;
    std::memcpy(&g, gradients, sizeof g);
    return qkv::status_of([&] { qkv::chosen()->backward(p, g); });
}

// How many scores a forward pass computes, including hidden ones that are not skipped; -1 where it cannot run.
QKV_EXPORT int64_t qkv_count_scores(const void* problem) {
    qkv::Problem p;
    std::memcpy(&p, problem, sizeof p);
    int64_t count = -1;
    if (!qkv::fits(p)) return count;
    qkv::status_of([&] { count = qkv::chosen()->count_scores(p); });
    return count;
}

QKV_EXPORT void qkv_quantize(const void* quantization) {
    qkv::Quantization q;
    std::memcpy(&q, quantization, sizeof q);
    qkv::chosen()->quantize(q);
}

namespace qkv {

int run_layer_step(const LayerStep& step) {
    return status_of([&] { chosen()->layer_step(step); });
}

int run_decoder_layer(const DecoderLayer& layer) {
    return status_of([&] { chosen()->decoder_layer(layer); });
}

}  // namespace qkv

QKV_EXPORT int qkv_project(const void* projections, int count, int threads) {
    qkv::Projection products[qkv::MOST_PRODUCTS];
    if (count < 0 || count > qkv::MOST_PRODUCTS) return qkv::OTHER;
    std::memcpy(products, projections, count * sizeof(qkv::Projection));
    for (int i = 0; i < count; ++i)
        if (products[i].rows < 1 || products[i].rows > qkv::MOST_ROWS) return qkv::OTHER;
    return qkv::status_of([&] { qkv::chosen()->project(products, count, threads); });
}

QKV_EXPORT int qkv_rotate(const void* rotation) {
    qkv::Rotation r;
    std::memcpy(&r, rotation, sizeof r);
    if (!qkv::fits(r)) return qkv::OTHER;
    qkv::chosen()->rotate(r);
    return qkv::DONE;
}

QKV_EXPORT int qkv_gated_mlp(const void* mlp) {
    qkv::GatedMlp m;
    std::memcpy(&m, mlp, sizeof m);
    if (m.gate.rows < 1 || m.gate.rows > qkv::MOST_ROWS) return qkv::OTHER;
    return qkv::status_of([&] { qkv::chosen()->gated_mlp(m); });
}

QKV_EXPORT void qkv_rms_norm(const void* norm) {
    qkv::RmsNorm n;
    std::memcpy(&n, norm, sizeof n);
    qkv::chosen()->rms_norm(n);
}
