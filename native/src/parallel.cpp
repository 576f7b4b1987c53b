#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace qkv {

namespace {

struct Loop {
    std::atomic<int64_t> next{0};
    const int64_t count;
    const int threads;
    const Sharing sharing;
    const std::function<void(int64_t)>& work;

    // Takes the items [begin, end), if any are left.
    bool take(int64_t& begin, int64_t& end) {
        begin = next.load(std::memory_order_relaxed);
        do {
            if (begin >= count) return false;
            const int64_t some = sharing == Sharing::runs ? (count - begin) / (2 * threads) : 1;
            end = begin + std::max<int64_t>(1, some);
        } while (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return true;
    }

    void run() {
        for (int64_t begin, end; take(begin, end);)
            for (; begin < end; ++begin) work(begin);
    }
};

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);

// torch's OpenMP workers spin for a while after each parallel region; a second pool would fight them for the cores.
// Where torch brings libgomp, its symbols are global, and this is the entry that compilers call.
GompParallel gomp_parallel() {
    static const GompParallel found = (GompParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return found;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& work, Sharing sharing) {
    if (threads > count) threads = (int)count;
    if (threads <= 1) {
        for (int64_t i = 0; i < count; ++i) work(i);
        return;
    }
    Loop loop{{0}, count, threads, sharing, work};
    if (const GompParallel parallel = gomp_parallel()) {
        parallel([](void* data) { ((Loop*)data)->run(); }, &loop, (unsigned)threads, 0);
        return;
    }
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&loop] { loop.run(); });
    loop.run();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace qkv
