// What this machine can do at most: `limits THREADS` prints the fp32 multiply-add peak, the bf16 dot-product peak, on
// tiles where there are any (null where the instruction set has none) and the bandwidth of reading memory as one line
// of JSON.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kChains =
    kLanes == 16 ? 24 : 12;  // Independent sums: more than latency times ports, fewer than registers.
constexpr int kRepeats = 7;
constexpr std::size_t kBytes = std::size_t{512} << 20;  // Much larger than any last-level cache.

volatile float seed = 1.0f, sink;  // What a compiler can neither foresee nor drop.

double seconds_of(int threads, const std::function<void(int)>& work) {
    double best = 1e9;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
        std::atomic<int> ready{0};
        std::atomic<bool> go{false};
        std::vector<std::thread> team;
        for (int t = 0; t < threads; ++t) {
            team.emplace_back([&, t] {
                ++ready;
                while (!go) std::this_thread::yield();
                work(t);
            });
        }
        while (ready < threads) std::this_thread::yield();
        const auto start = std::chrono::steady_clock::now();
        go = true;
        for (std::thread& thread : team) thread.join();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

template <class Sum, class Step>
double gflops(int threads, double operations_of_a_step, Step step) {
    constexpr int steps = 2000000;
    const double seconds = seconds_of(threads, [&](int) {
        Sum sums[kChains];
        for (Sum& sum : sums) sum = Sum{} + seed;
        for (int i = 0; i < steps; ++i) {
#pragma GCC unroll 24
            for (int chain = 0; chain < kChains; ++chain) step(sums[chain]);
        }
        for (Sum& sum : sums) sink = sum[0];
    });
    return operations_of_a_step * kChains * steps * threads / seconds / 1e9;
}

double fp32_gflops(int threads) {
    const Vector a = Vector{} + 0.5f, b = Vector{} + 0.25f;
    return gflops<Vector>(threads, 2 * kLanes, [=](Vector& sum) { sum = sum * a + b; });
}

#ifdef __AVX512BF16__
double bf16_gflops(int threads) {
    const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
    return gflops<__m512>(threads, 4 * 16, [=](__m512& sum) { sum = _mm512_dpbf16_ps(sum, a, a); });
}
#endif

#if defined(__AMX_BF16__) && defined(__linux__)
// On tile registers, which the system must grant; 0 where it does not. Over numbers that differ, since over zeros the
// unit takes less power and is faster than with anything to compute.
double tiles_gflops(int threads) {
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request, tile_data) != 0) return 0;
    constexpr int steps = 500000;
    const double seconds = seconds_of(threads, [&](int) {
        struct alignas(64) {
            unsigned char palette = 1, start = 0, reserved[14] = {};
            unsigned short bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        alignas(64) unsigned short numbers[16 * 32];
        for (int i = 0; i < 16 * 32; ++i) numbers[i] = static_cast<unsigned short>(0x3c00 + i * 40503u % 0x0380);
        __asm__ volatile("" ::"r"(&shape), "r"(numbers) : "memory");  // GCC's intrinsics do not say what they read
        _tile_loadconfig(&shape);
        _tile_loadd(4, numbers, 64);
        _tile_loadd(5, numbers, 64);
        for (int i = 0; i < steps; ++i) {
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 5);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_release();
    });
    return 2.0 * 16 * 16 * 32 * 4 * steps * threads / seconds / 1e9;
}
#endif

double read_gb_per_s(int threads) {
    const std::size_t share = kBytes / sizeof(Vector) / threads / 8 * 8;
    std::vector<float*> slices(threads);
    seconds_of(threads, [&](int t) {  // Each thread writes its slice first, so that its memory lies near it.
        if (slices[t] != nullptr) return;
        slices[t] = static_cast<float*>(std::aligned_alloc(64, share * sizeof(Vector)));
        std::memset(slices[t], 0, share * sizeof(Vector));
    });
    const double seconds = seconds_of(threads, [&](int t) {
        const Vector* x = reinterpret_cast<const Vector*>(slices[t]);
        Vector sums[8] = {};
        for (std::size_t i = 0; i < share; i += 8) {
            for (int k = 0; k < 8; ++k) sums[k] += x[i + k];
        }
        for (Vector& sum : sums) sink = sum[0];
    });
    for (float* slice : slices) std::free(slice);
    return static_cast<double>(share * sizeof(Vector)) * threads / seconds / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
    std::printf("{\"fp32_gflops\": %.1f, ", fp32_gflops(threads));
#if defined(__AMX_BF16__) && defined(__linux__)
    std::printf("\"bf16_gflops\": %.1f, ", std::max(bf16_gflops(threads), tiles_gflops(threads)));
#elif defined(__AVX512BF16__)
    std::printf("\"bf16_gflops\": %.1f, ", bf16_gflops(threads));
#else
    std::printf("\"bf16_gflops\": null, ");
#endif
    std::printf("\"read_gb_per_s\": %.1f}\n", read_gb_per_s(threads));
}
